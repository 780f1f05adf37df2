"""Ranks that are killed, stopped, or find a damaged file: the same command continues, to the very same bytes."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Job, command
from safetensors.torch import load_file, save_file
from tiny import tiny_run, write_model

from dist_spin.storage.atomic import read_lines
from dist_spin.storage.checkpoints import checkpoints, newest_checkpoint
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.distributed

STEPS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Where a tiny model and its tokens are, or will be."""
    return tmp_path_factory.mktemp("model")


class Runs:
    """Starts one run with any number of ranks, again and again."""

    def __init__(self, model: Path, place: Path) -> None:
        self.run, self.log = RunDir(place / "run"), place / "log"
        self.words = tiny_run(
            place,
            "optimize.batch_size=3",
            f"optimize.steps={STEPS}",
            "optimize.momentum=0.5",  # so that there is optimiser state to lose
            "optimize.reproject_every=5",
            "distributed.timeout_s=30",
            model=model,
            sequences=40,
        )

    def start(self, size: int, *more: str) -> Job:
        return Job(size, command, "optimize", *self.words, *more, log=self.log)

    def finish(self, size: int) -> bytes:
        job = self.start(size)
        assert job.wait() == [0] * size, self.said()
        return self.final()

    def final(self) -> bytes:
        return (self.run.rotations / "final.safetensors").read_bytes()

    def step(self) -> int:
        return max((step for step, _ in checkpoints(self.run)), default=0)

    def said(self) -> str:
        return self.log.read_text()

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_lines(self.run.path / "events.jsonl") if event["event"] == kind]


@pytest.fixture
def runs(model, tmp_path) -> Runs:
    return Runs(model, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> Runs:
    runs = Runs(model, tmp_path_factory.mktemp("uninterrupted"))
    runs.finish(2)
    return runs


@pytest.mark.parametrize("victims", [(1,), (0,), (0, 1)], ids=["one", "leader", "all"])
def test_killed_ranks_resume_to_the_same_bytes(runs, uninterrupted, victims):
    step = random.SystemRandom().randint(1, STEPS - 2)  # any moment will do, so every time another
    print(f"kill after step {step}")
    job = runs.start(2)
    job.wait_for(lambda: runs.step() >= step)
    job.signal(signal.SIGKILL, *victims)
    codes = job.wait()
    assert [codes[v] for v in victims] == [-signal.SIGKILL] * len(victims)
    for rank in {0, 1} - set(victims):  # the other notices, says so in one line, and asks for a restart
        assert codes[rank] == 4, runs.said()
        said = runs.said()
        assert f"rank {rank} of 2 on" in said
        assert "no answer from another rank" in said
        assert "Traceback" not in runs.said()
    assert not (runs.run.rotations / "final.safetensors").exists()
    assert runs.finish(2) == uninterrupted.final()
    assert "continuing after step" in runs.said()
    assert [line["step"] for line in read_lines(runs.run.path / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_every_stopping_signal_saves_and_the_same_command_continues(runs, uninterrupted):
    for number, (name, rank) in enumerate((("SIGTERM", 0), ("SIGINT", 1), ("SIGUSR1", 0), ("SIGUSR2", 1))):
        job = runs.start(2)
        job.wait_for(lambda number=number: runs.step() > 4 * number)
        job.signal(signal.Signals[name], rank)  # to one rank alone: the others learn of it
        assert job.wait() == [75, 75], runs.said()
        assert runs.said().count("dist-spin: stopped by a signal") == 1
        stopped = runs.events("interrupted")[-1]
        assert stopped["step"] == runs.step() < STEPS
        if rank == 0:
            assert stopped["signal"] == name
    assert runs.finish(2) == uninterrupted.final()


HOSTILE = (
    "optimize.optimizer=cayley_adam",
    "optimize.lr=1.5",
    "optimize.scale_lr=2",
    "optimize.schedule=constant",
    "optimize.objective=kl",
    "optimize.scales=true",
    "optimize.clips=true",
    "optimize.guard_every=3",
    "optimize.steps=9",
)


def test_a_guarded_run_resumes_to_the_same_bytes_and_never_ends_worse_than_it_started(model, tmp_path):
    whole, parts = Runs(model, tmp_path / "whole"), Runs(model, tmp_path / "parts")
    for runs in (whole, parts):
        runs.log.parent.mkdir()
        runs.words += HOSTILE
    whole.finish(2)
    job = parts.start(2)
    job.wait_for(lambda: parts.step() >= 4)
    job.signal(signal.SIGTERM, 0)
    assert job.wait() == [75, 75], parts.said()
    assert parts.finish(2) == whole.final()
    # Such rates do harm: the guard notices, and what it returns to is what it gives out.
    assert whole.events("back_off")
    start, end = whole.events("held_out")
    assert (start["step"], end["step"]) == (0, 9)
    assert start["loss"] >= end["best"]
    final = checkpoints(whole.run)[0]
    state = load_file(final[1])
    for name in ("R1", "R2", "transforms"):
        assert torch.equal(state[name], state[f"best.{name}"])
    # Another run that starts from the file measures it: what two ranks gave out is what they found best.
    again = Runs(model, tmp_path / "again")
    again.log.parent.mkdir()
    again.words += [*HOSTILE, "optimize.steps=1", f"rotation.load={whole.run.rotations / 'final.safetensors'}"]
    again.finish(1)
    assert again.events("held_out")[0]["loss"] == pytest.approx(end["best"], rel=1e-9)


def test_another_number_of_ranks_continues(runs, uninterrupted):
    for size, step in ((1, 1), (3, 8), (2, 16)):
        job = runs.start(size)
        job.wait_for(lambda step=step: runs.step() >= step)
        job.signal(signal.SIGTERM, size - 1)
        assert job.wait() == [75] * size, runs.said()
    runs.finish(4)
    assert [event["ranks"] for event in runs.events("resume")] == [3, 2, 4]
    expected = load_file(uninterrupted.run.rotations / "final.safetensors")
    found = load_file(runs.run.rotations / "final.safetensors")
    for name in ("R1", "R2"):
        assert (found[name] - expected[name]).abs().max() < 1e-9


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(runs, uninterrupted):
    job = runs.start(2)
    job.wait_for(lambda: runs.step() >= 4)
    job.signal(signal.SIGTERM, 0)
    assert job.wait() == [75, 75]
    (newest, path), (before, _) = checkpoints(runs.run)[:2]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(bytes(damaged))
    assert runs.finish(2) == uninterrupted.final()
    assert f"step_{newest:06d}.safetensors: checksum does not match" in runs.said()
    assert "using the checkpoint before it" in runs.said()
    assert runs.events("resume")[0]["step"] == before == newest - 1


def steps_logged(runs: Runs) -> list[int]:
    return [line["step"] for line in read_lines(runs.run.path / "metrics.jsonl")]


def test_no_step_stands_twice_after_a_kill_before_the_first_checkpoint(runs, uninterrupted):
    runs.run.path.mkdir()
    (runs.run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert runs.finish(1)
    assert steps_logged(runs) == list(range(1, STEPS + 1))


def test_a_run_that_lost_all_checkpoints_begins_again_to_the_same_bytes(runs, uninterrupted):
    job = runs.start(2)
    job.wait_for(lambda: runs.step() >= 4)
    job.signal(signal.SIGTERM, 0)
    assert job.wait() == [75, 75]
    for _, path in checkpoints(runs.run):
        path.write_bytes(path.read_bytes()[:-7])
    assert runs.finish(2) == uninterrupted.final()
    assert "learning begins again" in runs.said()
    assert steps_logged(runs) == list(range(1, STEPS + 1))


def test_checkpoints_deleted_before_the_end_are_said_and_their_lines_kept(runs, uninterrupted):
    job = runs.start(2)
    job.wait_for(lambda: runs.step() >= 4)
    job.signal(signal.SIGTERM, 0)
    assert job.wait() == [75, 75]
    learned = steps_logged(runs)
    for _, path in checkpoints(runs.run):
        path.unlink()
    assert runs.finish(2) == uninterrupted.final()
    assert "holds no checkpoint of the steps in metrics.jsonl: learning begins again" in runs.said()
    assert [line["step"] for line in read_lines(runs.run.path / "metrics.stale")] == learned
    assert steps_logged(runs) == list(range(1, STEPS + 1))


def test_a_finished_run_needs_no_checkpoints(runs, uninterrupted):
    shutil.copytree(uninterrupted.run.path, runs.run.path)
    final = runs.final()
    before = (runs.run.path / "metrics.jsonl").read_bytes()
    for _, path in checkpoints(runs.run):
        path.unlink()
    assert runs.finish(1) == final
    assert "are complete" in runs.said()
    assert (runs.run.path / "metrics.jsonl").read_bytes() == before
    assert len(runs.events("start")) == 1
    assert not checkpoints(runs.run)


def test_damaged_results_are_made_again_from_the_last_checkpoint(runs, uninterrupted):
    for name in ("final.safetensors", "R.bin"):
        before = runs.finish(2), (runs.run.rotations / "R.bin").read_bytes()
        damaged = bytearray((runs.run.rotations / name).read_bytes())
        damaged[len(damaged) // 2] ^= 4
        (runs.run.rotations / name).write_bytes(bytes(damaged))
        assert (runs.finish(2), (runs.run.rotations / "R.bin").read_bytes()) == before
        assert runs.final() == uninterrupted.final()
        assert "making it again from" in runs.said()
        assert steps_logged(runs) == list(range(1, STEPS + 1))


def test_a_signal_is_noticed_between_two_micro_batches(runs):
    """One step takes far longer than this test; nothing of it is taken, and nothing of it is written."""
    job = runs.start(2, "optimize.batch_size=20000", "optimize.micro_batch_size=1")
    job.wait_for(lambda: bool(runs.events("start")))
    time.sleep(0.5)  # into the first step
    job.signal(signal.SIGTERM, 1)  # to one rank: the other learns of it
    began = time.monotonic()
    assert job.wait() == [75, 75], runs.said()
    assert time.monotonic() - began < 10
    assert steps_logged(runs) == []
    assert runs.step() == 0
    assert "Traceback" not in runs.said()


def test_a_second_ctrl_c_ends_a_stage_at_once(runs, uninterrupted):
    job = runs.start(1, "optimize.batch_size=20000", "optimize.micro_batch_size=20000")
    job.wait_for(lambda: bool(runs.events("start")))
    time.sleep(0.5)  # into the first step
    job.signal(signal.SIGINT, 0)
    time.sleep(0.5)
    job.signal(signal.SIGINT, 0)
    assert job.wait() == [130], runs.said()
    assert "ended at once by a second ctrl-C" in runs.said()
    assert "Traceback" not in runs.said()


def test_a_finished_run_does_nothing_again(uninterrupted):
    before = uninterrupted.final(), (uninterrupted.run.path / "metrics.jsonl").read_text()
    job = uninterrupted.start(2)
    assert job.wait() == [0, 0]
    assert "are complete" in uninterrupted.said()
    assert (uninterrupted.final(), (uninterrupted.run.path / "metrics.jsonl").read_text()) == before


def test_a_changed_run_is_refused_by_field_on_every_rank(uninterrupted, tmp_path, model):
    other = write_model("gqa_tied", tmp_path / "other", seed=1)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(1).integers(3, 97, (40, 20)))
    before = uninterrupted.final()
    for change, field in (
        ("optimize.lr=1.0", "optimize.lr = 1.5 and now has 1.0"),
        ("quant.a_bits=8", "quant.a_bits = 4 and now has 8"),
        ("rotation.seed=3", "rotation.seed = 0 and now has 3"),
        (f"model.path={other}", "model weights = "),
        (f"optimize.source=tokens:{tmp_path / 'tokens.npy'}", "learning data = "),
    ):
        size = 2 if change.startswith("model") else 1
        job = uninterrupted.start(size, change)
        assert job.wait() == [2] * size, uninterrupted.said()
        lines = [line for line in uninterrupted.said().splitlines() if line.startswith("dist-spin: ")]
        assert len(lines) == 1
        assert field in lines[0]
        assert "Traceback" not in uninterrupted.said()
    for free in ("optimize.micro_batch_size=3", "optimize.keep_checkpoints=9"):  # only how it is computed
        assert uninterrupted.start(1, free).wait() == [0]
    assert uninterrupted.final() == before


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_what_was_good(runs, tmp_path):
    poisoned = write_model("mha", tmp_path / "poisoned")
    weights = load_file(poisoned / "model.safetensors")
    weights["model.embed_tokens.weight"][96] = 0  # whose norm divides by zero without an epsilon
    save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
    settings = json.loads((poisoned / "config.json").read_text())
    (poisoned / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.0}))
    tokens = np.random.default_rng(0).integers(3, 96, (40, 20))
    tokens[3 * 3 + 1, 7] = 96  # in the fourth batch of three
    np.save(tmp_path / "tokens.npy", tokens)
    more = (f"model.path={poisoned}", f"optimize.source=tokens:{tmp_path / 'tokens.npy'}", "optimize.seed=-1")
    for _ in range(2):  # the second start meets the same step again
        job = runs.start(2, *more)
        assert job.wait() == [3, 3], runs.said()
        assert "dist-spin: step 4: loss nan" in runs.said()
        assert "the state after step 3 is kept" in runs.said()
        assert "Traceback" not in runs.said()
        found = newest_checkpoint(runs.run, pytest.fail)
        assert found is not None
        assert found[1]["step"] == "3"
        assert all(tensor.isfinite().all() for tensor in found[0].values())
        assert checkpoints(runs.run)[0][0] == 3
        assert not (runs.run.rotations / "final.safetensors").exists()
