"""Directories that appear whole or not at all, and safetensors shards written while further tensors come."""

import contextlib
import fnmatch
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.export.tokenizer import COPIED
from dist_spin.runtime.host_memory import host_bytes_free
from dist_spin.storage.atomic import atomic, sync_directory, user_error, write_json

FILES = "dist_spin/files.json"
OWN_FILES = (  # of exports before version 0.2, which have no list
    "README.md",
    "config.json",
    "dist_spin.json",
    "dist_spin/*.safetensors",
    "dist_spin/R.bin",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "consolidated.00.pth",
    "params.json",
)


def foreign_files(directory: Path) -> list[str]:
    """Files in the directory of an earlier export that it did not write, by their paths within.

    An export lists its files in `dist_spin/files.json`; of one that has no list, what is named as exports name their files
    is taken for its own.

    Raises:
        UserError: the directory cannot be read.
    """
    try:
        present = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
        listed = json.loads((directory / FILES).read_text()) if (directory / FILES).exists() else None
    except ValueError:
        listed = None
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror})", "check its permissions") from error
    if isinstance(listed, list):
        return [name for name in present if name not in listed]
    own = (*OWN_FILES, *COPIED)
    return [name for name in present if not any(_is_named(name, pattern) for pattern in own)]


def _is_named(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern folder by folder: unlike in `fnmatch`, no `*` stands for a `/`."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def list_files(directory: Path) -> None:
    """Write `dist_spin/files.json`: everything in a finished directory, so that what a user adds later is known as his."""
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()]
    write_json(directory / FILES, sorted({*names, FILES}))


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory `.NAME.partial` beside `target` to write into; renamed onto it if the block succeeds, else removed.

    What is at `target` before is removed when the new one is complete, and comes back where the renaming was cut off. One
    writer at a time: the caller holds a lock.

    Raises:
        UserError: the device is full, or the directory may not be written.
    """
    partial, before = (target.with_name(f".{target.name}.{what}") for what in ("partial", "before"))

    def clean_up() -> None:
        if before.exists() and not target.exists():
            os.replace(before, target)
        for leftover in (partial, before):
            shutil.rmtree(leftover, ignore_errors=True)

    try:
        clean_up()  # after a process that was killed
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if target.exists():
            os.replace(target, before)
        os.replace(partial, target)
        sync_directory(target.parent)
    except OSError as error:
        raise user_error(error, target) from error
    finally:
        clean_up()


MOST_WRITERS = 4  # files that are written at a time
HOST_SHARE = 0.4  # of the host's free memory that waiting and half-written files may take


class Shards:
    """Tensors of one checkpoint, written to `model-0000N-of-0000M.safetensors` by threads as soon as a file is full.

    Always with an index, which readers follow, so that other safetensors files may lie beside. Held are `limit` bytes (or one
    larger tensor), and as much again for each file that is being written: up to MOST_WRITERS, fewer or none beside the caller
    where the host has no memory for them. The files do not depend on that.

    A context: at its end no thread writes any more.
    """

    def __init__(self, directory: Path, limit: float) -> None:
        self.directory, self.limit = directory, limit
        self._held: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None  # of the newest tensor from a GPU
        self._file_of: dict[str, int] = {}
        self._files = self._total = self._held_bytes = 0
        # Pinned memory comes in powers of two, so that a file may take up to twice its size.
        self._writers = max(0, min(MOST_WRITERS, int(HOST_SHARE * host_bytes_free() / (2 * limit)) - 1))
        self._threads = ThreadPoolExecutor(max(1, self._writers), "shard-writer")
        self._written: deque[Future[None]] = deque()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; names are added once."""
        assert name not in self._file_of, f"{name} twice"
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.limit:
            self._write()
        self._held[name] = self._on_host(tensor.detach())
        self._file_of[name] = self._files + 1
        self._held_bytes += size
        self._total += size

    def finish(self) -> None:
        """Write what is held, give the files their names and write the index."""
        self._write()
        self._wait(0)

        def final(number: int) -> str:
            return f"model-{number:05d}-of-{self._files:05d}.safetensors"

        for number in range(1, self._files + 1):
            os.replace(self._path(number), self.directory / final(number))
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: final(number) for name, number in self._file_of.items()},
        }
        write_json(self.directory / "model.safetensors.index.json", index)

    def _on_host(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.contiguous()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.current_stream(tensor.device).record_event()
        return host

    def _write(self) -> None:
        self._files += 1
        held, copied, path = self._held, self._copied, self._path(self._files)
        self._held, self._held_bytes = {}, 0

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            with atomic(path) as temporary:
                save_file(held, temporary, {"format": "pt"})
            held.clear()

        self._wait(self._writers - 1)
        self._written.append(self._threads.submit(write))
        if not self._writers:
            self._wait(0)

    def _wait(self, most: int) -> None:
        """Until at most that many files are being written; raises what a thread has raised."""
        while len(self._written) > max(0, most):
            self._written.popleft().result()

    def _path(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"
