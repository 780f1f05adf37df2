"""Tensors out of safetensors files at the speed of the page cache, or of the disk.

A mapped file is read page by page, by one thread. Here ranges are cut into pieces that several threads read at once; on the
way to a GPU a piece waits in pinned memory and is copied while the next ones are read.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20
MOST_READERS = 8  # more threads than that gain nothing from the page cache
LARGEST_HEADER = 100_000_000  # bytes; safetensors takes no larger one either
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by the names that safetensors gives them


class TensorRange(NamedTuple):
    """Where a tensor lies: `offset` bytes after the beginning of the file, contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file to read from.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_header(descriptor: int) -> tuple[dict[str, str], dict[str, TensorRange]]:
    """Metadata of a safetensors file, and where each of its tensors lies; those of dtypes that we do not read are left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file, or is cut off.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    begin = 8 + length
    if size < 8 or begin > size or length > LARGEST_HEADER:
        raise ValueError("it is cut off, or no safetensors file")
    try:
        header: Any = json.loads(os.pread(descriptor, length, 8).decode("utf-8"))
        metadata = dict(header.pop("__metadata__", {}))
        ranges = {name: _range(entry, begin) for name, entry in header.items() if entry["dtype"] in DTYPES}
        end = max((begin + entry["data_offsets"][1] for entry in header.values()), default=begin)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({str(error)[:80]})") from error
    if end != size:
        raise ValueError("it is cut off" if end > size else "it is longer than its header says")
    return metadata, ranges


def _range(entry: dict[str, Any], begin: int) -> TensorRange:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    count = dtype.itemsize
    for length in shape:
        count *= length
    if not (0 <= first <= last and last - first == count and all(length >= 0 for length in shape)):
        raise ValueError("a tensor's place does not fit its shape")
    return TensorRange(dtype, shape, begin + first)


def pieces_of(tensor: Tensor) -> list[Tensor]:
    """A contiguous tensor as bytes, in pieces of PIECE_BYTES; the last is shorter. Views, in order."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return list(flat.split(PIECE_BYTES)) if len(flat) else []


def in_parallel(action: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """`action` of each piece's arguments, by several threads where there are several pieces; raises what it raises."""
    count = len(arguments[0])
    if count < 2:
        return list(map(action, *arguments))
    with ThreadPoolExecutor(min(count, MOST_READERS, len(os.sched_getaffinity(0))), "pieces") as readers:
        return list(readers.map(action, *arguments))


def read_into(
    descriptor: int, wanted: Sequence[tuple[int, Tensor]], look: Callable[[memoryview], Any] | None = None
) -> list[list[Any]]:
    """Fill tensors from a file.

    On a GPU the copies are queued on the stream that is current for the caller.

    Args:
        wanted: (offset in bytes, tensor to fill), contiguous tensors of one device.
        look: called with every piece in host memory, by several threads.

    Returns:
        What `look` gave for the pieces of each tensor, in order.

    Raises:
        OSError: it cannot be read.
        ValueError: it is shorter than that.
    """
    targets = [pieces_of(tensor) for _, tensor in wanted]
    places = [
        offset + k * PIECE_BYTES for (offset, _), parts in zip(wanted, targets, strict=True) for k in range(len(parts))
    ]
    flat = [piece for parts in targets for piece in parts]
    on_gpu = bool(flat) and flat[0].is_cuda
    stream = torch.cuda.current_stream(flat[0].device) if on_gpu else None

    def read(place: int, target: Tensor) -> Any:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            host = torch.empty(len(target), dtype=torch.uint8, pin_memory=True) if on_gpu else target
            buffer = host.numpy().data
            filled = 0
            while filled < len(buffer):
                count = os.preadv(descriptor, [buffer[filled:]], place + filled)
                if not count:
                    raise ValueError("it is cut off")
                filled += count
            seen = None if look is None else look(buffer)
            if on_gpu:
                target.copy_(host, non_blocking=True)
            return seen

    seen = iter(in_parallel(read, places, flat))
    return [[next(seen) for _ in parts] for parts in targets]
