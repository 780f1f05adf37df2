"""Rotation files that people exchange: ours (safetensors) and the published `R.bin` naming."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.numerics.cayley import is_orthogonal, orthogonality_error
from dist_spin.storage.atomic import atomic
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import HEADER, load_tensors, read_metadata, save_tensors, set_aside

R2_NAME = "model.layers.{}.self_attn.R2"
KNOWN = re.compile(r"R1|R2|model\.layers\.\d+\.self_attn\.R2|clip|scale\.\w+")  # names of tensors in a rotation file
FINAL = "final.safetensors"
CLIP_BITS = "clip_bits"  # in the metadata, as JSON


def save_final(
    run: RunDir,
    r1: Tensor,
    r2: Tensor,
    metadata: dict[str, str],
    transforms: dict[str, Tensor] | None = None,
    bits: dict[str, int] | None = None,
) -> None:
    """Write rotations/final.safetensors (R1 [h, h], R2 [layers, d, d], learned `transforms`) and R1, R2 as R.bin (fp32).

    Block-diagonal ones are the blocks alone, [h / b, b, b] and [layers, d / b, b, b]; in R.bin whole matrices, as others read it.

    bits: of activations ("a"), keys ("k") and values ("v") that clips among the transforms were learned at, if known.
    """
    if bits:
        metadata = {**metadata, CLIP_BITS: json.dumps(bits)}
    _save_r_bin(run, r1, r2)
    # Last, because its presence says that learning is complete.
    save_tensors(run.rotations / FINAL, {"R1": r1, "R2": r2, **(transforms or {})}, metadata)


def _published(r1: Tensor, r2: Tensor) -> dict[str, Tensor]:
    """R1 and R2 as whole matrices in fp32 under the published names."""
    whole = {"R1": r1, **{R2_NAME.format(i): r for i, r in enumerate(r2)}}
    return {
        name: torch.block_diag(*r).float().cpu() if r.dim() == 3 else r.float().cpu().clone()
        for name, r in whole.items()
    }


def _save_r_bin(run: RunDir, r1: Tensor, r2: Tensor) -> None:
    buffer = io.BytesIO()  # torch's own writer says nothing of why a file cannot be written, and names it in its bytes
    torch.save(_published(r1, r2), buffer)
    with atomic(run.rotations / "R.bin") as temporary:
        temporary.write_bytes(buffer.getbuffer())


def finished_rotations(run: RunDir, warn: Callable[[str], None]) -> bool:
    """Whether the run has its final rotations. Damaged ones are set aside, saying so; R.bin is made again where it needs it."""
    path = run.rotations / FINAL
    if not path.exists():
        return False
    try:
        tensors = _read(path)
        r1, r2 = tensors["R1"], tensors["R2"]
    except Exception as error:  # the parsers of a damaged file raise many kinds
        problem = str(error).removeprefix(f"{path}: ").splitlines() or ["cannot be read"]
        set_aside(path, problem[0], "making it again from the newest checkpoint", warn)
        return False
    restore_r_bin(run, r1, r2, warn)
    return True


def learned_steps(run: RunDir, warn: Callable[[str], None]) -> int | None:
    """The steps after which the run's final rotations were written; None without them. `warn` as `finished_rotations`."""
    if not finished_rotations(run, warn):
        return None
    metadata = read_metadata(run.rotations / FINAL) or {}
    return int(metadata["step"]) if metadata.get("step", "").isdecimal() else None


def restore_r_bin(run: RunDir, r1: Tensor, r2: Tensor, warn: Callable[[str], None]) -> None:
    """Write R.bin again if it does not hold these R1 [h, h] and R2 [layers, d, d], or their blocks, in fp32."""
    path = run.rotations / "R.bin"
    expected = _published(r1, r2)
    try:
        stored = _read(path)
        whole = stored.keys() == expected.keys() and all(torch.equal(stored[name], r) for name, r in expected.items())
    except Exception:  # as above
        whole = False
    if not whole:
        warn(f"{path} is {'damaged' if path.exists() else 'missing'}; making it again from {FINAL}")
        _save_r_bin(run, r1, r2)


def _read(path: Path) -> Any:
    """What a file holds; one that carries our checksum is held to it."""
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    with safe_open(path, framework="pt") as file:
        ours = HEADER in (file.metadata() or {})
    return load_tensors(path)[0] if ours else load_file(path)


def load_rotations(path: Path, hidden: int, head_dim: int, layers: int) -> tuple[Tensor, Tensor]:
    """R1 [hidden, hidden] and R2 [layers, head_dim, head_dim], fp64, from a .safetensors file of ours or an `R.bin`.

    Of block-diagonal ones the blocks [k, b, b] and [layers, k, b, b], where the file has them so.

    Raises:
        UserError: the file is missing, unreadable, not orthogonal, or belongs to a model of another size.
    """
    remedy = "`dist-spin optimize` of that run makes it again" if path.name == FINAL else "check rotation.load"
    if not path.is_file():
        raise UserError(f"rotation file {path} does not exist", "check rotation.load")
    try:
        tensors = _read(path)
        if not isinstance(tensors, dict):
            raise TypeError(f"it holds a {type(tensors).__name__}")
        r1 = tensors["R1"]
        r2 = tensors["R2"] if "R2" in tensors else torch.stack([tensors[R2_NAME.format(i)] for i in range(layers)])
        count = sum(name.endswith(".R2") for name in tensors) or len(r2)
        shapes = tuple(r1.shape), tuple(r2.shape)
        unknown = sorted(str(name) for name in tensors if not KNOWN.fullmatch(str(name)))
        if unknown:
            raise ValueError(f"it holds {unknown[0]}, which is no rotation, scale or clip")
        r1, r2 = (_plain(r) for r in (r1, r2))
    except Exception as error:  # a file of somebody else may hold anything
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        if problem.startswith("Weights only"):  # torch's advice is to run what is in the file
            problem = "torch.load reads no tensors in it"
        raise UserError(f"{path} is not a rotation file for {layers} layers ({problem})", remedy) from error
    sizes = hidden, head_dim
    if count != layers or any(not _turns(r, n) for r, n in zip((shapes[0], shapes[1][1:]), sizes, strict=True)):
        raise UserError(
            f"{path} holds R1 {shapes[0]} and {count} R2 {shapes[1][1:]}, "
            f"but this model needs R1 {(hidden, hidden)} and {layers} R2 {(head_dim, head_dim)}",
            "it was made for another model",
        )
    for name, r in (("R1", r1), ("R2", r2)):
        if not is_orthogonal(r, 1e-2):
            off = float(orthogonality_error(r))
            raise UserError(f"{path}: {name} is not orthogonal (error {off:.1e})", "check rotation.load")
    return r1, r2


def _turns(shape: tuple[int, ...], n: int) -> bool:
    """Whether a rotation of this shape, whole [n, n] or in blocks [k, b, b], turns n channels."""
    if len(shape) == 3:
        return shape[0] * shape[1] == n and shape[1] == shape[2]
    return shape == (n, n)


def _plain(r: Tensor) -> Tensor:
    """r as fp64 numbers on the CPU.

    Raises:
        ValueError: it is sparse, quantised, complex or without content.
    """
    if r.layout != torch.strided or r.is_quantized or not r.is_floating_point() or r.device.type != "cpu":
        kind = "quantised" if r.is_quantized else r.dtype if r.layout == torch.strided else r.layout
        raise ValueError(
            f"it holds a tensor of type {str(kind).removeprefix('torch.')} on {r.device}, not plain numbers"
        )
    return r.detach().double()


def load_transforms(path: Path) -> dict[str, Tensor]:
    """Learned scales (`scale.NAME`) and clip ratios (`clip`) of a rotation file of ours, each [layers, ...], fp64."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        learned = [name for name in file.keys() if name == "clip" or name.startswith("scale.")]  # noqa: SIM118 (no dict)
    if not learned:  # nothing to read a large R1 again for
        return {}
    tensors = _read(path)
    return {name: tensors[name].double() for name in learned}


def clip_bits(path: Path) -> dict[str, int] | None:
    """The bits that the clips of a rotation file were learned at (see `save_final`); None if it does not say."""
    bits = (read_metadata(path) or {}).get(CLIP_BITS)
    return json.loads(bits) if bits else None
