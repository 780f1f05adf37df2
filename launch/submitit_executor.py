"""Jobs of a fan-out through submitit: a Slurm job array, or submitit's own local and debug executors.

    dist-spin quantize CONFIG.yaml --cluster slurm --workers 8 --slurm partition=gpu --slurm gpus_per_node=1

The run directory must be on a disk that all nodes see. Submitted again after a kill, only missing layers run.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from dist_spin.errors import EXIT_BUG, UserError
from dist_spin.launch.jobs import Task
from dist_spin.launch.stage_job import run_command

POLL_SECONDS = 1.0


class SubmititExecutor:
    """Jobs in a scheduler's hands. What is started between two waits goes out as one array."""

    def __init__(
        self, arguments: list[str], logs: Path, cluster: str, workers: int, scheduler: list[str], *, gpu: bool
    ) -> None:
        """workers: jobs at a time; 0 leaves it to Slurm, and means one for the other executors. gpu: whether a Slurm job
        asks for one unless --slurm gpus_per_node says otherwise.

        Raises:
            UserError: a scheduler setting is not `key=value`, or Slurm is not here.
        """
        self._arguments = arguments
        try:
            self._executor = submitit.AutoExecutor(folder=logs / "submitit", cluster=cluster)
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise UserError(f"submitit has no {cluster} here ({error})", "use --cluster local") from error
        self.slots = workers or (10**6 if cluster == "slurm" else 1)
        settings: dict[str, Any] = {"name": "dist-spin"}
        if cluster == "slurm":
            settings |= {"slurm_array_parallelism": min(self.slots, 256)} | slurm_settings(scheduler, ranks=1, gpu=gpu)
        try:
            self._executor.update_parameters(**settings)
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"submitit refuses a setting ({error})", "check --slurm") from error
        self._fresh: list[Task] = []
        self._running: list[tuple[Task, submitit.Job[int]]] = []

    def start(self, task: Task) -> None:
        """Put a job into the next array."""
        self._fresh.append(task)

    def wait(self, seconds: float) -> Iterable[tuple[Task, int]]:
        """Submit what is waiting, then hand over jobs that ended; a job that vanished ends with EXIT_BUG.

        Raises:
            UserError: the scheduler does not take them.
        """
        if self._fresh:
            commands = [["quantize", *self._arguments, *task.arguments] for task in self._fresh]
            try:
                jobs = self._executor.map_array(run_command, commands)
            except FailedJobError as error:
                problem = (str(error).strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"the scheduler refuses the jobs ({problem})", "check sinfo, and --slurm") from error
            self._running += zip(self._fresh, jobs, strict=True)
            self._fresh = []
        ended = [(task, job) for task, job in self._running if job.done()]
        if not ended:
            time.sleep(max(seconds, POLL_SECONDS))
        for task, job in ended:
            self._running.remove((task, job))
            try:
                yield task, job.result()
            except (FailedJobError, UncompletedJobError):
                yield task, EXIT_BUG

    def stop(self) -> None:
        """Cancel every job: the scheduler signals them, and they save and leave."""
        for _, job in self._running:
            job.cancel()


def slurm_settings(words: list[str], *, ranks: int, gpu: bool) -> dict[str, Any]:
    """submitit's parameters from `key=value` words: its own names, and every other option of sbatch by its long name.

    Args:
        ranks: processes per node. gpu: whether each takes one, unless the words say otherwise.

    Raises:
        UserError: a word is not `key=value`.
    """
    settings: dict[str, Any] = {"slurm_time": 240, "slurm_signal_delay_s": 120, "slurm_ntasks_per_node": 1}
    settings |= {"slurm_gpus_per_node": ranks} if gpu else {"slurm_cpus_per_task": ranks}
    extra: dict[str, Any] = {}
    known = submitit.SlurmExecutor._valid_parameters()
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key):
            raise UserError(f"--slurm {word} sets nothing", "write --slurm key=value, such as partition=gpu")
        value: Any = int(text) if text.isascii() and text.isdigit() else text
        key = key.replace("-", "_")
        if key == "nodes":
            settings["nodes"] = value
        elif key == "setup":  # shell lines, may be given several times
            settings.setdefault("slurm_setup", []).append(text)
        elif key in known:
            settings[f"slurm_{key}"] = value
        else:
            extra[key.replace("_", "-")] = value
    return settings | ({"slurm_additional_parameters": extra} if extra else {})
