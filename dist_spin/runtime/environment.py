"""Where a stage runs and with what: hosts, devices, versions, commit. Named fields only, so that no secret slips in."""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_spin.runtime.distributed import World

PACKAGES = ("dist-spin", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "submitit")
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_PARTITION", "SLURM_RESTART_COUNT")


def environment(world: World) -> dict[str, Any]:
    """What a stage notes of where it runs; every rank calls it, and all get the same hosts and devices."""
    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else platform.machine() + " CPU"
    per_rank: list[Any] = [None] * world.size
    dist.all_gather_object(per_rank, (os.environ.get("SLURMD_NODENAME", socket.gethostname()), device))
    return {
        "ranks": world.size,
        "hosts": sorted({host for host, _ in per_rank}),
        "devices": sorted({name for _, name in per_rank}),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "slurm": {name.removeprefix("SLURM_").lower(): os.environ[name] for name in SLURM if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of this code, with "+" if files were changed since; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
