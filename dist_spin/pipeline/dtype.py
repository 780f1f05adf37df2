"""Which number format a run computes in: what its settings say, or for `model.dtype=auto` what it was started with.

A run that starts takes bfloat16 where the device computes it fast, and float32 elsewhere. The resolved name stands in the run's
fingerprint and config.yaml, so that the run keeps it on any other machine.
"""

import dataclasses
import typing
from typing import Any

import torch

from dist_spin.config.model import ModelConfig
from dist_spin.config.run import RunConfig
from dist_spin.config.yaml_text import read_yaml
from dist_spin.errors import UserError
from dist_spin.runtime.cpu_features import bf16_is_fast
from dist_spin.runtime.distributed import World, on_rank0
from dist_spin.runtime.progress import say
from dist_spin.storage.checked_json import read_json
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import CorruptFile

AUTO = "auto"
NAMES = tuple(name for name in typing.get_args(ModelConfig.__annotations__["dtype"]) if name != AUTO)


def dtype_name(config: RunConfig) -> str:
    """The number format of weights and compute by its torch name, such as "bfloat16".

    Stages get it resolved (`resolve_dtype`); where `config` still says auto, each process asks for itself.
    """
    if config.model.dtype != AUTO:
        return config.model.dtype
    return started_dtype(config) or fast_dtype(config.distributed.device)


def resolve_dtype(config: RunConfig, world: World) -> RunConfig:
    """`config` with `model.dtype=auto` replaced by the name that rank 0 finds; every rank calls it."""
    if config.model.dtype != AUTO:
        return config
    name = on_rank0(lambda: dtype_name(config))
    if world.is_rank0 and not started_dtype(config):
        why = "this device computes it fast" if name == "bfloat16" else "bfloat16 would be slower on this device"
        say(f"model.dtype=auto: {name}, since {why}")
    resolved: Any = name  # one of the names that the setting takes
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=resolved))


def started_dtype(config: RunConfig) -> str:
    """What the run was started with, by its fingerprint or its config.yaml; "" where neither says."""
    run = run_dir(config).path
    try:
        name = read_json(run / "fingerprint.json")["model.dtype"]
    except (CorruptFile, LookupError, TypeError):
        name = None
    if name not in NAMES and (run / "config.yaml").exists():
        try:
            name = read_yaml(str(run / "config.yaml"))["model"]["dtype"]
        except (UserError, OSError, ValueError, LookupError, TypeError):
            name = None
    return name if name in NAMES else ""


def fast_dtype(device: str) -> str:
    """bfloat16 where `device` (auto, cpu or cuda) computes it fast, else float32."""
    if device != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bf16_is_fast()
    return "bfloat16" if fast else "float32"
