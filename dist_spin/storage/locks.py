"""One writer at a time: locks in the run directory that say who holds them and outlive nobody for long.

A lock is a small file, made by `link`, which is atomic on NFS too. Its owner touches it every few seconds. Whoever wants a
lock that is held watches it: if it is touched, its owner lives; if it is not for `patience` seconds, or its process is seen to
be gone, it is taken over. Ages are differences between two times of the file server, so clocks need not agree.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from dist_spin.errors import EXIT_HANG, UserError
from dist_spin.runtime.processes import began, machine

BEAT, PATIENCE = 5.0, 60.0  # seconds


class Held(UserError):
    """Another living process holds the lock."""


class Lock:
    """A context manager that holds `path` while its block runs.

    Raises (on entering):
        Held: its owner lives; the message says who it is.
    """

    def __init__(self, path: Path, what: str, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        """`what` is said of the owner, such as "optimize". beat, patience: seconds between touches; until a lock is dead."""
        self.path, self.what, self.beat, self.patience = path, what, beat, patience
        self.owner = {**here(), "what": what, "token": uuid.uuid4().hex, "since": round(time.time(), 3)}
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lock":
        mine = self.path.with_name(f".{self.path.name}.{self.owner['token']}")
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # whoever held it last removed the empty directory
                mine.write_text(json.dumps(self.owner))
                break
        try:
            self._acquire(mine)
        finally:
            mine.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name=f"lock {self.path.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        assert self._thread is not None
        self._thread.join()
        if read_owner(self.path).get("token") == self.owner["token"]:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    def _acquire(self, mine: Path) -> None:
        while True:
            try:
                os.link(mine, self.path)
                return
            except FileExistsError:
                pass
            owner, touched = read_owner(self.path), modified(self.path)
            if touched is None:
                continue  # released in this moment
            if owner.get("machine") == machine() and not gone(owner):
                raise self._held(owner)
            dead = gone(owner) or self._watch(mine, owner, touched)
            if dead and self._take_over(mine, owner):
                return

    def _held(self, owner: dict[str, Any]) -> Held:
        what = f"{self.path.parent.parent} is being written by another process ({describe(owner)})"
        return Held(what, "let it end, or end it; then start again")

    def _watch(self, mine: Path, owner: dict[str, Any], touched: float) -> bool:
        """Wait until the owner is seen alive (raises Held), or has been silent too long (True), or has let go (False)."""
        while True:
            os.utime(mine)  # the file server's clock
            now = modified(mine)
            latest = modified(self.path)
            if latest is None or read_owner(self.path).get("token") != owner.get("token"):
                return False
            if latest != touched:
                raise self._held(owner)
            if now is not None and now - touched > self.patience:
                return True
            time.sleep(self.beat / 4)

    def _take_over(self, mine: Path, owner: dict[str, Any]) -> bool:
        """Replace a dead owner's lock. Of several that try, the one that makes the marker of that owner does."""
        marker = self.path.with_name(f".{self.path.name}.{owner.get('token', 'torn')}.taken")
        try:
            os.link(mine, marker)
        except FileExistsError:
            age = (modified(mine) or 0) - (modified(marker) or 0)
            if age > self.patience:
                marker.unlink(missing_ok=True)  # whoever made it died before it was done
            time.sleep(self.beat / 4)
            return False
        try:
            if read_owner(self.path).get("token") != owner.get("token"):
                return False
            copy = mine.with_suffix(".new")
            copy.write_text(json.dumps(self.owner))  # not a link to `mine`: renaming onto a link of itself does nothing
            os.replace(copy, self.path)
            return True
        finally:
            marker.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._released.wait(self.beat):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                if read_owner(self.path).get("token") == self.owner["token"]:
                    os.utime(self.path)
                elif not self._released.is_set() and modified(self.path) is not None:
                    # We slept so long that somebody took us for dead: two writers would be worse than one too few.
                    print(
                        f"dist-spin: lost {self.path} to another process ({describe(read_owner(self.path))}); leaving",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(EXIT_HANG)


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold `path` for a moment, such as to change a file; waits while another process does."""
    lock = Lock(path, what)
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock)
                break
            except Held:
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def stage_lock(run: Path, stage: str, part: str = "") -> Iterator[None]:
    """Be the one writer of a stage of a run, or of one `part` of it (a range of layers).

    Parts go on beside each other, but not beside the whole stage.

    Raises:
        Held: another living process writes the same.
    """
    directory = run / "locks"
    name = f"{stage}.{part}" if part else stage
    with Lock(directory / f"{name}.lock", name):
        others = [directory / f"{stage}.lock"] if part else sorted(directory.glob(f"{stage}.*.lock"))
        for other in others:
            if other.exists():
                with Lock(other, name):  # enters if its owner is dead
                    pass
        yield


def here() -> dict[str, Any]:
    """This process, in words for others and in numbers for itself."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": began(os.getpid()),
        "machine": machine(),
        **({"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}),
    }


def gone(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and is no more; of other machines nobody can tell."""
    return owner.get("machine") == machine() and began(owner["pid"]) != owner["began"]


def describe(owner: dict[str, Any]) -> str:
    """Who holds a lock."""
    job = f", Slurm job {owner['job']}" if "job" in owner else ""
    return f"{owner.get('what', 'unknown')}, process {owner.get('pid')} on {owner.get('host')}{job}"


def read_owner(path: Path) -> dict[str, Any]:
    """The owner written in a lock, {} if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def modified(path: Path) -> float | None:
    """When a file was touched, seconds; None if it is not there. Opened first, so that NFS asks the server again."""
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None
