"""One file per quantised decoder layer: codes, scales, what was left alone, where it came from and how good it is."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.numerics.gptq import Solution
from dist_spin.numerics.quantizer import dequantize_weight, pack_int4, unpack_int4
from dist_spin.rundir import CorruptFile, load_tensors, save_tensors

FOREIGN = "was made from another model, rotation, data or setting"


@dataclass
class QuantizedLayer:
    """A decoder layer after quantisation.

    solutions: linear (`self_attn.q_proj`, ...) -> codes and scales. others: remaining parameters (biases, q/k norms, and the
    layer norms of a model that was not rotated) by their names within the layer. figures: per linear, `error` (relative
    output error), `rtn_error` (the same for rounding to nearest) and `damping`.
    """

    solutions: dict[str, Solution]
    others: dict[str, Tensor]
    figures: dict[str, dict[str, float]]
    bits: int
    symmetric: bool
    group_size: int

    def weights(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """All parameters by their names within the layer, dequantised."""
        out = {name: tensor.to(device, dtype) for name, tensor in self.others.items()}
        for role, solution in self.solutions.items():
            codes, scale, zero = (t.to(device) for t in solution)
            out[f"{role}.weight"] = dequantize_weight(codes, scale, zero, self.group_size, dtype)
        return out


def layer_path(directory: Path, index: int) -> Path:
    """Where layer `index` is kept."""
    return directory / f"{index:03d}.safetensors"


def identity_hash(identity: dict[str, Any]) -> str:
    """A short hash of everything that decides a layer's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def save_layer(path: Path, layer: QuantizedLayer, fingerprint: str) -> None:
    """Write one layer, atomically and with a checksum; 4-bit codes are packed two to a byte."""
    tensors = dict(layer.others)
    for role, solution in layer.solutions.items():
        packed = layer.bits == 4 and solution.codes.shape[-1] % 2 == 0
        tensors[f"{role}.packed" if packed else f"{role}.codes"] = (
            pack_int4(solution.codes) if packed else solution.codes
        )
        tensors[f"{role}.scale"] = solution.scale
        if not layer.symmetric:
            tensors[f"{role}.zero"] = solution.zero
    about = {"bits": layer.bits, "symmetric": layer.symmetric, "group_size": layer.group_size, "figures": layer.figures}
    save_tensors(path, tensors, {"fingerprint": fingerprint, "name": path.name, "layer": json.dumps(about)})


def load_layer(path: Path) -> tuple[QuantizedLayer, str]:
    """A layer and the fingerprint it was made under.

    Raises:
        CorruptFile: see `rundir.load_tensors`; or it is no layer file.
    """
    tensors, metadata = load_tensors(path)
    if "layer" not in metadata or metadata["name"] != path.name:
        raise CorruptFile(f"{path}: is the file {metadata.get('name')} of something else")
    about = json.loads(metadata["layer"])
    solutions, others = {}, {}
    for name, tensor in tensors.items():
        role, _, kind = name.rpartition(".")
        if kind in ("packed", "codes"):
            codes = unpack_int4(tensor, about["symmetric"]) if kind == "packed" else tensor
            scale = tensors[f"{role}.scale"]
            solutions[role] = Solution(codes, scale, tensors.get(f"{role}.zero", torch.zeros_like(scale)))
        elif kind in ("weight", "bias"):
            others[name] = tensor
    return QuantizedLayer(solutions, others, **{k: about[k] for k in ("figures", "bits", "symmetric", "group_size")}), (
        metadata["fingerprint"]
    )


def finished_layer(path: Path, fingerprint: str, warn: Callable[[str], None]) -> QuantizedLayer | None:
    """The layer at `path` if it is whole and was made under `fingerprint`; anything else is set aside, saying so."""
    if not path.exists():
        return None
    try:
        layer, made_under = load_layer(path)
        problem = "" if made_under == fingerprint else FOREIGN
    except CorruptFile as error:
        problem = str(error).removeprefix(f"{path}: ")
    if not problem:
        return layer
    set_aside(path, problem, "doing the layer again", warn)
    return None


def set_aside(path: Path, problem: str, remedy: str, warn: Callable[[str], None]) -> None:
    """Rename a file that cannot be used to `NAME.stale`, saying so; another process may have done it first."""
    aside = path.with_suffix(".stale")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
    warn(f"{path} {problem}; kept as {aside.name}, {remedy}")
