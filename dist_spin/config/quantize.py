"""Settings of rounding the weights."""

from dataclasses import dataclass, field
from typing import Literal

from dist_spin.config.checks import (
    FP32_TINY,
    MAX_CHANNELS,
    MAX_COUNT,
    MAX_SEED,
    MAX_SEQ_LEN,
    MAX_TOKENS,
    check_positive,
    check_range,
    check_source,
    check_text,
    check_unique,
    require,
)


@dataclass(frozen=True)
class QuantizeConfig:
    """quantize (making the quantised weights; published: in the papers on SpinQuant and GPTQ)."""

    method: Literal["gptq", "rtn", "none"] = "gptq"
    """GPTQ, round to nearest (rtn), or leave the weights as they are; GPTQ is the most accurate."""
    source: str = "wikitext2"
    """Text that GPTQ calibrates on; same forms as optimize.source."""
    split: str = "train"
    """Part of the source; never the one that is evaluated."""
    seq_len: int = 2048
    """Length of one calibration sequence, tokens; the published length."""
    n_sequences: int = 128
    """Calibration sequences; the published number."""
    seed: int = 0
    """Seed of the random places where the calibration sequences start."""
    percdamp: float = 0.01
    """Damping of GPTQ's Hessian, as a fraction of its mean diagonal; raise it if the solve fails."""
    block_size: int = 128
    """Columns that GPTQ updates together; changes speed, hardly the result."""
    act_order: bool = False
    """Quantise the columns with the largest activations first; off as published."""
    clip_norm: float = 2.4
    """Exponent of the error that quant.w_mse_clip makes least: 2.4 as published; at 2 GPTQ loses less."""
    cd_passes: int = 0
    """Passes of coordinate descent over GPTQ's codes, which lower the error of each layer's output; 0: none, as published."""
    tune_steps: int = 0
    """Steps in which the scales of the codes and the gains of norms then learn to predict as full precision does; codes stay,
    and so do scales that a format holds in 8 bits. Four calibration sequences a step; the whole model is on each rank's device.
    0: none, as published."""
    tune_lr: float = 1e-3
    """Learning rate of these scales' logarithms (Adam), falling along a cosine."""
    quantize_activations: bool = False
    """Keep activation, key and value quantisers on while calibrating; off as published."""
    expert_tokens: Literal["auto", "routed", "all"] = "auto"
    """Which tokens make the Hessian of an expert: those routed to it (all, if there are none), all, or (auto) all for experts
    that fewer tokens chose than their inputs have channels."""
    layers_per_job: int = 0
    """Layers that see each other's rounding errors and are done by one job, others in parallel; 0: all, as published."""
    parallel: Literal["auto", "ranks", "layers"] = "auto"
    """How several processes share the work: ranks: all compute one layer at a time, each some sequences and rows; layers: each
    computes whole jobs of layers_per_job layers; auto: whichever is estimated to be faster, which is said."""
    baselines: list[Literal["none", "hadamard", "orthogonal"]] = field(default_factory=list)
    """Unlearned rotations to quantise and evaluate beside the learned one, for comparison."""

    def __post_init__(self) -> None:
        check_source("quantize.source", self.source)
        check_text("quantize.split", self.split)
        check_range("quantize.seq_len", self.seq_len, 1, MAX_SEQ_LEN, "use 1 or more")
        most = MAX_TOKENS // self.seq_len
        check_range("quantize.n_sequences", self.n_sequences, 1, most, "use 1 or more")
        check_range("quantize.seed", self.seed, 0, MAX_SEED, "use 0 or more")
        check_range("quantize.percdamp", self.percdamp, FP32_TINY, 10.0, "use a fraction above 0, such as 0.01")
        check_range("quantize.block_size", self.block_size, 1, MAX_CHANNELS, "use 1 or more")
        check_range("quantize.clip_norm", self.clip_norm, FP32_TINY, 100.0, "use a number above 0, such as 2")
        check_range("quantize.cd_passes", self.cd_passes, 0, MAX_COUNT, "use 0 or more")
        check_range("quantize.tune_steps", self.tune_steps, 0, MAX_COUNT, "use a number of steps, or 0 for none")
        check_positive("quantize.tune_lr", self.tune_lr, "use a number above 0, such as 1e-3")
        if self.tune_steps:
            whole = "all layers are tuned together: set quantize.layers_per_job=0, or quantize.tune_steps=0"
            require(self.layers_per_job == 0, "quantize.layers_per_job", self.layers_per_job, whole)
        check_range(
            "quantize.layers_per_job", self.layers_per_job, 0, MAX_COUNT, "use a number of layers, or 0 for all"
        )
        check_unique("quantize.baselines", self.baselines, "name each rotation once")
