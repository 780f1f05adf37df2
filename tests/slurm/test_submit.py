"""`dist-spin submit` on a real Slurm: preemption, cancelled tasks, a dead node, and what a user gets wrong."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_spin import cli
from dist_spin.runtime.signals import STOPPING
from tests.families import FAMILIES
from tests.slurm.harness import ROOT, Cluster, Run
from tests.tiny import write_model

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(500)]


class Terminal:
    """A user's commands, in this process, which has imported everything already."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self.code = capsys, 0

    def call(self, *words: str) -> str:
        """What the command printed; `code` is what it returned."""
        self._capsys.readouterr()
        self.code = cli.main(list(words))
        return "".join(self._capsys.readouterr())

    def submit(self, run: Run, *words: str) -> str:
        settings = ("--slurm", "nodes=2", "--slurm", "time=30", "--slurm", "cpus_per_task=2", *words)
        return self.call("submit", str(run.config), "--cluster", "slurm", *settings)


@pytest.fixture
def terminal(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Terminal]:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    kept = {number: signal.getsignal(number) for number in STOPPING}
    yield Terminal(capsys)
    for number, handler in kept.items():
        signal.signal(number, handler)


def jobs_of(run: Run, stage: str) -> list[str]:
    return [event["job"] for event in run.events("submitted") if event["stage"] == stage]


def test_whole_pipeline_survives_preemption_cancelled_tasks_and_a_dead_node(
    cluster: Cluster,
    terminal: Terminal,
    make_run: Callable[..., Run],
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
) -> None:
    settings = {"optimize__steps": 30, "quantize__layers_per_job": 1, "distributed__nproc": 1}
    run = make_run(**settings)

    def say() -> str:
        return terminal.call("status", str(run.path)) + terminal.call("logs", str(run.path))

    terminal.submit(run)
    assert "nothing to submit: jobs" in terminal.submit(run)

    # Preempted: submitit's checkpoint() lets the ranks save and queues the job again.
    (optimize,) = jobs_of(run, "optimize")
    cluster.until(lambda: run.step >= 2, 120, say)
    high = cluster.sbatch("--partition=high", "--nodes=2", "--cpus-per-task=2", "--wrap=sleep 1", "--output=/dev/null")
    cluster.wait(high)
    stopped = run.events("interrupted")[0]["step"]
    assert 2 <= stopped < 30
    assert cluster.wait(optimize) == "COMPLETED", say()
    assert [event["step"] for event in run.events("resume")] == [stopped]

    # Of four array tasks, one loses its node and two are cancelled, of which one is at work.
    first = jobs_of(run, "quantize")
    cluster.until(lambda: [cluster.state(job) for job in (first[0], first[2])] == ["RUNNING"] * 2, 120, say)
    cluster.call("scancel", first[2], first[3])
    node = cluster.call("squeue", "-h", "-j", first[0], "-o", "%N").stdout.strip()
    cluster.crash(node)
    cluster.until(lambda: cluster.node(node).startswith("down"), 90, lambda: cluster.node(node))
    cluster.until(lambda: cluster.state(jobs_of(run, "evaluate")[0]) == "CANCELLED", 60, say)
    finished = {path: path.stat().st_mtime_ns for path in (run.path / "layers").glob("*.safetensors")}
    terminal.submit(run)
    assert [event["part"] for event in run.events("submitted") if event["stage"] == "quantize"][4:] == [
        ["--layers", "2:3"],
        ["--layers", "3:4"],
    ]
    for job in (first[0], jobs_of(run, "evaluate")[-1], jobs_of(run, "report")[-1]):
        assert cluster.wait(job) == "COMPLETED", say()
    cluster.repair(node)  # only now: slurmctld 22.05 can crash when a node comes back while its job is queued again
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert [row["method"] for row in run.results] == ["full precision", "learned rotation"]
    assert (run.path / "report.html").exists()
    # Slurm names the files of its jobs by their whole paths, and the run's directory is given by another one here.
    there = os.path.relpath(run.path, ROOT)
    printed = [line for line in terminal.call("logs", there).splitlines() if line.startswith("==> ")]
    files = [Path(line.removeprefix("==> ")).resolve() for line in printed]
    assert len(files) == len(set(files)) > 6
    assert "nothing to submit: the run is complete" in terminal.submit(run)

    # Preempted or not, the rotations are the same. Compared last: the array does not wait for it.
    alone = Run(tmp_path_factory.mktemp("alone"), model, **settings)
    cluster.dist_spin("optimize", str(alone.config))
    ours, theirs = (load_file(r.path / "rotations" / "final.safetensors") for r in (run, alone))
    assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-9 for name in ("R1", "R2"))


def test_ranks_of_two_nodes_each_quantise_a_range_of_layers(
    cluster: Cluster, terminal: Terminal, tmp_path: Path
) -> None:
    experts = write_model(FAMILIES["qwen3-30b-a3b (2048, 768)"], tmp_path / "model", layers=4)
    run = Run(
        tmp_path,
        experts,
        rotation__r4_block=8,
        optimize__steps=0,
        quantize__layers_per_job=1,
        quantize__parallel="layers",
        distributed__nproc=2,
    )
    said = terminal.submit(run)
    assert terminal.code == 0, said
    assert [event["part"] for event in run.events("submitted") if event["stage"] == "quantize"] == [
        ["--layers", "0:2"],
        ["--layers", "2:4"],
    ]
    for job in jobs_of(run, "quantize"):
        assert cluster.wait(job, seconds=240) == "COMPLETED", terminal.call("logs", str(run.path))
    layers = {event["layer"]: event for event in run.events("layer")}
    assert sorted(layers) == [0, 1, 2, 3]
    assert len({event["pid"] for event in layers.values()}) == 4
    terminal.call("cancel", str(run.path))


def test_a_rank_that_hangs_on_the_first_node_queues_the_job_again(
    cluster: Cluster, terminal: Terminal, make_run: Callable[..., Run]
) -> None:
    run = make_run(quant__w_bits=16, optimize__steps=20, distributed__nproc=1, distributed__timeout_s=8)
    terminal.submit(run)

    def say() -> str:
        return terminal.call("status", str(run.path)) + terminal.call("logs", str(run.path))

    cluster.until(lambda: run.step >= 2, 120, say)
    os.kill(cluster.ranks("n1")[0], signal.SIGSTOP)
    assert cluster.wait(jobs_of(run, "optimize")[0], seconds=240) == "COMPLETED", say()
    assert len(run.events("resume")) == 1
    assert cluster.wait(jobs_of(run, "evaluate")[0]) == "COMPLETED", say()


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["account=nobody"], "Invalid account or account/partition combination", "set --slurm account=NAME"),
        (["partition=nope"], "Invalid partition name specified", "set --slurm partition=NAME"),
    ],
)
def test_slurms_own_refusal_and_what_to_change(
    terminal: Terminal, make_run: Callable[..., Run], words: list[str], message: str, remedy: str
) -> None:
    said = terminal.submit(make_run(), *[w for word in words for w in ("--slurm", word)])
    assert terminal.code == 2
    line = said.strip().splitlines()[-1]
    assert message in line
    assert remedy in line
    assert "Traceback" not in said


def test_too_many_nodes_is_said_and_cancel_ends_it(
    cluster: Cluster, terminal: Terminal, make_run: Callable[..., Run]
) -> None:
    run = make_run(quantize__layers_per_job=1)
    assert "waits (PartitionConfig); ask for fewer nodes" in terminal.submit(run, "--slurm", "nodes=9")
    assert "(PartitionConfig)" in terminal.call("status", str(run.path))
    assert "cancelled" in terminal.call("cancel", str(run.path))
    assert cluster.state(jobs_of(run, "optimize")[0]) == "CANCELLED"
    # The array never began; Slurm keeps one entry for all its tasks.
    told = [line for line in terminal.call("status", str(run.path)).splitlines() if line.startswith("job ")]
    assert len(told) == len(run.events("submitted")) > 5
    assert all("CANCELLED" in line for line in told), told
