"""Files that appear whole or not at all, and JSON lines that several writers may append."""

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dist_spin.errors import UserError
from dist_spin.runtime.processes import began, machine

SUFFIX = ".tmp"
TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<began>\d+)-[0-9a-f]{8}" + re.escape(SUFFIX))
FOREIGN_AGE_S = 3600.0
_UMASK_READ = threading.Lock()  # by setting it: a second thread would read 0, and leave that behind


@contextlib.contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write to; fsynced and renamed onto `path` if the block succeeds, removed otherwise.

    durable: whether the file must outlive a crash of the machine. Without it nothing waits for the disk, and after a crash
    the file may be there with other content: for what has a checksum and can be made again.

    Raises:
        UserError: the device is full, or the directory may not be written.
    """
    temporary = path.with_name(f".{path.name}.{_writer()}-{uuid.uuid4().hex[:8]}{SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        if durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        raise user_error(error, path) from error
    except SafetensorError as error:  # safetensors reports a full disk as its own kind of error
        if number := re.search(r"os error (\d+)", str(error)):
            raise user_error(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _writer() -> str:
    """Names this process among those of all machines and times."""
    return f"{_machine()}-{os.getpid()}-{began(os.getpid())}"


def _machine() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files below `directory` of writers that were killed; those of living ones stay.

    Of a process of this machine it is known whether it lives. A writer elsewhere, or of before this machine was started
    again, counts as dead when its file was not written to for FOREIGN_AGE_S.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            if match := TEMPORARY.fullmatch(name):
                with contextlib.suppress(OSError):
                    file = Path(folder, name)
                    if match["machine"] == _machine():
                        dead = began(int(match["pid"])) != int(match["began"])
                    else:
                        dead = time.time() - file.stat().st_mtime > FOREIGN_AGE_S
                    if dead:
                        file.unlink()


def _umask() -> int:
    with _UMASK_READ:
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
    """Append one JSON line; short appends of one write are whole even with several writers.

    What a killed writer left of its line is ended first, so that it spoils no other.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            torn = stream.read(1) not in (b"", b"\n")
            stream.write(b"\n" * torn + json.dumps(value).encode() + b"\n")
    except OSError as error:
        raise user_error(error, path) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, [] if there is no file; lines that are torn or damaged are left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "check its permissions and the disk") from error
    lines = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):  # also of bytes that are no UTF-8
            value = parse_json(line.decode())
            if isinstance(value, dict):
                lines.append(value)
    return lines


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds half of a surrogate pair, which could not be written again.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value
