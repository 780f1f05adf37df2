"""Files that appear whole or not at all, and JSON lines that several writers may append."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dist_spin.errors import UserError


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
