"""The run directory: the only state of a run. Every file in it appears whole or not at all.

config.yaml fingerprint.json metrics.jsonl events.jsonl results.json
rotations/step_000042.safetensors rotations/latest.json rotations/final.safetensors rotations/R.bin
layers/000.safetensors ... layers/ends.safetensors boundaries/010/0000.safetensors ...
baselines/NAME/layers/... logs/ export/FORMAT/ statistics/ tensorboard/ report.html report.md
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_spin.errors import UserError

HEADER = "dist_spin"  # the metadata entry of our safetensors files
CHECKPOINT = re.compile(r"step_(\d{6,})\.safetensors")


class CorruptFile(Exception):
    """A file's content does not match its own checksum, or cannot be parsed."""


class RunDir:
    """Paths of one run and the ways to write into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def rotations(self) -> Path:
        """Checkpoints and the finished rotations."""
        return self.path / "rotations"

    def layers(self, baseline: str = "") -> Path:
        """Quantised layers, of the learned rotations or of a named baseline."""
        return self.path / "baselines" / baseline / "layers" if baseline else self.path / "layers"

    def boundaries(self, baseline: str = "") -> Path:
        """Hidden states that enter the first layer of each job, beside the layers of the same variant."""
        return self.layers(baseline).with_name("boundaries")

    @property
    def export(self) -> Path:
        """Exported models, a directory per format."""
        return self.path / "export"

    @property
    def logs(self) -> Path:
        """What the jobs of a fan-out print, one file each."""
        return self.path / "logs"

    def event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl: what happened, when (Unix seconds), and any details."""
        append_line(self.path / "events.jsonl", {"event": kind, "time": round(time.time(), 3), **details})


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; fsynced and renamed onto `path` if the block succeeds, removed otherwise.

    Raises:
        UserError: the device is full, or the directory may not be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise user_error(error, path) from error
    except SafetensorError as error:  # safetensors reports a full disk as its own kind of error
        if "os error 28" in str(error) or "No space left" in str(error):
            raise user_error(OSError(errno.ENOSPC, "No space left on device"), path) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def sync_directory(path: Path) -> None:
    """Make renames in a directory outlive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def user_error(error: OSError, path: Path) -> UserError:
    """What went wrong while `path` was written, in a line for the user."""
    if error.errno == errno.ENOSPC or error.errno == errno.EDQUOT:
        return UserError(
            f"no space left on the device while writing {path}", "free some and start again: nothing is lost"
        )
    return UserError(f"{path} cannot be written ({error.strerror})", "check the directory and its permissions")


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line; short appends of one write are whole even with several writers."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(json.dumps(value) + "\n")
    except OSError as error:
        raise user_error(error, path) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, [] if there is none; a torn last line (a writer was killed) is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


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
    about = {"metadata": metadata, "sha256": _checksum(tensors, metadata)}
    with atomic(path) as temporary:
        # One entry, because safetensors writes several in an order that changes from process to process.
        save_file(tensors, temporary, {HEADER: json.dumps(about, sort_keys=True)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that `save_tensors` wrote.

    Raises:
        CorruptFile: it is torn, is no safetensors file, or its checksum does not match.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[HEADER])
            metadata, checksum = dict(about["metadata"]), about["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: cannot be read ({(str(error) or 'empty').splitlines()[0]})") from error
    if checksum != _checksum(tensors, metadata):
        raise CorruptFile(f"{path}: checksum does not match")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a file that `save_tensors` wrote, without reading its tensors; None if it is torn or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})[HEADER])["metadata"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    about = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(f"{tensors_digest(tensors)} {about}".encode()).hexdigest()


def checkpoint_path(run: RunDir, step: int) -> Path:
    """Where the state after `step` steps is kept."""
    return run.rotations / f"step_{step:06d}.safetensors"


def checkpoints(run: RunDir) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint file, newest first, whole or not."""
    if not run.rotations.is_dir():
        return []
    found = [(int(m[1]), p) for p in run.rotations.iterdir() if (m := CHECKPOINT.fullmatch(p.name))]
    return sorted(found, reverse=True)


def newest_checkpoint(run: RunDir, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The newest checkpoint that is whole; a damaged one is set aside, said through `warn`, and the one before it used."""
    for _, path in checkpoints(run):
        try:
            return load_tensors(path)
        except CorruptFile as error:
            aside = path.with_suffix(".corrupt")
            os.replace(path, aside)
            warn(f"{error}; kept as {aside.name}, using the checkpoint before it")
            run.event("checkpoint_corrupt", file=path.name, problem=str(error))
    return None


def prune_checkpoints(run: RunDir, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for _, path in checkpoints(run)[keep:]:
        path.unlink(missing_ok=True)


def check_fingerprint(path: Path, current: dict[str, Any], what: str) -> None:
    """Compare with the fingerprint of an earlier start, or write it if this is the first.

    Raises:
        UserError: a field differs; the message names it and both values.
    """
    if not path.exists():
        write_json(path, current)
        return
    before = json.loads(path.read_text())
    for field in sorted({*before, *current}):
        if before.get(field) != current.get(field):
            raise UserError(
                f"{what} was started with {field} = {before.get(field)!r} and now has {current.get(field)!r}",
                f"use another name= for a new run, or set {field} back",
            )
