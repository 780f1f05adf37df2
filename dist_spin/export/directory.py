"""Directories that appear whole or not at all, and safetensors shards written as their tensors come."""

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.export.tokenizer import COPIED
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
    return [name for name in present if not any(fnmatch.fnmatch(name, pattern) for pattern in own)]


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


class Shards:
    """Tensors of one checkpoint, written to `model-0000N-of-0000M.safetensors` as soon as a file is full.

    Always with an index, which readers follow, so that other safetensors files may lie beside. No more than `limit` bytes
    (or one larger tensor) are held.
    """

    def __init__(self, directory: Path, limit: float) -> None:
        self.directory, self.limit = directory, limit
        self._held: dict[str, Tensor] = {}
        self._file_of: dict[str, int] = {}
        self._files = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; names are added once."""
        assert name not in self._file_of, f"{name} twice"
        size = tensor.numel() * tensor.element_size()
        if self._held and sum(t.numel() * t.element_size() for t in self._held.values()) + size > self.limit:
            self._write()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._file_of[name] = self._files + 1
        self._total += size

    def finish(self) -> None:
        """Write what is held, give the files their names and write the index."""
        self._write()

        def final(number: int) -> str:
            return f"model-{number:05d}-of-{self._files:05d}.safetensors"

        for number in range(1, self._files + 1):
            os.replace(self._path(number), self.directory / final(number))
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: final(number) for name, number in self._file_of.items()},
        }
        write_json(self.directory / "model.safetensors.index.json", index)

    def _write(self) -> None:
        self._files += 1
        with atomic(self._path(self._files)) as temporary:
            save_file(self._held, temporary, {"format": "pt"})
        self._held = {}

    def _path(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"
