"""What the tests of this folder hold in their hands: a running cluster, and a tiny run on it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLEARING = 5.0  # seconds; a job that started again at once was seen to fail with exit code 1 before its script ran
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED")


class Cluster:
    """The running cluster: call Slurm's programs, watch jobs, lose nodes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.waiting: dict[str, float] = {}  # job -> since when it is queued again
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH_"))]:
            del self.environment[name]

    def call(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} returned {done.returncode}: {done.stdout} {done.stderr}")
        return done

    def dist_spin(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", "dist_spin", *arguments, check=check)

    def sbatch(self, *arguments: str, **environment: str) -> str:
        return self.call("sbatch", "--parsable", *arguments, **environment).stdout.strip()

    def state(self, job: str) -> str:
        return self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.split("\n")[0]

    def wait(self, job: str, log: Path | None = None, seconds: float = 150) -> str:
        """The final state of a job. A requeued job starts at once, not after Slurm's two minutes."""
        last = ""

        def finished() -> bool:
            nonlocal last
            last = self.state(job)
            self.hurry(job)
            return last in FINISHED

        self.until(finished, seconds, lambda: f"job {job} is {last}: {log and log.exists() and log.read_text()}")
        return last

    def hurry(self, job: str) -> None:
        """Cut the two minutes short that a requeued job waits, but not to nothing: its nodes still clear the old one away."""
        if "BeginTime" not in self.call("squeue", "--noheader", f"--jobs={job}", "--format=%r", check=False).stdout:
            self.waiting.pop(job, None)
        elif time.monotonic() - self.waiting.setdefault(job, time.monotonic()) > CLEARING:
            self.call("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    def until(self, happened: Callable[[], bool], seconds: float, otherwise: Callable[[], object]) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, otherwise()
            time.sleep(0.25)

    def processes(self, node: str) -> list[int]:
        """All processes of jobs on a node, and the Slurm daemons that watch them."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                ours = f"SLURM_CONF={self.directory}/slurm.conf".encode() in environment
                if ours and f"SLURMD_NODENAME={node}".encode() in environment:
                    found.add(int(entry.name))
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if "slurmstepd" in Path(f"/proc/{parent}/cmdline").read_text():
                        found.add(parent)
        return sorted(found)

    def ranks(self, node: str) -> list[int]:
        """The processes on a node that compute: those that torchrun started."""
        words = b"\0-m\0dist_spin\0"
        found = [process for process in self.processes(node) if words in Path(f"/proc/{process}/cmdline").read_bytes()]
        return [process for process in found if b"launch.torchrun" not in Path(f"/proc/{process}/cmdline").read_bytes()]

    def node(self, name: str) -> str:
        """The state of a node."""
        return self.call("sinfo", "-h", "-p", "main", "-n", name, "-o", "%T").stdout.strip()

    def crash(self, node: str) -> None:
        """The node dies: its slurmd and all it runs, at once."""
        slurmd = int((self.directory / "pids" / f"slurmd.{node}.pid").read_text())
        for process in [slurmd, *self.processes(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def repair(self, node: str) -> None:
        self.call("bash", str(HERE / "cluster.sh"), "node", str(self.directory), node)
        self.until(lambda: self.node(node) == "idle", 60, lambda: self.node(node))


class Run:
    """A tiny fp64 run: its configuration file and what became of it."""

    def __init__(self, directory: Path, model: Path, **settings: object) -> None:
        tokens = directory / "tokens.npy"
        np.save(tokens, np.random.default_rng(0).integers(3, 97, (200, 16)))
        source = {"source": f"tokens:{tokens}", "seq_len": 16}
        self.path = directory / "runs" / "tiny"
        self.config = directory / "tiny.yaml"
        tree: dict[str, dict[str, object]] = {
            "model": {"path": str(model), "dtype": "float64"},
            "rotation": {"r4_block": 16},
            # Coarse rounding and long steps turn a last-bit difference between rank counts into a different run.
            "quant": {"a_bits": 8, "k_bits": 16, "v_bits": 16},
            "optimize": {**source, "steps": 4, "batch_size": 4, "lr": 0.01},
            "quantize": {**source, "n_sequences": 4},
            "evaluate": {"sources": [source["source"]], "seq_len": 16, "max_sequences": 4},
            "distributed": {"device": "cpu", "threads": 1, "timeout_s": 60},
        }
        for key, value in settings.items():
            group, name = key.split("__")
            tree.setdefault(group, {})[name] = value
        self.config.write_text(yaml.safe_dump({"name": "tiny", "output_dir": str(directory / "runs"), **tree}))

    def lines(self, name: str) -> list[dict]:
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, kind: str) -> list[dict]:
        return [line for line in self.lines("events.jsonl") if line["event"] == kind]

    @property
    def results(self) -> list[dict]:
        return json.loads((self.path / "results.json").read_text())

    @property
    def step(self) -> int:
        metrics = self.lines("metrics.jsonl")
        return metrics[-1]["step"] if metrics else 0
