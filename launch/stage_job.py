"""What runs inside a submitted job: a stage that saves and queues again on a signal, a whole pipeline, a plain command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission

from dist_spin.errors import EXIT_OK
from dist_spin.launch.local_pipeline import run_stages
from dist_spin.launch.requeue import should_requeue
from dist_spin.runtime.processes import dependent_environment

REQUEUE_TIMEOUT_S = 45  # seconds that the other nodes wait for the first one to queue the job again
# Where submitit's own variables would make a plain command think that it is one rank of several.
NOT_INHERITED = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
PREEMPTION = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))


class StageJob:
    """One stage on the nodes of a Slurm job; one such object runs on every node."""

    def __init__(self, stage: str, arguments: list[str], ranks: int) -> None:
        """arguments: CONFIG and settings. ranks: processes per node."""
        self.stage, self.arguments, self.ranks = stage, arguments, ranks
        self.process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process": None}

    def __call__(self) -> int:
        """Returns 0; leaves through a requeue if the ranks saved and left, or one of them was lost.

        Raises:
            RuntimeError: the stage failed, so that jobs which wait for it do not begin.
        """
        stage = "quantize" if self.stage == "boundaries" else self.stage
        command = [
            sys.executable,
            "-m",
            "dist_spin.launch.torchrun",
            *rendezvous_arguments(),
            f"--nproc_per_node={self.ranks}",
        ]
        command += ["-m", "dist_spin", stage, *self.arguments]
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # c10d tells at length of every peer that has left
        self.process = subprocess.Popen(
            command, env=os.environ | quiet | dependent_environment(), start_new_session=True
        )
        code = self.process.wait()
        if should_requeue(code):
            if os.environ.get("SLURM_PROCID", "0") == "0":
                os.kill(os.getpid(), PREEMPTION)  # submitit's handler calls checkpoint() and queues the job again
            time.sleep(REQUEUE_TIMEOUT_S)  # Slurm ends this job, unless the first node is the one that hangs
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            signal.pause()
        if code != EXIT_OK:
            sys.tracebacklimit = 0  # submitit prints two; they would push the stage's own line out of `dist-spin logs`
            raise RuntimeError(f"dist-spin {stage} returned {code}; its line above says why")
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Called on the first node alone, inside a signal handler, so nothing here may wait for other nodes.

        Every rank has the signal or gets it from another rank's agreement; they save without us. We wait for ours.
        """
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            # Not `wait()`: the one that the signal has interrupted holds its lock, and this would wait for itself.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(StageJob(self.stage, self.arguments, self.ranks))


class PipelineJob:
    """Every stage one after the other on this machine."""

    def __init__(self, arguments: list[str], ranks: int, run: Path, stages: tuple[str, ...]) -> None:
        """run: the run's directory."""
        self.arguments, self.ranks, self.run, self.stages = arguments, ranks, run, stages

    def __call__(self) -> int:
        """The exit code of the first stage that failed, or 0."""
        return run_stages(self.arguments, self.ranks, self.run, self.stages)

    def checkpoint(self) -> DelayedSubmission:
        """Start again: every stage continues where it was."""
        return DelayedSubmission(PipelineJob(self.arguments, self.ranks, self.run, self.stages))


def run_command(arguments: list[str]) -> int:
    """Run `dist-spin ARGUMENTS...` in a process of its own, as one task of a fan-out; returns its exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    command = [sys.executable, "-m", "dist_spin", *arguments]
    print(" ".join(command), flush=True)
    return subprocess.run(command, env=environment | dependent_environment(), check=False).returncode


def rendezvous_arguments() -> list[str]:
    """torchrun's arguments for the rendezvous of this job's nodes: at the first one, at the addresses that Slurm itself uses."""
    environment = submitit.JobEnvironment()
    if environment.num_nodes == 1:
        return ["--standalone"]
    job = os.environ["SLURM_JOB_ID"]
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return [
        f"--nnodes={environment.num_nodes}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={address(environment.hostnames[0])}:{20000 + int(job) % 20000}",
        f"--rdzv_id={job}.{restart}",
        f"--local_addr={address(os.environ['SLURMD_NODENAME'])}",
    ]


def address(node: str) -> str:
    """A node's network address."""
    text = subprocess.run(
        ["scontrol", "show", "node", "-o", node], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return next(word.partition("=")[2] for word in text.split() if word.startswith("NodeAddr="))
