"""Settings of a comparison and of the methods in it."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dist_spin.config.checks import _check, parse_bits

COMPARED = "rtn gptq smoothquant quarot spinquant_no_had spinquant_had ours"


@dataclass(frozen=True)
class MethodsConfig:
    """methods (other published methods, for comparison; they calibrate on the text of quantize)."""

    smooth_alphas: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    """SmoothQuant: strengths tried for each layer, from 0 (weights smooth) to 1 (activations smooth)."""
    flat_epochs: int = 15
    """FlatQuant, OmniQuant, AffineQuant: passes over the calibration text; FlatQuant's published number."""
    flat_batch_size: int = 4
    """FlatQuant, OmniQuant, AffineQuant: sequences per step; FlatQuant's published number."""
    flat_lr: float = 5e-3
    """FlatQuant, OmniQuant, AffineQuant: learning rate of transforms, that of clips is ten times it; FlatQuant's."""
    quik_columns: int = 256
    """QUIK: input channels of each site that stay at 16 bits, but at most a quarter of them; about the published number."""
    dart_share: float = 0.1
    """DartQuant: share of the calibration tokens whose activations are kept; published."""
    dart_epochs: int = 10
    """DartQuant: passes over the kept activations; published."""
    dart_batch_size: int = 64
    """DartQuant: calibration sequences whose kept activations of one site make a step; published."""
    dart_lr: float = 1e-3
    """DartQuant: learning rate of plain gradient descent; published."""
    qat_steps: int = 500
    """LLM-QAT: steps over quantize.n_sequences sequences that the model writes itself; published are 12500."""
    qat_batch_size: int = 8
    """LLM-QAT: sequences per step over all processes together; published."""
    qat_lr: float = 2e-5
    """LLM-QAT: learning rate of all weights, falling along a cosine; published."""

    def __post_init__(self) -> None:
        strengths = "use numbers from 0 to 1, such as [0.5]"
        _check(self, "smooth_alphas", lambda xs: bool(xs) and all(0 <= x <= 1 for x in xs), strengths)
        counts = "flat_epochs flat_batch_size dart_epochs dart_batch_size qat_steps qat_batch_size"
        _check(self, counts, lambda n: n >= 1, "use 1 or more")
        _check(self, "quik_columns", lambda n: n >= 0, "use a number of channels")
        _check(self, "flat_lr dart_lr qat_lr", lambda x: 0 < x < math.inf, "use a number above 0, such as 5e-3")
        _check(self, "dart_share", lambda x: 0 < x <= 1, "use a fraction above 0 and up to 1")


@dataclass(frozen=True)
class CompareConfig:
    """compare (the table of systems, bits and seeds)."""

    methods: list[str] = field(default_factory=COMPARED.split)
    """Rows: rtn and gptq (no rotation), hadamard and orthogonal (random, unlearned), quarot, quarot_no_clips,
    spinquant_no_had (R1 and R2 alone), spinquant_had (published update rule), ours (this run's settings), and the other
    methods that are built (smoothquant, flatquant, ...)."""
    bits: list[str] = field(default_factory=lambda: ["W4A16", "W4A8", "W4A4KV16", "W4A4KV4", "W4A8KV8"])
    """Columns: bits of weights, activations, and keys and values (16 if left out)."""
    weights: list[Literal["rtn", "gptq"]] = field(default_factory=lambda: ["rtn", "gptq"])
    """How weights are rounded: every row once with each, but for rtn and gptq themselves."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the rows that start from something random; the table gives mean and standard deviation."""
    spread_seeds: int = 0
    """Also measure this many random Hadamards and random orthogonal matrices, to show how far they vary; 0: none."""
    spread_bits: list[str] = field(default_factory=lambda: ["W16A4KV4", "W4A4KV4"])
    """Bits of that study."""
    spread_weights: Literal["rtn", "gptq"] = "rtn"
    """How weights are rounded in that study."""
    keep_layers: bool = False
    """Keep the quantised layers of every row: a copy of the model each."""
    parallel: Literal["ranks", "rows"] = "ranks"
    """What several processes do: all of them each row (a model that is learned on all GPUs), or each takes whole rows alone,
    on one GPU, as they come; then processes may be started at any time, by torchrun or one by one."""

    def __post_init__(self) -> None:
        for name in ("methods", "bits", "weights", "seeds"):
            _check(self, name, bool, "name at least one")
        for name in ("methods", "bits", "weights", "seeds", "spread_bits"):
            _check(self, name, lambda values: len(set(values)) == len(values), "name each once")
        for name in ("bits", "spread_bits"):
            _check(
                self,
                name,
                lambda texts: all(map(parse_bits, texts)),
                "write each as W4A4KV4 or W4A8, 2 to 8 or 16 bits",
            )
        _check(self, "seeds", lambda seeds: min(seeds) >= 0, "use 0 or more")
        _check(self, "spread_seeds", lambda n: n >= 0, "use a number of seeds, or 0 for none")
