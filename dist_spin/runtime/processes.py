"""Processes of this machine: which they are, whether they live, how they ended (read from /proc), and which die together."""

import ctypes
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from dist_spin.errors import EXIT_HANG


class ProcessStat(NamedTuple):
    """What the kernel tells of a process (proc(5), /proc/PID/stat)."""

    state: str  # R, S, D, T; Z has ended and nobody has waited for it; X is going
    began: int  # clock ticks since boot: with the process id, it names a process for good
    wait_status: int  # as `os.waitpid` would return it; 0 while the process runs

    @property
    def ended(self) -> bool:
        """Whether it runs no more, even if its parent has not asked for its exit code yet."""
        return self.state in "ZX"


def process_stat(pid: int) -> ProcessStat | None:
    """The figures of a process; None if there is none of that number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()  # the program's name stands in parentheses and may hold anything
    return ProcessStat(fields[0].decode(), int(fields[19]), int(fields[49]))


def began(pid: int) -> int | None:
    """When a living process began, in clock ticks since boot; None if it has ended."""
    stat = process_stat(pid)
    return None if stat is None or stat.ended else stat.began


def machine() -> str:
    """Names this boot of this machine and its process ids; two containers differ."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from every other one: {"pid", "began", "machine"}."""
    return {"pid": pid, "began": began(pid), "machine": machine()}


def children() -> list[int]:
    """The process ids of this process's children."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


PARENT = "DIST_SPIN_PARENT"  # in the environment of a process: its launcher's process id
PR_SET_PDEATHSIG = 1  # prctl(2)
LISTENING_SOCKET = "DIST_SPIN_LISTENING_SOCKET"  # where ranks meet: the descriptor that rank 0 inherits; -1 for others

TURN = "DIST_SPIN_TURN"  # of a process that is started before its turn: the descriptor that has a byte for it when it may begin


def wait_for_turn() -> None:
    """Return when the launcher lets this process begin, at once if it was not started before its turn; may end the process."""
    descriptor = os.environ.pop(TURN, "")
    if descriptor:
        may_begin = os.read(int(descriptor), 1)
        os.close(int(descriptor))
        if not may_begin:  # the launcher has left
            os._exit(EXIT_HANG)


def dependent_environment() -> dict[str, str]:
    """What a launcher adds to the environment of the processes that are not to outlive it (see `die_with_parent`)."""
    return {PARENT: str(os.getpid())}


def die_with_parent() -> None:
    """Have the kernel kill this process when the launcher dies that started it and said so; called first of all.

    What runs on without its launcher would hold the run's locks, and nobody would pass a signal on to it.
    """
    parent = os.environ.pop(PARENT, "")
    if parent:
        kill_when_parent_dies()
        if os.getppid() != int(parent):  # it died before the kernel was asked
            os._exit(EXIT_HANG)


def kill_when_parent_dies() -> None:
    """Have the kernel send SIGKILL to this process when the thread that started it has ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
