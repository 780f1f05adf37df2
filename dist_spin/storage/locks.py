"""One writer at a time: locks in the run directory that name their owner and expire soon after it has died.

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
from dist_spin.runtime.processes import began, identity, machine
from dist_spin.runtime.progress import long_step, warn
from dist_spin.storage.atomic import user_error

BEAT, PATIENCE = 5.0, 60.0  # seconds


class Held(UserError):
    """Another living process holds the lock."""


class Lock:
    """A context manager that holds `path` while its block runs.

    Raises (on entering):
        Held: its owner lives; the message says who it is.
        UserError: the directory cannot be written, or something else stands where the lock should.
    """

    def __init__(self, path: Path, what: str, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        """`what` is said of the owner, such as "optimize". beat, patience: seconds between touches; until a lock is dead."""
        self.path, self.what, self.beat, self.patience = path, what, beat, patience
        self.owner = {**here(), "what": what, "token": uuid.uuid4().hex, "since": round(time.time(), 3)}
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lock":
        try:
            self._enter()
        except OSError as error:
            raise user_error(error, self.path) from error
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

    def _enter(self) -> None:
        mine = self.path.with_name(f".{self.path.name}.{self.owner['token']}")
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # removed between the two looks that mkdir takes, unless it is no directory
                if self.path.parent.exists() and not self.path.parent.is_dir():
                    raise
            with contextlib.suppress(FileNotFoundError):  # whoever held it last removed the empty directory
                mine.write_text(json.dumps(self.owner))
                break
        try:
            self._acquire(mine)
            self._sweep(mine)
        finally:
            mine.unlink(missing_ok=True)

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
            ended = gone(owner)
            if owner.get("machine") == machine() and not ended:
                raise self._held(owner)
            if (ended or self._watch(mine, owner, touched)) and self._take_over(mine, owner):
                warn(f"took {self.path} over: its owner ({describe(owner)}) {'has ended' if ended else 'is silent'}")
                return

    def _held(self, owner: dict[str, Any]) -> Held:
        what = f"{self.path.parent.parent} is being written by another process ({describe(owner)})"
        return Held(what, "wait until it is done, or stop it; then start again")

    def _watch(self, mine: Path, owner: dict[str, Any], touched: float) -> bool:
        """Wait until the owner is seen alive (raises Held), or has been silent too long (True), or has let go (False)."""
        told = False
        while True:
            now, latest = server_time(mine), modified(self.path)
            if latest is None or read_owner(self.path).get("token") != owner.get("token"):
                return False
            if latest != touched:
                raise self._held(owner)
            if now - touched > self.patience:
                return True
            if not told:
                warn(
                    f"{self.path} is held ({describe(owner)}): waiting up to {self.patience:.0f} s for a sign of its owner"
                )
                told = True
            time.sleep(self.beat / 4)

    def _take_over(self, mine: Path, owner: dict[str, Any]) -> bool:
        """Replace a dead owner's lock. Of several that try, the one that makes the marker of that owner does."""
        token = owner.get("token")
        dead = token if isinstance(token, str) and token.isalnum() else "unknown"
        marker = self.path.with_name(f".{self.path.name}.{dead}.taken")
        try:
            os.link(mine, marker)
        except FileExistsError:
            self._remove_if_dead(mine, marker)
            time.sleep(self.beat / 4)
            return False
        try:
            if read_owner(self.path).get("token") != owner.get("token"):
                return False
            copy = mine.with_name(f"{mine.name}.new")
            copy.write_text(json.dumps(self.owner))  # not a link to `mine`: renaming onto a link of itself does nothing
            os.replace(copy, self.path)
            return True
        finally:
            marker.unlink(missing_ok=True)

    def _remove_if_dead(self, mine: Path, file: Path) -> None:
        """Remove the marker of a process that died before it was done."""
        holder, touched = read_owner(file), modified(file)
        if touched is None or not (gone(holder) or server_time(mine) - touched > self.patience):
            return
        # Renamed first, because only one process can: another one may have put its own marker there meanwhile.
        grave = mine.with_name(f"{mine.name}.dead")
        with contextlib.suppress(FileNotFoundError):
            os.rename(file, grave)
        if read_owner(grave).get("token") != holder.get("token"):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(grave, file)
        grave.unlink(missing_ok=True)

    def _sweep(self, mine: Path) -> None:
        """Remove what processes left that were killed while they asked for this lock."""
        for file in self.path.parent.glob(f".{self.path.name}.*"):
            if not file.name.startswith(mine.name):
                self._remove_if_dead(mine, file)

    def _keep(self) -> None:
        while not self._released.wait(self.beat):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                if read_owner(self.path).get("token") == self.owner["token"]:
                    os.utime(self.path)
                elif not self._released.is_set() and modified(self.path) is not None:
                    # We were suspended so long that another process took us for dead. Two writers would be worse than none.
                    print(
                        f"dist-spin: lost {self.path} to another process ({describe(read_owner(self.path))}); leaving",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(EXIT_HANG)


@contextlib.contextmanager
def exclusive(path: Path, what: str, *, beat: float = BEAT, patience: float = PATIENCE) -> Iterator[None]:
    """Hold `path` for a moment, such as to change a file; waits while another process does. beat, patience: as for Lock."""
    lock = Lock(path, what, beat=beat, patience=patience)
    with contextlib.ExitStack() as held:

        def entered() -> bool:
            try:
                held.enter_context(lock)
            except Held:
                return False
            return True

        if not entered():
            with long_step(f"wait for {what}, at which another process is"):
                while not entered():
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
        **identity(os.getpid()),
        **({"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}),
    }


def gone(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and is no more; of other machines nobody can tell."""
    pid = owner.get("pid")
    return owner.get("machine") == machine() and (not isinstance(pid, int) or began(pid) != owner.get("began"))


def describe(owner: dict[str, Any]) -> str:
    """Who holds a lock."""
    if "pid" not in owner:
        return "it does not say whom"
    job = f", Slurm job {owner['job']}" if "job" in owner else ""
    return f"{owner.get('what', 'unknown')}, process {owner.get('pid')} on {owner.get('host')}{job}"


def read_owner(path: Path) -> dict[str, Any]:
    """The owner written in a lock, {} if there is none or it says something else."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def modified(path: Path) -> float | None:
    """When a file was touched, seconds; None if it is not there. Opened first, so that NFS asks the server again.

    Raises:
        OSError: it is not a file that can be read.
    """
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None


def server_time(file: Path) -> float:
    """The time of the file server, seconds: it touches `file`, which is ours."""
    os.utime(file)
    return modified(file) or 0.0
