"""How much memory this host still has for us, which batch systems and containers may bound below what the machine has."""

import os
from collections.abc import Iterator
from pathlib import Path

# Per version of Linux control groups: what a group may use, what it uses, and how much of that are caches to be dropped.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def host_bytes_free(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken: the kernel's MemAvailable, or what the limits of this process's control groups leave.

    The physical memory where the kernel does not say. proc, cgroups: where these file systems are mounted.
    """
    try:
        with (proc / "meminfo").open(encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([available, *_left_by_limits(proc, cgroups)]))


def _left_by_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        top, (limit, used, cache) = (cgroups / "memory", V1) if controllers else (cgroups, V2)
        own = top / path.lstrip("/")
        for group in (own, *own.parents):  # each bounds those inside of it
            try:
                most = int((group / limit).read_text())  # v2 writes "max" for none
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield most - int((group / used).read_text()) + int(stat.get(cache, 0))
            except (OSError, ValueError):
                pass  # no such group where we are, or no limit
            if group == top:
                break
