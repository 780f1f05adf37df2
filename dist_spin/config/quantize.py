"""Settings of rounding the weights and of exports."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dist_spin.config.checks import _check, check_source


@dataclass(frozen=True)
class QuantizeConfig:
    """quantize (making the quantised weights)."""

    method: Literal["gptq", "rtn", "none"] = "gptq"
    """GPTQ, round to nearest (rtn), or leave the weights as they are; GPTQ loses least."""
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
    """Passes after GPTQ that move each column's codes to where all other columns want them; 0: none, as published."""
    quantize_activations: bool = False
    """Keep activation, key and value quantisers on while calibrating; off as published."""
    layers_per_job: int = 0
    """Layers that see each other's rounding errors and are done by one job, others in parallel; 0: all, as published."""
    baselines: list[Literal["none", "hadamard", "orthogonal"]] = field(default_factory=list)
    """Unlearned rotations to quantise and evaluate beside the learned one, for comparison."""

    def __post_init__(self) -> None:
        check_source("quantize.source", self.source)
        _check(self, "seq_len n_sequences block_size", lambda n: n >= 1, "use 1 or more")
        _check(self, "seed", lambda n: n >= 0, "use 0 or more")
        _check(self, "layers_per_job", lambda n: n >= 0, "use a number of layers, or 0 for all")
        _check(self, "clip_norm", lambda x: 0 < x < math.inf, "use a number above 0, such as 2")
        _check(self, "cd_passes", lambda n: n >= 0, "use 0 or more")
        _check(self, "percdamp", lambda x: 0 < x < math.inf, "use a fraction above 0, such as 0.01")
        _check(self, "baselines", lambda names: len(set(names)) == len(names), "name each rotation once")


@dataclass(frozen=True)
class ExportConfig:
    """export (files for the runtimes that models are served with)."""

    target: Literal["none", "hf", "compressed-tensors", "gguf", "executorch"] = "none"
    """Format the run is made for; what no runtime of it accepts is then refused when the run starts, not at its end."""
    profile: Literal["no-had", "r4-block"] = "no-had"
    """What is rotated: R1 and R2 (no-had), which every runtime serves, or the input of down_proj too (r4-block)."""
    shard_gb: float = 5.0
    """Largest weights file, GB; a single tensor that is larger gets a file of its own."""
    gguf_converter: str | None = None
    """convert_hf_to_gguf.py of llama.cpp, its folder or a llama-cpp-python source package; download: fetch that with pip."""

    def __post_init__(self) -> None:
        _check(self, "shard_gb", lambda x: 0 < x < math.inf, "use a number above 0")
