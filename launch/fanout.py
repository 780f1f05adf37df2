"""Quantise with many jobs at once; every job is the plain command `dist-spin quantize CONFIG --layers A:B`.

    dist-spin quantize CONFIG.yaml --cluster local --workers 4 quantize.layers_per_job=10

What is finished is never started again, a job that fails is started again a few times, and the others go on meanwhile. The
launcher holds no state of its own: kill it, start it again, and it does what is missing.
"""

import signal
from dataclasses import dataclass
from types import FrameType

from dist_spin.config.run import RunConfig
from dist_spin.errors import EXIT_ABORTED, EXIT_INTERRUPTED, EXIT_NUMERICS, EXIT_OK, EXIT_USER, UserError
from dist_spin.launch.jobs import Executor, Task
from dist_spin.pipeline.dtype import resolve_dtype
from dist_spin.pipeline.stage_context import note_failure
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.stage import prepare_jobs
from dist_spin.runtime import distributed
from dist_spin.runtime.progress import Progress, warn
from dist_spin.runtime.signals import forwarded_to, leave, leave_terminal
from dist_spin.storage.locks import Lock
from dist_spin.storage.run_directory import RunDir, run_dir

NON_RETRYABLE = (EXIT_USER, EXIT_NUMERICS)  # the same again would end the same way


@dataclass
class SignalForwarder:
    """Passes stopping signals on to the jobs and remembers the last one's name."""

    executor: Executor
    name: str = ""

    def forward(self, number: int, frame: FrameType | None) -> None:
        """A signal handler."""
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT and self.name:  # jobs of this machine do not outlive their launcher
            leave("ended at once by a second ctrl-C; the same command continues", EXIT_ABORTED)
        self.name = signal.Signals(number).name
        self.executor.stop()


def fan_out(
    arguments: list[str], config: RunConfig, cluster: str, *, workers: int, retries: int, scheduler: list[str]
) -> int:
    """Run every job that is missing; returns the process's exit code.

    Args:
        arguments: CONFIG and settings, as on the command line.
        cluster: local (processes on this machine), slurm, submitit-local or debug (submitit's executors).
        workers: jobs at a time; 0 takes one per GPU, or one per core without GPUs.
        retries: how often a job may fail in a row without finishing a layer before it is given up.
        scheduler: `key=value` settings of slurm.

    Raises:
        Held: another launcher is at work on the same run.
        UserError: a job ended with one, or too often; finished layers are kept.
    """
    executor = make_executor(cluster, arguments, config, workers, scheduler)
    with Lock(run_dir(config).path / "locks" / "fan-out.lock", "fan-out"):  # so that `status` and `cancel` find us
        try:
            return _fan_out(config, executor, retries)
        except UserError as error:
            note_failure(run_dir(config), "quantize", "fan-out", error)
            raise


def _fan_out(config: RunConfig, executor: Executor, retries: int) -> int:
    world = distributed.start("cpu", threads=1)
    try:
        config = resolve_dtype(config, world)  # noted in the run before a job starts, so that all jobs take the same
        quantize_jobs = prepare_jobs(config, world)
        signals = SignalForwarder(executor)
        with forwarded_to(signals.forward):
            if any(job.stop for job in quantize_jobs):  # it came while the jobs were prepared
                return EXIT_INTERRUPTED
            tasks = open_tasks(quantize_jobs)
            states = [Task(["--hidden-states"], range(0))] if any(task.layers.start for task in tasks) else []
            run_tasks([*states, *tasks], executor, quantize_jobs, retries, signals)
        if signals.name:
            warn(f"dist-spin: stopped by {signals.name}; the same command continues")
            return EXIT_INTERRUPTED
        if unfinished := [
            task.name
            for task in tasks
            if finished_count(quantize_jobs, task.layers) < len(quantize_jobs) * len(task.layers)
        ]:
            raise UserError(f"layers {', '.join(unfinished)} are not all there", "the same command continues")
        for job in quantize_jobs:
            job.make_embeddings()  # where a finished run was only given bits for them
            job.remove_states()
    finally:
        distributed.stop()
    return EXIT_OK


def make_executor(
    cluster: str, arguments: list[str], config: RunConfig, workers: int, scheduler: list[str]
) -> Executor:
    """The executor of a `--cluster` name.

    Raises:
        UserError: there is none of that name.
    """
    logs = run_dir(config).logs
    if cluster == "local":
        from dist_spin.launch.local_executor import LocalExecutor

        if scheduler:
            raise UserError("--slurm is for --cluster slurm", "leave it out")
        return LocalExecutor(arguments, config, logs, workers)
    if cluster in ("slurm", "submitit-local", "debug"):
        from dist_spin.launch.submitit_executor import SubmititExecutor

        return SubmititExecutor(
            arguments,
            logs,
            cluster.removeprefix("submitit-"),
            workers,
            scheduler,
            gpu=config.distributed.device != "cpu",
        )
    raise UserError(f"there is no cluster '{cluster}'", "use local, slurm, submitit-local or debug")


def open_tasks(quantize_jobs: list[QuantizeJob]) -> list[Task]:
    """A task for each range of layers with something missing in any variant; damaged files are set aside."""
    layer_ranges = {
        layer_range for job in quantize_jobs for layer_range in job.layer_ranges if not all(job.finished(*layer_range))
    }
    return [Task(["--layers", f"{start}:{stop}"], range(start, stop)) for start, stop in sorted(layer_ranges)]


def finished_count(quantize_jobs: list[QuantizeJob], layers: range) -> int:
    """How many of these layers have files, over all variants; their content was checked when they were written."""
    return sum(job.path(index).exists() for job in quantize_jobs for index in layers)


def run_tasks(
    tasks: list[Task], executor: Executor, quantize_jobs: list[QuantizeJob], retries: int, signals: SignalForwarder
) -> None:
    """Run tasks, at most `executor.slots` at a time, those that fail again; returns when all are done or stopped.

    Layers that begin inside the model wait for what enters the first of them, not for the whole pass that stores it.

    Raises:
        UserError: a task cannot succeed; the others were asked to stop, and have.
    """
    if not tasks:
        return
    run = quantize_jobs[0].run
    all_layers = range(quantize_jobs[0].files.shape.layers)
    total, done = len(quantize_jobs) * len(all_layers), finished_count(quantize_jobs, all_layers)
    progress = Progress("quantise: layer", total, done)
    queued, running, failure = list(tasks), 0, ""
    states_stored = all(task.layers for task in tasks)

    def ready(task: Task) -> bool:
        first = task.layers.start if task.layers else 0
        return not first or states_stored or all(job.stored.present(first) for job in quantize_jobs)

    while running or (queued and not signals.name and not failure):
        while queued and running < executor.slots and not signals.name and not failure:
            task = next(filter(ready, queued), None)
            if task is None:
                break
            queued.remove(task)
            task.done_before = finished_count(quantize_jobs, task.layers)
            run.event("job_start", job=task.name, layers=[task.layers.start, task.layers.stop])
            executor.start(task)
            running += 1
        for task, code in executor.wait(0.2):
            running -= 1
            note_end(run, task, code)
            states_stored = states_stored or (code == EXIT_OK and not task.layers)
            if code == EXIT_OK or (signals.name and code not in NON_RETRYABLE):
                continue
            task.failures = task.failures + 1 if finished_count(quantize_jobs, task.layers) == task.done_before else 0
            ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            if code in NON_RETRYABLE or task.failures > retries:
                failure = failure or f"job {task.name} {ending}"
                executor.stop()
            elif not signals.name:
                warn(f"job {task.name} {ending}; starting it again")
                queued.insert(0, task)
        latest = finished_count(quantize_jobs, all_layers)
        while done < latest:
            done += 1
            progress.advance(f"{running} jobs running")
    if failure:
        raise UserError(failure, f"see {run.logs}; the same command continues")


def note_end(run: RunDir, task: Task, code: int) -> None:
    """Write how a job ended into the run's events."""
    kind = "job_done" if code == EXIT_OK else "job_failed"
    run.event(kind, job=task.name, layers=[task.layers.start, task.layers.stop], code=code)
