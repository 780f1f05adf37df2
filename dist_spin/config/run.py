"""The run's settings: one dataclass per component, checked as soon as they are built.

`dist-spin VERB --help` prints the docstrings below; `dist_spin.config` reads them from files and the command line.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from dist_spin.config.checks import _check
from dist_spin.config.compare import CompareConfig, MethodsConfig
from dist_spin.config.evaluate import EvaluateConfig, ReportConfig
from dist_spin.config.model import ModelConfig, QuantConfig, RotationConfig
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.quantize import ExportConfig, QuantizeConfig


@dataclass(frozen=True)
class DistributedConfig:
    """distributed (processes and devices)."""

    nproc: int = 1
    """Processes that `dist-spin run` starts on this machine; torchrun and Slurm set their own number."""
    timeout_s: int = 600
    """Seconds that a process waits for the others before it gives up; above the slowest step and model load."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes CUDA where there is one."""
    offload_layers: int = -1
    """Decoder layers whose weights stay in host memory while rotations are learned; -1: as many as do not fit on the GPU, or
    more where that makes a step shorter."""
    offload_dir: str | None = None
    """With DeepSpeed: a directory on a fast local disk that holds the weights of those layers instead of host memory."""
    engine: Literal["auto", "fsdp", "deepspeed"] = "auto"
    """What shards the frozen weights: FSDP2 or DeepSpeed ZeRO-3, with the same results, so that a run may change it;
    auto: as accelerate's config says under `accelerate launch`, fsdp elsewhere."""
    shard_ranks: int = 0
    """With FSDP: processes that share one copy of the frozen weights (a divisor of all); 0: all. Fewer gather less, and
    need more memory."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores evenly among the processes of this machine."""

    def __post_init__(self) -> None:
        _check(self, "nproc timeout_s", lambda n: n >= 1, "use 1 or more")
        _check(self, "offload_layers", lambda n: n >= -1, "use a number of layers, or -1 to let memory decide")
        _check(self, "shard_ranks", lambda n: n >= 0, "use a number of processes, or 0 for all of them")
        _check(self, "threads", lambda n: n >= 0, "use a number, or 0 for an even share of the cores")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run."""

    name: str = "run"
    """Name of the run: its directory under output_dir."""
    output_dir: str = "runs"
    """Directory that holds the runs."""
    model: ModelConfig
    rotation: RotationConfig = field(default_factory=RotationConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        if self.quant.arithmetic == "auto":  # before anything reads it; a run keeps it when its target changes
            target = self.export.target
            arithmetic = target if target == "compressed-tensors" else "fp32"
            object.__setattr__(self, "quant", replace(self.quant, arithmetic=arithmetic))
        name = "use a plain directory name; output_dir says where it lies"
        _check(self, "name", lambda text: text not in ("", ".", "..") and "/" not in text, name)
