"""Settings of processes and devices."""

from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import MAX_COUNT, MAX_LOCAL_PROCESSES, MAX_THREADS, check_path, check_range


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
    """With FSDP: processes that share one copy of the frozen weights (a divisor of all); 0: all. Fewer communicate less
    and need more memory."""
    threads: int = 0
    """CPU threads per process; 0 shares the cores evenly among the processes of this machine."""

    def __post_init__(self) -> None:
        check_range("distributed.nproc", self.nproc, 1, MAX_LOCAL_PROCESSES, "use 1 or more")
        check_range("distributed.timeout_s", self.timeout_s, 1, 30 * 24 * 3600, "use 1 or more")
        layers = "use a number of layers, or -1 to let memory decide"
        check_range("distributed.offload_layers", self.offload_layers, -1, MAX_COUNT, layers)
        check_path("distributed.offload_dir", self.offload_dir)
        processes = "use a number of processes, or 0 for all of them"
        check_range("distributed.shard_ranks", self.shard_ranks, 0, MAX_COUNT, processes)
        cores = "use a number, or 0 for an even share of the cores"
        check_range("distributed.threads", self.threads, 0, MAX_THREADS, cores)
