"""Who is at work on a run: the processes that hold its locks, as the files in locks/ name them. Nothing is written."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_spin.runtime.processes import machine
from dist_spin.storage.checked_json import Kind, has_entries, is_count, is_duration, is_text, optional
from dist_spin.storage.locks import PATIENCE, gone, modified, read_owner

ALIVE, ENDED, ELSEWHERE, SILENT = "alive", "ended", "elsewhere", "silent"
LAUNCHERS = ("run", "fan-out")  # whose signal handlers pass a signal on to the stages that they have started

OWNER: dict[str, Kind] = {  # what `locks.here` writes
    **dict.fromkeys(("what", "host", "machine"), is_text),
    "pid": is_count,
    "began": is_count,
    "since": is_duration,
    "job": optional(is_text),
}


@dataclass(frozen=True)
class Holder:
    """A process that holds locks of a run.

    what: names of the locks, such as "optimize" or "quantize.000-010". host, pid, began, machine: which process
    (`locks.here`). job: its Slurm job, or "". since: Unix time at which it took the first. state: ALIVE or ENDED on this
    machine; of a process on another one, ELSEWHERE if it has touched its lock lately by this machine's clock, else SILENT.
    """

    what: tuple[str, ...]
    host: str
    pid: int
    began: int
    machine: str
    job: str
    since: float
    state: str

    @property
    def at_work(self) -> bool:
        """Whether it lives, as far as anybody can tell from here."""
        return self.state in (ALIVE, ELSEWHERE)

    @property
    def launches(self) -> bool:
        """Whether it starts stages in processes of their own, and passes signals on to them."""
        return any(name in LAUNCHERS for name in self.what)

    def public(self) -> dict[str, Any]:
        """What `status --json` tells of it."""
        names = ("host", "pid", "job", "since", "state")
        return {"what": list(self.what), **{name: value for name, value in asdict(self).items() if name in names}}

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{', '.join(self.what)}, process {self.pid} on {self.host}{job}"


def holders(run_path: Path) -> list[Holder]:
    """The processes that hold locks of a run, those that came first first; locks that do not say whose they are, are left out."""
    found: dict[tuple[str, int, int], Holder] = {}
    for path in sorted((run_path / "locks").glob("*.lock")):
        owner = read_owner(path)
        try:
            touched = modified(path)
        except OSError:
            continue
        if touched is None or not has_entries(owner, OWNER):
            continue
        key = (owner["machine"], owner["pid"], owner["began"])
        before = found.get(key)
        found[key] = Holder(
            what=(*(before.what if before else ()), owner["what"]),
            host=owner["host"],
            pid=owner["pid"],
            began=owner["began"],
            machine=owner["machine"],
            job=owner.get("job") or "",
            since=min(owner["since"], before.since if before else owner["since"]),
            state=_state(owner, time.time() - touched),
        )
    return sorted(found.values(), key=lambda holder: holder.since)


def _state(owner: dict[str, Any], silent: float) -> str:
    if owner["machine"] == machine():
        return ENDED if gone(owner) else ALIVE
    return SILENT if silent > PATIENCE else ELSEWHERE
