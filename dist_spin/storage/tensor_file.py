"""Files of tensors with a checksum over their content, written atomically; a damaged one is set aside."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_spin.storage.atomic import atomic

Content = TypeVar("Content")
Identity = TypeVar("Identity")

FOREIGN = "was made from another model, rotation, data or setting"


def identity_hash(identity: dict[str, Any]) -> str:
    """A short hash of everything that decides a layer's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def set_aside(path: Path, problem: str, remedy: str, warn: Callable[[str], None]) -> None:
    """Rename a file that cannot be used to `NAME.stale`, saying so; another process may have done it first."""
    aside = path.with_suffix(".stale")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
    warn(f"{path} {problem}; kept as {aside.name}, {remedy}")


HEADER = "dist_spin"  # the metadata entry of our safetensors files


class CorruptFile(Exception):
    """A file's content does not match its own checksum, or cannot be parsed."""


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, written atomically, with a checksum of its tensors and metadata; equal content, equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"metadata": metadata, "sha256": _checksum(tensors, metadata)}
    with atomic(path) as temporary:
        # One entry, because safetensors writes several in an order that changes from process to process.
        save_file(tensors, temporary, {HEADER: json.dumps(header, sort_keys=True)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    Raises:
        CorruptFile: it is torn, is no safetensors file, or its checksum does not match.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            metadata, checksum = dict(header["metadata"]), header["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: cannot be read ({(str(error) or 'empty').splitlines()[0]})") from error
    if checksum != _checksum(tensors, metadata):
        raise CorruptFile(f"{path}: checksum does not match")
    return tensors, metadata


def load_if_current(
    path: Path,
    load: Callable[[Path], tuple[Content, Identity]],
    current: Callable[[Identity], bool],
    remedy: str,
    warn: Callable[[str], None],
) -> Content | None:
    """The content of a file of tensors that may be used as it is; None where it is missing.

    A damaged file and one that was made from something else are set aside as well, which `warn` is told.

    Args:
        load: reads the file into its content and what it was made from, such as a fingerprint or its metadata.
        current: whether a file that was made from this may be used.
        remedy: what the caller does without the file, as in "doing the layer again".
    """
    if not path.exists():
        return None
    try:
        content, identity = load(path)
        problem = "" if current(identity) else FOREIGN
    except CorruptFile as error:
        problem = str(error).removeprefix(f"{path}: ")
    if not problem:
        return content
    set_aside(path, problem, remedy, warn)
    return None


def read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a file that `save_tensors` wrote, without reading its tensors; None if it is torn or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})[HEADER])["metadata"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(f"{tensors_digest(tensors)} {text}".encode()).hexdigest()
