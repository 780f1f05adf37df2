"""End what is at work on a run: its Slurm jobs, and the processes of this machine that hold its locks.

dist-spin cancel runs/quickstart

A process is only signalled if it is the one that wrote the lock: the same machine, process id and start time.
"""

import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from dist_spin.errors import EXIT_HANG, UserError
from dist_spin.report.holders import ALIVE, ELSEWHERE, Holder, holders
from dist_spin.report.jobs import FINISHED, jobs_of, run_events
from dist_spin.runtime.processes import began
from dist_spin.runtime.progress import say
from dist_spin.runtime.slurm import cancel_jobs
from dist_spin.storage.run_directory import RunDir

WAIT_S = 300.0  # for a process to finish its step or layer and save
LEAVING_S = 15.0  # for what `submit` has started on this machine to notice that its stages have ended
LOOK_EVERY_S = 0.1
ENDS = ("UNKNOWN", "ENDED", *FINISHED)  # states of jobs that Slurm need not be asked to end


class StillAtWork(UserError):
    """A process was asked to end and has not yet."""

    exit_code = EXIT_HANG


def cancel(path: Path, wait_s: float = WAIT_S) -> str:
    """End every job of a run, on Slurm and on this machine; what they saved stays. Returns what was done.

    Args:
        wait_s: seconds to wait for processes of this machine to save and leave.

    Raises:
        UserError: Slurm refuses or does not answer; or a process cannot be signalled from here: it is on another machine or
            another user's.
        StillAtWork: a process has been asked to end and has not within `wait_s`.
    """
    events = run_events(path)
    jobs = [job for job in jobs_of(events, certain=True) if job["state"].upper() not in ENDS]
    slurm = [job["job"] for job in jobs if not job["job"].startswith(("local-", "debug-"))]
    found = [holder for holder in holders(path) if not (holder.job and slurm)]  # their job's end is Slurm's matter
    cancel_jobs(slurm)
    said = [f"cancelled {', '.join(slurm)}; what runs saves first, and the same submit continues"] * bool(slurm)
    alive = [holder for holder in found if holder.state == ALIVE and holder.pid != os.getpid()]
    asked = [holder for holder in alive if holder.launches] or alive  # a launcher passes it on to its stages
    signalled = [holder for holder in asked if _terminate(holder)]
    if slurm or signalled:
        processes = [{"host": holder.host, "pid": holder.pid} for holder in signalled]
        RunDir(path).event("cancelled", jobs=slurm, processes=processes)
    if signalled:
        _wait(path, alive, wait_s)
        end = time.monotonic() + LEAVING_S
        while _local_jobs(jobs_of(events)) and time.monotonic() < end:
            time.sleep(LOOK_EVERY_S)
        said.append(
            f"ended {'; '.join(map(str, signalled))}; {_saved(run_events(path)[len(events) :])}the same command continues"
        )
    elsewhere = [holder for holder in found if holder.state == ELSEWHERE]
    if elsewhere:
        places = "; ".join(map(str, elsewhere))
        done = f"{'; '.join(said)}; but " if said else ""
        remedy = f"give the same command on {elsewhere[0].host}, or `kill {elsewhere[0].pid}` there"
        raise UserError(f"{done}{places} is at work on another machine, which no signal reaches from here", remedy)
    waiting = _local_jobs(jobs)
    if not said and waiting:
        raise StillAtWork(f"{', '.join(waiting)} has only just been started and holds nothing yet", "try again")
    if not said:
        ended = [f"; {holder} has ended without releasing the run, which the next start takes over" for holder in found]
        said = ["".join(["nothing of this run is waiting or running", *ended])]
    return "\n".join(said)


def _local_jobs(jobs: list[dict[str, str]]) -> list[str]:
    """Those that `submit --cluster local` has started and that have not ended."""
    return [job["job"] for job in jobs if job["job"].startswith("local-") and job["state"] == "RUNNING"]


def _terminate(holder: Holder) -> bool:
    """Ask a process to save and leave; whether it was still there.

    Raises:
        UserError: it is another user's.
    """
    if began(holder.pid) != holder.began:
        return False
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise UserError(f"{holder} belongs to another user", "ask its owner to cancel it") from error
    say(f"asked {holder} to save and leave (SIGTERM); waiting for it")
    return True


def _wait(path: Path, asked: list[Holder], wait_s: float) -> None:
    """Until all of these processes have ended, and their launcher's other ones that hold locks.

    Raises:
        StillAtWork: they have not.
    """
    end = time.monotonic() + wait_s
    while left := [holder for holder in asked if began(holder.pid) == holder.began]:
        if time.monotonic() > end:
            told = f"{'; '.join(map(str, left))} was asked to end {wait_s:.0f} s ago and is still at work"
            remedy = f"it finishes its step or layer first: look again with `dist-spin status {shlex.quote(str(path))}`"
            raise StillAtWork(told, f"{remedy}, or end it at once with `kill -9 {left[0].pid}`, which loses that step")
        time.sleep(LOOK_EVERY_S)


def _saved(events: list[dict[str, Any]]) -> str:
    """At which step learning was saved, if these events tell of it."""
    steps = [
        event["step"] for event in events if event["event"] == "interrupted" and isinstance(event.get("step"), int)
    ]
    return f"step {steps[-1]} is saved; " if steps else ""
