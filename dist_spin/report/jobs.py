"""The jobs of a run: those of Slurm, and those that `submit --cluster local` has left on this machine."""

from pathlib import Path
from typing import Any

from dist_spin.errors import UserError
from dist_spin.runtime.processes import began, machine
from dist_spin.runtime.slurm import JobState, job_states
from dist_spin.storage.run_records import check_is_run, read_events

FINISHED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
UNKNOWN = JobState("unknown", "")


def run_events(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's events.jsonl.

    Raises:
        UserError: `path` is no run directory.
    """
    check_is_run(path)
    return read_events(path)


def jobs_of(events: list[dict[str, Any]], *, certain: bool = False) -> list[dict[str, str]]:
    """Every job of a run, submitted or seen at work, in that order, with its state as long as Slurm remembers it.

    certain: whether no state may be missing because Slurm does not answer, as on a host that is none of its cluster.

    Raises:
        UserError: `certain`, and it does not.
    """
    jobs: dict[str, str] = {}
    local: dict[str, JobState] = {}
    for event in events:
        if event["event"] == "submitted":
            jobs[event["job"]] = " ".join([event["stage"], *event["part"][1:]])
            local[event["job"]] = _local_state(event)
        elif event["event"] == "job" and (job := slurm_job_id(event.get("slurm") or {})):
            jobs.setdefault(job, f"{event['stage']} {event['part']}".strip())
    try:
        states = job_states(jobs)
    except UserError:
        if certain:
            raise
        states = {}
    return [
        {"job": job, "stage": stage, **states.get(job, local.get(job, UNKNOWN))._asdict()}
        for job, stage in jobs.items()
    ]


def is_active(job: dict[str, str]) -> bool:
    """Whether one of `jobs_of` will still do something by itself."""
    return JobState(job["state"], job["reason"]).active


def slurm_job_id(variables: dict[str, str]) -> str:
    """The id of the Slurm job whose variables a stage has noted, as `squeue` shows it: `12`, `12_3` of an array, or ""."""
    if "array_job_id" in variables:
        return f"{variables['array_job_id']}_{variables.get('array_task_id', '')}"
    return variables.get("job_id", "")


def _local_state(submitted: dict[str, Any]) -> JobState:
    """The state of a process of this machine that `submit` has started; unknown for any other job."""
    process = submitted.get("process")
    if not isinstance(process, dict) or process.get("machine") != machine() or not isinstance(process.get("pid"), int):
        return UNKNOWN
    return JobState("RUNNING" if began(process["pid"]) == process.get("began") else "ENDED", "")
