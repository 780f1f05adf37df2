"""What Slurm says of jobs. Without Slurm's programs, nothing."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dist_spin.errors import UserError

ANSWERS_WITHIN = 30.0  # seconds for Slurm's programs to answer


class JobState(NamedTuple):
    """A job's state (PENDING, RUNNING, COMPLETED, ...) and Slurm's reason for it ("None" if there is nothing to say)."""

    state: str
    reason: str

    @property
    def active(self) -> bool:
        """Whether the job will still do something by itself."""
        living = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")
        return self.state in living and self.reason != "DependencyNeverSatisfied"


def job_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """State by job id (`12`, or `12_3` for a task of an array); jobs that Slurm has forgotten are left out.

    Raises:
        UserError: Slurm does not answer, which is not to be taken for jobs that have ended.
    """
    wanted = {job for job in jobs if job[:1].isdigit()}  # squeue refuses ids that it cannot read
    if not wanted or not shutil.which("squeue"):
        return {}
    ids = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    asked = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={ids}", "--format=%i|%T|%r"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=ANSWERS_WITHIN, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"Slurm does not answer (squeue, {ANSWERS_WITHIN:.0f} s)", "try again when it does") from error
    if answer.returncode and "nvalid job id" not in answer.stderr:
        said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise UserError(f"Slurm does not say what its jobs do: {said}", "try again when `squeue` works")
    lines = answer.stdout.splitlines()
    states = {fields[0]: JobState(*fields[1:]) for line in lines if len(fields := line.split("|")) == 3}
    # Tasks of an array that were cancelled before they began share one entry: `12` or `12_[0-3]`.
    arrays = {name.partition("_")[0]: state for name, state in states.items() if "_" not in name or "[" in name}
    known = {job: states.get(job, arrays.get(job.partition("_")[0])) for job in wanted}
    return {job: state for job, state in known.items() if state is not None}


def cancel_jobs(jobs: Iterable[str]) -> None:
    """Ask Slurm to end these jobs; those that have ended are no error.

    An array ends as a whole, and what was submitted last ends first: a task that is cancelled by itself while Slurm is ending
    its array, because what the array waited for has been cancelled, vanishes from Slurm's list.

    Raises:
        UserError: Slurm refuses.
    """
    for job in reversed(dict.fromkeys(job.partition("_")[0] for job in jobs)):
        done = subprocess.run(["scancel", job], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode and "nvalid job id" not in done.stderr:
            raise UserError(f"scancel {job}: {done.stderr.strip()}", "only the owner of a job can cancel it")


def output_files(job: str) -> list[Path]:
    """Where Slurm writes what a job prints, as long as Slurm remembers the job."""
    if not shutil.which("scontrol"):
        return []
    names = re.findall(r"Std(?:Out|Err)=(\S+)", _run("scontrol", "show", "job", "-o", job))
    return [Path(name) for name in dict.fromkeys(names)]


def gpus_not_asked_for() -> str:
    """The GPUs of this node as Slurm lists them (`gpu:h100:8`) where the job at work asked for none of them; else ""."""
    node = os.environ.get("SLURMD_NODENAME")
    if not node or os.environ.get("SLURM_GPUS_ON_NODE") or not shutil.which("scontrol"):
        return ""
    listed = re.search(r"\bGres=(\S+)", _run("scontrol", "show", "node", "-o", node))
    return ",".join(entry for entry in listed[1].split(",") if entry.startswith("gpu")) if listed else ""


def _run(*command: str) -> str:
    """Standard output, "" if the program fails or does not answer in time (seconds).

    A job that Slurm has forgotten is no error here.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWERS_WITHIN, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""
