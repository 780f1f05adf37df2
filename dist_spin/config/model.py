"""Settings of the model, its rotations and its quantisers."""

from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import BITS, _check

CLIP_PRESETS = {"quarot": {"a_clip_ratio": 0.9, "k_clip_ratio": 0.95, "v_clip_ratio": 0.95}}  # presets of QuantConfig


@dataclass(frozen=True)
class ModelConfig:
    """model (the network whose rotations are learned)."""

    path: str
    """Hugging Face directory or hub id, .gguf file, or package:NAME (the one .gguf in an installed Python package)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the newest, so pin it to make a run repeatable."""
    dtype: Literal["bfloat16", "float32", "float64", "float16"] = "bfloat16"
    """Number format of weights and compute; bfloat16 is what these models were trained in."""
    dummy_weights: bool = False
    """Seeded random weights, only config.json is read: for timing and memory tests without a download."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; off because that code can do anything."""

    def __post_init__(self) -> None:
        _check(self, "path", bool, "give a model directory, hub id, .gguf file or package:NAME")


@dataclass(frozen=True)
class RotationConfig:
    """rotation (where the rotations start, and which are used)."""

    init: Literal["hadamard", "range", "orthogonal", "identity"] = "hadamard"
    """Start of R1 and R2: randomised Hadamard; range: the same, but R1 fitted to activations of the learning text, in a
    minute or so, so that each token's range is small; random orthogonal; or none."""
    seed: int = 0
    """Seed of the random start."""
    online: bool = True
    """Add R3 (queries, keys) and R4 (down_proj input) at run time, which 4 bits need; false: R1 and R2, at no cost."""
    r4_block: int = 0
    """Block size of R4 in channels; 0 rotates the whole intermediate size."""
    load: str | None = None
    """File of rotations to start from instead of `init`: R.bin or .safetensors (scales and clips too, where learned)."""

    def __post_init__(self) -> None:
        _check(self, "seed", lambda n: n >= 0, "use 0 or more")
        _check(self, "r4_block", lambda n: n >= 0, "use 0 for the whole size, or a block size in channels")


@dataclass(frozen=True)
class QuantConfig:
    """quant (bits of weights W, inputs of linear layers A, attention keys K and values V)."""

    w_bits: int = 4
    """Weight bits (2 to 8, or 16 = off). 4 is the published setting."""
    w_symmetric: bool = True
    """Weights symmetric around 0, which kernels want; false adds a zero point."""
    w_group_size: int = 0
    """Input channels that share one weight scale; 0 means one scale per output channel, as published."""
    w_mse_clip: bool = True
    """Search for the weight clipping of least error instead of taking the largest weight."""
    down_bits: int = 0
    """Weight bits of down_proj (2 to 8), such as 8 for the linear that suffers most from rounding; 0 takes w_bits."""
    embedding_bits: int = 16
    """Bits of the embedding (2 to 8, or 16 = off): rounded to nearest, symmetric, one scale per token of the vocabulary."""
    head_bits: int = 16
    """Bits of lm_head (2 to 8, or 16 = off), rounded as the embedding is; tied weights are rounded apart."""
    a_bits: int = 4
    """Bits of the inputs of linear layers (2 to 8, or 16 = off), quantised per token at run time."""
    a_symmetric: bool = False
    """Activations symmetric around 0; false adds a zero point, as published."""
    a_clip_ratio: float = 1.0
    """Fraction of the activation range that is kept, above 0 up to 1; 1 clips nothing."""
    clips: Literal["none", "quarot"] = "none"
    """Preset of the three clip ratios: quarot sets activations 0.9, keys and values 0.95; none leaves them as given."""
    arithmetic: Literal["auto", "fp32", "compressed-tensors"] = "auto"
    """How scales are computed: in fp32, largest symmetric activation = highest code; or as compressed-tensors' runtime does,
    in the model's number format and half a step beyond it; auto: as export.target needs."""
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
            whole = f"quant.clips={self.clips} sets it to {ratio}, so leave it out, or use quant.clips=none"
            _check(self, name, (1.0, ratio).__contains__, whole)
            object.__setattr__(self, name, ratio)  # before anything reads it
        widths = "w_bits embedding_bits head_bits a_bits k_bits v_bits"
        _check(self, widths, lambda n: n in BITS, "use 2 to 8 bits, or 16 = off")
        _check(self, "down_bits", lambda n: n in (0, *BITS[:-1]), "use 2 to 8 bits, or 0 for the same as quant.w_bits")
        if self.w_bits == 16:  # nothing would read them
            off = "quant.w_bits=16 leaves all weights as they are, so use"
            _check(self, "down_bits", lambda n: n == 0, f"{off} 0")
            _check(self, "embedding_bits head_bits", lambda n: n == 16, f"{off} 16")
        ratios, sizes = "a_clip_ratio k_clip_ratio v_clip_ratio", "w_group_size k_group_size v_group_size"
        _check(self, ratios, lambda x: 0 < x <= 1, "use a fraction above 0 and up to 1; 1 clips nothing")
        _check(self, sizes, lambda n: n >= 0, "use a number of channels, or 0 for the whole row or head")
