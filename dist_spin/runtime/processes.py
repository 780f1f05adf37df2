"""Processes of this machine: which they are, whether they live, and how they ended; read from /proc."""

import os
from pathlib import Path
from typing import NamedTuple


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


def children() -> list[int]:
    """The process ids of this process's children."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]
