"""The sbatch scripts on a real Slurm: several nodes, preemption, another number of nodes, what a user gets wrong."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.slurm.harness import Cluster, Run

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]
SCRIPT = "slurm/optimize.sbatch"
MOMENTUM = 0.1  # so that checkpoints hold gradients: m(t) = MOMENTUM m(t-1) + g(t)
STEPS = {"optimize__steps": 30, "optimize__momentum": MOMENTUM, "optimize__keep_checkpoints": 30}


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    """The run in one process, undisturbed."""
    run = Run(tmp_path_factory.mktemp("alone"), model, **STEPS)
    cluster.dist_spin("optimize", str(run.config))
    return run


def gradients(run: Run) -> list[Tensor]:
    """The reduced and clipped gradient of R1 and of R2 in each step."""
    paths = sorted((run.path / "rotations").glob("step_*.safetensors"))
    assert len(paths) == STEPS["optimize__steps"]
    kept = [load_file(path) for path in paths]
    first = [kept[0]["momentum1"], kept[0]["momentum2"]]
    later = [b[m] - MOMENTUM * a[m] for a, b in itertools.pairwise(kept) for m in ("momentum1", "momentum2")]
    return first + later


def assert_same(run: Run, alone: Run) -> None:
    for ours, theirs in zip(gradients(run), gradients(alone), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-6 * float(theirs.abs().max())  # element by element
    ours, theirs = (load_file(r.path / "rotations" / "final.safetensors") for r in (run, alone))
    for name in ("R1", "R2"):
        assert float((ours[name] - theirs[name]).abs().max()) < 1e-9
    for a, b in zip(run.lines("metrics.jsonl"), alone.lines("metrics.jsonl"), strict=True):
        assert a["step"] == b["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)


def test_two_nodes_learn_what_one_process_learns(
    cluster: Cluster, make_run: Callable[..., Run], alone: Run, tmp_path: Path
) -> None:
    run, log = make_run(**STEPS), tmp_path / "log"
    job = cluster.sbatch(f"--output={log}", SCRIPT, str(run.config))
    assert cluster.wait(job, log) == "COMPLETED", log.read_text()
    assert run.events("start")[0]["ranks"] == 4
    assert_same(run, alone)


def test_preempted_saves_queues_again_and_ends_the_same_on_fewer_nodes(
    cluster: Cluster, make_run: Callable[..., Run], alone: Run, tmp_path: Path
) -> None:
    run, log = make_run(**STEPS), tmp_path / "log"
    job = cluster.sbatch(f"--output={log}", SCRIPT, str(run.config))
    cluster.until(lambda: run.step >= 2, 120, log.read_text)
    high = cluster.sbatch("--partition=high", "--nodes=2", "--cpus-per-task=2", "--wrap=sleep 1", "--output=/dev/null")
    cluster.wait(high)
    stopped = run.events("interrupted")[0]["step"]
    assert 2 <= stopped < 30
    assert "queues itself again (exit code 75)" in log.read_text()
    cluster.until(lambda: cluster.hurry(job) or run.step > stopped, 120, log.read_text)
    cluster.call("scancel", job)  # it saves once more, and stays away
    cluster.wait(job, log)
    job = cluster.sbatch("--nodes=1", f"--output={log}", SCRIPT, str(run.config))
    assert cluster.wait(job, log) == "COMPLETED", log.read_text()
    resumed = [(event["step"], event["ranks"]) for event in run.events("resume")]
    assert resumed[0] == (stopped, 4)
    assert resumed[1][0] > stopped
    assert resumed[1][1] == 2
    assert_same(run, alone)


@pytest.mark.parametrize(("number", "node"), [(signal.SIGSTOP, 1), (signal.SIGKILL, 0)], ids=["hangs", "killed"])
def test_a_lost_rank_queues_the_job_again(
    cluster: Cluster,
    make_run: Callable[..., Run],
    alone: Run,
    tmp_path: Path,
    number: signal.Signals,
    node: int,
) -> None:
    run, log = make_run(**STEPS, distributed__timeout_s=8), tmp_path / "log"
    job = cluster.sbatch(f"--output={log}", SCRIPT, str(run.config), RANKS="1")
    cluster.until(lambda: run.step >= 2, 120, log.read_text)
    os.kill(cluster.ranks(f"n{node + 1}")[0], number)
    cluster.until(lambda: "queues itself again" in log.read_text(), 120, log.read_text)
    assert "no answer from another rank" in log.read_text()
    ended = cluster.wait(job, log)
    assert ended == "COMPLETED", log.read_text() + cluster.call("scontrol", "show", "job", job).stdout
    assert run.events("resume")[0]["step"] >= 2
    assert_same(run, alone)


def test_a_shared_path_that_a_node_does_not_see(cluster: Cluster, make_run: Callable[..., Run], tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.sbatch(f"--output={log}", SCRIPT, str(make_run().config), ROOT="/not/shared")
    assert cluster.wait(job) == "FAILED"
    assert "does not see ROOT=/not/shared; put the repository on a shared file system" in log.read_text()


def test_a_job_that_asked_for_no_gpu_on_a_node_that_has_some(
    cluster: Cluster, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    config, log = str(make_run().config), tmp_path / "log"
    asked = ["--nodes=1", "--nodelist=n3", f"--output={log}", SCRIPT, config, "distributed.device=auto"]
    assert cluster.wait(cluster.sbatch(*asked), log, seconds=300) == "FAILED"
    assert (
        "this job asked Slurm for no GPU, and its node has gpu:1; ask for GPUs (--gpus-per-node=N)" in log.read_text()
    )


def test_pipeline_script_goes_from_nothing_to_results(
    cluster: Cluster, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(optimize__steps=2, quantize__layers_per_job=2)
    logs = {"SBATCH_OUTPUT": str(tmp_path / "log-%j"), "OPTIMIZE_OPTIONS": "--nodes=1"}
    said = cluster.call("slurm/pipeline.sh", str(run.config), "rotation.seed=3", **logs).stdout
    jobs = [line.split("job ")[1].split(",")[0] for line in said.splitlines()]
    stages = ["optimize", "boundaries", "quantize", "evaluate", "report"]
    assert [line.partition(":")[0] for line in said.splitlines()] == stages
    assert cluster.wait(jobs[-1], seconds=300) == "COMPLETED", said
    assert {row["seed"] for row in run.results} == {3}
    assert "learned rotation" in (run.path / "report.md").read_text()
    assert "Not there yet" not in (run.path / "report.html").read_text()
    assert {tuple(event["hosts"]) for event in run.events("job") if event["part"] in ("0-2", "2-4")} != {()}
    text = cluster.dist_spin("status", str(run.path)).stdout
    assert "learned: 4 layers finished" in text
    assert text.count("COMPLETED") == 6  # the array has two tasks
