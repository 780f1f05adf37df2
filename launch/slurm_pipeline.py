"""Submit the whole pipeline as jobs that wait for each other, and leave; submit again, and what is missing is submitted.

    dist-spin submit CONFIG.yaml --cluster slurm --slurm partition=gpu --slurm nodes=2 --slurm time=240

optimize (`nodes` nodes) -> stored hidden states -> an array of quantize jobs, one per range of layers (or one per
`distributed.nproc` of them, a range for each rank) -> evaluate -> report -> export, where `export.target` names a format.
A job that is preempted, runs out of time or stops getting answers saves and queues itself again (`StageJob`). Which jobs
were submitted stands in the run's events.jsonl; whether they still live, Slurm is asked.
"""

import contextlib
import itertools
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.launch.local_pipeline import SINGLE_PROCESS, stages_of
from dist_spin.launch.stage_job import PipelineJob, StageJob
from dist_spin.launch.submitit_executor import slurm_settings
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.model import open_configured_model
from dist_spin.quantize.job import layer_ranges_of
from dist_spin.quantize.stage import prepare_jobs
from dist_spin.runtime import distributed
from dist_spin.runtime.processes import identity
from dist_spin.runtime.progress import say, warn
from dist_spin.runtime.slurm import JobState, cancel_jobs, job_states
from dist_spin.storage.locks import Lock
from dist_spin.storage.results import results
from dist_spin.storage.run_directory import RunDir, run_dir
from dist_spin.storage.run_records import read_events

# What is in the way, by the reason Slurm gives for a job that waits or the message with which it refuses one.
REMEDIES = {
    "account": "set --slurm account=NAME; `sacctmgr show associations user=$USER` lists yours",
    "partition name": "set --slurm partition=NAME; `sinfo` lists them",
    "invalid partition": "set --slurm partition=NAME; `sinfo` lists them",
    "qos": "set --slurm qos=NAME; `sacctmgr show qos` lists them",
    "time limit": "set --slurm time=MINUTES within the partition's limit; `sinfo -o '%P %l'` shows it",
    "node count": "set --slurm nodes=N to what the partition has; `sinfo` shows it",
    "node configuration": "ask for fewer nodes, CPUs or GPUs per node with --slurm; `sinfo -N -l` shows what there is",
    "PartitionConfig": "ask for fewer nodes, CPUs or GPUs per node with --slurm; `sinfo -N -l` shows what there is",
    "PartitionNodeLimit": "set --slurm nodes=N to what the partition allows; `scontrol show partition` shows it",
    "PartitionTimeLimit": "set --slurm time=MINUTES within the partition's limit; `sinfo -o '%P %l'` shows it",
    "BadConstraints": "change --slurm constraint=, gres= or nodes= to something that exists; `sinfo -N -l`",
}


@dataclass
class Submitter:
    """One submission of a run's missing stages to Slurm."""

    arguments: list[str]  # CONFIG and settings, as on the command line, absolute paths
    config: RunConfig
    run: RunDir
    settings: dict[str, Any]  # submitit parameters
    active: dict[str, list[str]] = field(default_factory=dict)  # stage -> ids of jobs that still live
    submitted: list[str] = field(default_factory=list)

    def stage(self, stage: str, parts: list[list[str]], after: list[str], nodes: int = 1) -> list[str]:
        """Submit one stage, an array if it has several parts, to begin when all jobs `after` are complete; the job ids."""
        executor = submitit.AutoExecutor(folder=self.run.logs / "submitit", cluster="slurm", slurm_max_num_timeout=1000)
        extra = {"kill-on-invalid-dep": "yes", "requeue": True, "open-mode": "append"}
        extra |= self.settings.get("slurm_additional_parameters", {})
        dependency = {"slurm_dependency": "afterok:" + ":".join(after)} if after else {}
        ranks = 1 if stage in SINGLE_PROCESS else self.config.distributed.nproc
        jobs = [StageJob(stage, [*self.arguments, *part], ranks) for part in parts]
        try:
            executor.update_parameters(
                name=f"{self.config.name}-{stage}",
                **{**self.settings, "slurm_additional_parameters": extra, "nodes": nodes, **dependency},
            )
            with executor.batch():  # one array
                handles = [executor.submit(job) for job in jobs]
            ids = [str(handle.job_id) for handle in handles]
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            raise refused(str(error)) from error
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"submitit refuses a setting ({error})", "check --slurm") from error
        for job, part in zip(ids, parts, strict=True):
            self.run.event("submitted", stage=stage, job=job, part=part)
        self.submitted += ids
        say(
            f"submitted {stage}: {len(ids)} job{'s' if len(ids) > 1 else ''}, {ids[0]}"
            + (f" .. {ids[-1]}" * (len(ids) > 1))
        )
        return ids


def submit(arguments: list[str], config: RunConfig, cluster: str, scheduler: list[str]) -> int:
    """Submit what is missing of a run; returns the exit code.

    Args:
        arguments: CONFIG and settings, as on the command line. cluster: slurm; local (one background process of this machine,
            through submitit); debug (in this process). scheduler: `key=value` settings of Slurm.

    Raises:
        UserError: Slurm refuses, with its own message and what to change; or another submission is under way.
    """
    run = run_dir(config)
    absolute = (
        [str(Path(arguments[0]).resolve()), *arguments[1:]] if arguments and "=" not in arguments[0] else arguments
    )
    with Lock(run.path / "locks" / "submit.lock", "submit"):
        if cluster in ("local", "debug"):
            return _submit_here(absolute, config, run, cluster, scheduler)
        if cluster != "slurm":
            raise UserError(f"there is no cluster '{cluster}'", "use slurm, local or debug")
        return _submit_slurm(absolute, config, run, scheduler)


def _submit_here(arguments: list[str], config: RunConfig, run: RunDir, cluster: str, scheduler: list[str]) -> int:
    if scheduler:
        raise UserError("--slurm is for --cluster slurm", "leave it out")
    executor = submitit.AutoExecutor(folder=run.logs / "submitit", cluster=cluster)
    executor.update_parameters(timeout_min=60 * 24 * 30, name=config.name)
    job = executor.submit(PipelineJob(arguments, config.distributed.nproc, run.path.absolute(), stages_of(config)))
    process = {} if cluster == "debug" else {"process": identity(int(job.job_id))}  # so that `status` knows its end
    run.event("submitted", stage="run", job=f"{cluster}-{job.job_id}", part=[], **process)
    if cluster == "debug":
        return job.result()
    say(f"process {job.job_id} of this machine; it writes to {job.paths.stderr}")
    return 0


def _submit_slurm(arguments: list[str], config: RunConfig, run: RunDir, scheduler: list[str]) -> int:
    settings = slurm_settings(scheduler, ranks=config.distributed.nproc, gpu=config.distributed.device != "cpu")
    nodes = settings.pop("nodes", 1)
    submitter = Submitter(arguments, config, run, settings, active_jobs(run))
    active = submitter.active
    learned = (run.rotations / "final.safetensors").exists()
    optimize = active.get("optimize", [])
    if not learned and not optimize:
        optimize = submitter.stage("optimize", [[]], [], nodes)
    quantize = active.get("quantize", []) if not submitter.submitted else []
    missing = missing_ranges(config, learned=learned)
    covered = [part for job in quantize for part in _layers_of(run, job)]
    wanted = [(a, b) for a, b in missing if not any(start <= a and b <= stop for start, stop in covered)]
    if wanted:
        before = optimize
        if wanted[-1][0] > 0:  # ranges that begin inside the model start from stored hidden states
            before = active.get("boundaries") or submitter.stage("boundaries", [["--hidden-states"]], optimize)
        tasks = grouped(wanted, config.distributed.nproc)
        quantize = quantize + submitter.stage("quantize", [["--layers", f"{a}:{b}"] for a, b in tasks], before)
    before = quantize or optimize
    for stage, complete in (
        ("evaluate", bool(results(run, "evaluate"))),
        ("report", (run.path / "report.html").exists()),
        ("export", (run.export / config.export.target / "dist_spin.json").exists()),
    ):
        if stage not in stages_of(config):
            continue
        if submitter.submitted and active.get(stage):
            cancel_jobs(active.pop(stage))  # it waits for less than it should
        if not active.get(stage) and (submitter.submitted or not complete):
            submitter.stage(stage, [[]], before)
        before = submitter.submitted[-1:] or active.get(stage, [])
    if not submitter.submitted:
        jobs = sorted(job for ids in active.values() for job in ids)
        say(
            f"nothing to submit: {'jobs ' + ', '.join(jobs) + ' are queued or running' if jobs else 'the run is complete'}"
        )
    else:
        say(
            f"`dist-spin status {shlex.quote(str(run.path))} --watch` follows them; logs and cancel take the same directory"
        )
    with contextlib.suppress(UserError):  # they are submitted, whether Slurm says more of them or not
        warn_of_stuck(job_states(submitter.submitted))
    return 0


def active_jobs(run: RunDir) -> dict[str, list[str]]:
    """Stage -> ids of its submitted jobs that Slurm still has work for; those that wait for a failed job are cancelled."""
    stages = {line["job"]: line["stage"] for line in read_events(run.path) if line["event"] == "submitted"}
    states = job_states(stages)
    cancel_jobs(job for job, state in states.items() if state.reason == "DependencyNeverSatisfied")
    out: dict[str, list[str]] = {}
    for job, state in states.items():
        if state.active:
            out.setdefault(stages[job], []).append(job)
    return out


def _layers_of(run: RunDir, job: str) -> list[tuple[int, int]]:
    """The (start, stop) that a submitted job was given; none for a job of another kind."""
    parts = [line["part"] for line in read_events(run.path) if line["event"] == "submitted" and line["job"] == job]
    words = [part[1].partition(":") for part in parts if part[:1] == ["--layers"]]
    return [(int(start), int(stop)) for start, _, stop in words]


def grouped(ranges: list[tuple[int, int]], ranks: int) -> list[tuple[int, int]]:
    """Neighbouring ranges put together for tasks of `ranks` processes, as evenly as they go, at most one for each process."""
    runs: list[list[tuple[int, int]]] = []
    for layer_range in ranges:
        if runs and runs[-1][-1][1] == layer_range[0]:
            runs[-1].append(layer_range)
        else:
            runs.append([layer_range])
    tasks = []
    for run in runs:
        count = -(-len(run) // ranks)
        cuts = [len(run) * i // count for i in range(count + 1)]
        tasks += [(run[a][0], run[b - 1][1]) for a, b in itertools.pairwise(cuts)]
    return tasks


def missing_ranges(config: RunConfig, *, learned: bool) -> list[tuple[int, int]]:
    """Ranges of layers that no finished files cover; all of them while there are no rotations to have made them with."""
    if config.quantize.method == "none" or config.quant.w_bits == 16:
        return []
    world = distributed.start("cpu", threads=1)
    try:
        if not learned:
            files = open_configured_model(config)
            check_export_target(config, files.config)  # before jobs are submitted
            return layer_ranges_of(files.shape.layers, config.quantize.layers_per_job)
        quantize_jobs = prepare_jobs(config, world)
        return sorted(
            {
                layer_range
                for job in quantize_jobs
                for layer_range in job.layer_ranges
                if not all(job.finished(*layer_range))
            }
        )
    finally:
        distributed.stop()


def refused(message: str) -> UserError:
    """Slurm's own message as an error with what to change."""
    lines = [line.strip() for line in message.splitlines() if "error" in line.lower()] or message.strip().splitlines()
    text = lines[-1].removeprefix("sbatch: error: ") if lines else "sbatch failed"
    remedy = next((r for words, r in REMEDIES.items() if words.lower() in text.lower()), "check the --slurm settings")
    return UserError(f"Slurm refuses the job: {text}", remedy)


def warn_of_stuck(states: dict[str, JobState]) -> None:
    """Say it if a job waits for something that will not come by itself."""
    for job, state in states.items():
        if state.reason in REMEDIES:
            warn(f"dist-spin: job {job} waits ({state.reason}); {REMEDIES[state.reason]}, after `dist-spin cancel`")
