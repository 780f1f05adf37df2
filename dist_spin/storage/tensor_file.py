"""Files of tensors with a checksum over their content, written atomically; a damaged one is set aside.

Checksums find accidents: torn writes, flipped bits, files that were mixed up. They are no defence against somebody who may write
the file, who could write its checksum too, of whatever kind. So they are XXH3, which is as fast as memory, of pieces that threads
read at once; the SHA-256 of earlier files took longer than all other reading, and is still checked where a file has it.
Fingerprints (`identity_hash`, `tensors_digest`) stay SHA-256: they are small, and stand in files of earlier versions.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from dist_spin.model.tensor_bytes import in_parallel, opened, pieces_of, read_header, read_into
from dist_spin.storage.atomic import atomic, parse_json

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
CHECKSUM, OLD_CHECKSUM = (
    "xxh3",
    "sha256",
)  # its entries that hold a checksum; files of version 0.2 and before have the second


class CorruptFile(Exception):
    """A file's content does not match its own checksum, or cannot be parsed."""


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(_heading(name, tensor).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, durable: bool = True) -> None:
    """One safetensors file, written atomically, with a checksum of its tensors and metadata; equal content, equal bytes.

    durable: as in `atomic`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    parts = [pieces_of(tensor) for tensor in tensors.values()]
    seen = iter(in_parallel(lambda piece: _piece_checksum(piece.numpy().data), [p for ps in parts for p in ps]))
    of_pieces = {name: [next(seen) for _ in pieces] for name, pieces in zip(tensors, parts, strict=True)}
    header = {"metadata": metadata, CHECKSUM: _checksum(tensors, of_pieces, metadata)}
    with atomic(path, durable=durable) as temporary:
        # One entry, because safetensors writes several in an order that changes from process to process.
        save_file(tensors, temporary, {HEADER: json.dumps(header, sort_keys=True)})


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on `device`, and metadata of a file that `save_tensors` wrote.

    Raises:
        CorruptFile: it is torn, is no safetensors file, or its checksum does not match.
    """
    try:
        with opened(path) as descriptor:
            entries, ranges = read_header(descriptor)
            header = parse_json(entries[HEADER])
            metadata, of_old = dict(header["metadata"]), header.get(OLD_CHECKSUM)
            expected = header[CHECKSUM] if of_old is None else of_old
            place = device if of_old is None else "cpu"
            tensors = {name: torch.empty(r.shape, dtype=r.dtype, device=place) for name, r in ranges.items()}
            wanted = [(r.offset, tensors[name]) for name, r in ranges.items()]
            seen = read_into(descriptor, wanted, _piece_checksum if of_old is None else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path}: cannot be read ({(str(error) or 'empty').splitlines()[0]})") from error
    if of_old is None:
        found = _checksum(tensors, dict(zip(ranges, seen, strict=True)), metadata)
    else:
        found = _old_checksum(tensors, metadata)
    if expected != found:
        raise CorruptFile(f"{path}: checksum does not match")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


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
        with opened(path) as descriptor:
            return dict(parse_json(read_header(descriptor)[0][HEADER])["metadata"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _heading(name: str, tensor: Tensor) -> str:
    return f"{name}:{tensor.dtype}:{tuple(tensor.shape)};"


def _piece_checksum(piece: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(piece)


def _checksum(tensors: dict[str, Tensor], of_pieces: dict[str, list[str]], metadata: dict[str, str]) -> str:
    """Over names, dtypes, shapes, the checksums of each tensor's pieces (`tensor_bytes.pieces_of`), and metadata."""
    lines = [_heading(name, tensors[name]) + ",".join(of_pieces[name]) for name in sorted(tensors)]
    return xxhash.xxh3_128_hexdigest("\n".join([*lines, json.dumps(metadata, sort_keys=True)]).encode())


def _old_checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(f"{tensors_digest(tensors)} {text}".encode()).hexdigest()
