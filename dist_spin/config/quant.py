"""Settings of the quantisers of weights, activations, keys and values."""

from dataclasses import dataclass
from typing import Any, Literal

from dist_spin.config.checks import BITS, FP32_TINY, MAX_CHANNELS, check_range, require
from dist_spin.numerics.formats import FORMATS

Format = Literal["int", "fp8", "mxfp8", "mxfp4", "nvfp4"]
CLIP_PRESETS: dict[str, dict[str, Any]] = {"quarot": {"a_clip_ratio": 0.9, "k_clip_ratio": 0.95, "v_clip_ratio": 0.95}}


@dataclass(frozen=True)
class QuantConfig:
    """quant (bits of weights W, inputs of linear layers A, attention keys K and values V)."""

    w_bits: int = 4
    """Weight bits (2 to 8, or 16 = off). 4 is the published setting."""
    w_format: Format = "int"
    """Number format of the weights: int; fp8 (E4M3, one scale per output channel); mxfp8, mxfp4 (power-of-two scales of 32);
    nvfp4 (scales of 16). It fixes the bits and the groups; w_mse_clip then searches the scales, for nvfp4 four over six too."""
    w_symmetric: bool = True
    """Weights symmetric around 0, as most int4 kernels require; false adds a zero point."""
    w_group_size: int = 0
    """Input channels that share one weight scale; 0 means one scale per output channel, as published."""
    w_mse_clip: bool = True
    """Search for the weight clipping of least error instead of taking the largest weight."""
    down_bits: int = 0
    """Weight bits of down_proj (2 to 8), such as 8 for the linear that suffers most from rounding; 0 takes w_bits."""
    embedding_bits: int = 16
    """Bits of the embedding (2 to 8, or 16 = off): rounded to nearest, symmetric, one scale per token of the vocabulary."""
    head_bits: int = 16
    """Bits of lm_head (2 to 8, or 16 = off), rounded as the embedding is; tied weights are rounded separately."""
    a_bits: int = 4
    """Bits of the inputs of linear layers (2 to 8, or 16 = off), quantised per token at run time."""
    a_format: Format = "int"
    """Number format of the inputs of linear layers, as w_format; fp8 has a scale per token. All but int are symmetric."""
    a_symmetric: bool = False
    """Activations symmetric around 0; false adds a zero point, as published."""
    a_group_size: int = 0
    """Channels that share one activation scale, for kernels that read such groups; 0 means one scale per token, as published."""
    a_clip_ratio: float = 1.0
    """Fraction of the activation range that is kept, above 0 up to 1; 1 clips nothing."""
    clips: Literal["none", "quarot"] = "none"
    """Preset of the three clip ratios: quarot sets activations 0.9, keys and values 0.95; none leaves them as given."""
    arithmetic: Literal["auto", "fp32", "compressed-tensors", "vllm"] = "auto"
    """How scales are computed: in fp32, largest symmetric activation = highest code; or as compressed-tensors' runtime does,
    in the model's number format and half a step beyond it; vllm: activations as in fp32, and weight scales in the number format
    in which vLLM's kernels hold them; auto: as export.target needs."""
    kv_format: Format = "int"
    """Number format of keys and values, as w_format; fp8 has a scale per head and token. All but int are symmetric."""
    o_per_head: bool = False
    """Quantise the input of o_proj per head instead of per token; the paper says per token."""
    k_bits: int = 4
    """Bits of the keys (2 to 8, or 16 = off), quantised after the position embedding and R3."""
    k_symmetric: bool = False
    """Keys symmetric around 0; false adds a zero point, as published."""
    k_clip_ratio: float = 1.0
    """Fraction of the key range that is kept, above 0 up to 1; 1 clips nothing."""
    k_group_size: int = 0
    """Channels that share one key scale; 0 means the head dimension (one scale per head and token)."""
    k_bias_apart: bool = False
    """Quantise keys without k_proj's bias, which is added where attention reads them, turned by their position: where it is
    large (Qwen2.5) 4-bit keys lose nearly all without it. Changes nothing in models without such a bias. As published: false."""
    v_bits: int = 4
    """Bits of the values (2 to 8, or 16 = off)."""
    v_symmetric: bool = False
    """Values symmetric around 0; false adds a zero point, as published."""
    v_clip_ratio: float = 1.0
    """Fraction of the value range that is kept, above 0 up to 1; 1 clips nothing."""
    v_group_size: int = 0
    """Channels that share one value scale; 0 means the head dimension (one scale per head and token)."""

    def __post_init__(self) -> None:
        for name, ratio in CLIP_PRESETS.get(self.clips, {}).items():
            value = getattr(self, name)
            whole = f"quant.clips={self.clips} sets it to {ratio}, so leave it out, or use quant.clips=none"
            require(value in (1.0, ratio), f"quant.{name}", value, whole)
        widths = {"w": self.w_bits, "embedding": self.embedding_bits, "head": self.head_bits}
        widths |= {"a": self.a_bits, "k": self.k_bits, "v": self.v_bits}
        for prefix, bits in widths.items():
            require(bits in BITS, f"quant.{prefix}_bits", bits, "use 2 to 8 bits, or 16 = off")
        same = "use 2 to 8 bits, or 0 for the same as quant.w_bits"
        require(self.down_bits in (0, *BITS[:-1]), "quant.down_bits", self.down_bits, same)
        if self.w_bits == 16:  # nothing would read them
            off = "quant.w_bits=16 leaves all weights as they are, so use"
            require(self.down_bits == 0, "quant.down_bits", self.down_bits, f"{off} 0")
            require(self.embedding_bits == 16, "quant.embedding_bits", self.embedding_bits, f"{off} 16")
            require(self.head_bits == 16, "quant.head_bits", self.head_bits, f"{off} 16")
        for prefix, kind in {"w": self.w_format, "a": self.a_format, "k": self.kv_format, "v": self.kv_format}.items():
            if kind != "int":
                self._check_format(prefix, kind)
        fraction = "use a fraction above 0 and up to 1; 1 clips nothing"
        for prefix, ratio in {"a": self.a_clip_ratio, "k": self.k_clip_ratio, "v": self.v_clip_ratio}.items():
            require(FP32_TINY <= ratio <= 1, f"quant.{prefix}_clip_ratio", ratio, fraction)
        channels = "use a number of channels, or 0 for the whole row or head"
        for prefix, size in {
            "w": self.w_group_size,
            "a": self.a_group_size,
            "k": self.k_group_size,
            "v": self.v_group_size,
        }.items():
            check_range(f"quant.{prefix}_group_size", size, 0, MAX_CHANNELS, channels)

    def _check_format(self, prefix: str, kind: str) -> None:
        """Refuse what the format `kind` of weights, activations, keys or values has no place for."""
        number_format, setting = FORMATS[kind], f"quant.{'kv' if prefix in ('k', 'v') else prefix}_format={kind}"
        values = vars(self)
        bits, group, fixed = values[f"{prefix}_bits"], values[f"{prefix}_group_size"], number_format.group
        only = f"{setting} has {number_format.bits} bits, so use {number_format.bits}, or 16 = off"
        require(bits in (number_format.bits, 16), f"quant.{prefix}_bits", bits, only)
        whole = f"{setting} has groups of {fixed}, so use 0" if fixed else f"{setting} has one scale a row, so use 0"
        require(group in (0, fixed), f"quant.{prefix}_group_size", group, whole)
        if prefix == "w":
            symmetric = f"{setting} has no zero point, so use true"
            require(self.w_symmetric, "quant.w_symmetric", self.w_symmetric, symmetric)
            same = f"{setting} fixes its bits, so use 0"
            require(self.down_bits in (0, bits), "quant.down_bits", self.down_bits, same)
            return
        clips = f"{setting} clips nothing, so use none"
        require(self.clips == "none", "quant.clips", self.clips, clips)
        ratio = values[f"{prefix}_clip_ratio"]
        require(ratio == 1, f"quant.{prefix}_clip_ratio", ratio, f"{setting} clips nothing, so use 1")
        heads = f"{setting} has groups of {fixed}, so use false"
        require(prefix != "a" or not (fixed and self.o_per_head), "quant.o_per_head", self.o_per_head, heads)

    @property
    def weights_per_scale(self) -> int:
        """Weights of a row that share a scale, by the number format or `w_group_size`; 0 for the whole row."""
        return self.w_group_size if self.w_format == "int" else FORMATS[self.w_format].group
