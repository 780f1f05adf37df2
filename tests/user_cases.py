"""Tiny checkpoints changed as a case says, and the one line that a refused stage prints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from exported import NO_HAD, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_spin.cli import main

Tensors = dict[str, Tensor]
WHOLE_WEIGHTS = ["quantize.method=none", "quant.w_bits=16"]  # nothing but activations, keys and values is quantised


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})


def configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def case(base: Path, directory: Path, change: Callable[[Path], object]) -> list[str]:
    """Settings of a run on the model that `change` has changed."""
    model = directory / "model"
    shutil.copytree(base / "mha", model)
    change(model)
    return [*settings(base, "mha", *NO_HAD), f"model.path={model}", f"output_dir={directory / 'runs'}"]


def refusal(capfd, stage: str, words: list[str], code: int = 2) -> str:
    """The only line that a refused stage prints."""
    capfd.readouterr()
    assert main([stage, *words]) == code
    printed = capfd.readouterr().err.strip().splitlines()
    (line,) = (line for line in printed if line.startswith("dist-spin:"))
    assert "Traceback" not in "".join(printed)
    return line
