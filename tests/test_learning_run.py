"""A whole run with everything learned: what learning measured is what the merged model gives; a guard's decisions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model

from dist_spin.config import load_config
from dist_spin.distributed import start, stop
from dist_spin.engine.guard import Guard
from dist_spin.errors import NumericsError
from dist_spin.layer_files import load_layer
from dist_spin.rotation_files import load_transforms
from dist_spin.rundir import RunDir, read_lines
from dist_spin.stages.evaluate import evaluate
from dist_spin.stages.optimize import optimize
from dist_spin.stages.quantize import quantize


def settings(place: Path, *more: str) -> list[str]:
    return [
        f"output_dir={place}",
        f"model.path={place / 'model'}",
        "model.dtype=float64",
        f"optimize.source=tokens:{place / 'learn.npy'}#all",
        "optimize.seq_len=20",
        "optimize.batch_size=3",
        "optimize.micro_batch_size=3",
        "optimize.steps=3",
        "optimize.optimizer=cayley_adam",
        "optimize.lr=0.02",
        "optimize.scale_lr=0.1",
        "optimize.scales=true",
        "optimize.clips=true",
        "optimize.guard_every=1",
        f"quantize.source=tokens:{place / 'learn.npy'}#all",
        "quantize.seq_len=20",
        "quantize.n_sequences=6",
        f"evaluate.sources=[tokens:{place / 'held-out.npy'}#all]",
        "evaluate.seq_len=20",
        "evaluate.split=all",
        "evaluate.unquantized_weights=true",
        *more,
    ]


@pytest.fixture
def place(tmp_path) -> Path:
    write_model("biases", tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 97, (30, 20))
    np.save(tmp_path / "learn.npy", tokens)
    np.save(tmp_path / "held-out.npy", tokens[-8:])
    return tmp_path


@pytest.fixture
def world(restored_process):
    yield start("cpu", 60, 1)
    stop()


def test_the_merged_model_has_the_loss_that_learning_measured(place, world):
    config, run = load_config(None, settings(place)), RunDir(place / "run")
    optimize(config, world)
    end = [line for line in read_lines(run.path / "events.jsonl") if line["event"] == "held_out"][-1]
    quantize(config, world)
    rows = {row["weights"]: row for row in evaluate(config, world) if row["a_bits"] == 4}
    assert math.log(rows["none"]["ppl"]) == pytest.approx(end["best"], rel=1e-9)
    learned = load_transforms(run.rotations / "final.safetensors")
    assert set(learned) == {
        "clip",
        *(f"scale.{name}" for name in ("input_layernorm", "post_attention_layernorm", "up", "value", "key")),
    }
    # GPTQ worked on the scaled layer, and its files carry the scales that became gains.
    layer = load_layer(run.layers() / "001.safetensors")[0]
    torch.testing.assert_close(layer.others["input_layernorm.weight"], learned["scale.input_layernorm"][1])


def test_a_loss_that_turns_infinite_is_backed_off_from_and_one_that_starts_so_is_an_error(place, world):
    wild = ("name=wild", "optimize.scale_lr=1e6", "optimize.steps=4", "optimize.guard_every=4")
    optimize(load_config(None, settings(place, *wild)), world)
    events = read_lines(place / "wild" / "events.jsonl")
    assert [line for line in events if line["event"] == "back_off"]
    ends = [line for line in events if line["event"] == "held_out"]
    assert ends[-1]["best"] <= ends[0]["loss"]
    with pytest.raises(NumericsError, match="not finite"):
        optimize(load_config(None, settings(place, *wild, "name=unguarded", "optimize.guard_every=0")), world)


@pytest.mark.parametrize("objective", ["cross_entropy", "kl"])
def test_a_hostile_learning_rate_ends_no_worse_than_it_started(place, world, objective):
    """The rotations, scales and clips that come out, measured by another run that starts from their file."""
    rates = ("optimize.lr=1.5", "optimize.scale_lr=3", "optimize.clip_lr=3", "optimize.schedule=constant")
    words = [*settings(place, *rates), "optimize.guard_every=3", f"optimize.objective={objective}"]
    optimize(load_config(None, [*words, "name=hostile", "optimize.steps=7"]), world)
    events = read_lines(place / "hostile" / "events.jsonl")
    assert [line for line in events if line["event"] == "back_off"]
    given = f"rotation.load={place / 'hostile' / 'rotations' / 'final.safetensors'}"
    optimize(load_config(None, [*words, "name=again", "optimize.steps=1", given]), world)
    started, ended = (
        next(line for line in read_lines(place / name / "events.jsonl") if line["event"] == "held_out")["loss"]
        for name in ("hostile", "again")
    )
    assert ended <= started * (1 + 1e-9)
    best = [line["best"] for line in events if line["event"] == "held_out"][-1]
    assert ended == pytest.approx(best, rel=1e-9)


def test_a_guard_keeps_the_best_and_returns_to_it():
    masters = {"R1": torch.zeros(3)}
    guard = Guard(masters)
    losses = [(1.0, 2.0, False), (2.0, 1.0, False), (3.0, 1.02, False), (4.0, 1.2, True), (5.0, math.nan, True)]
    for value, loss, jumped in losses:
        masters["R1"].fill_(value)
        guard.moved()
        assert guard.judge(loss) is jumped
        assert float(masters["R1"][0]) == (2.0 if jumped else value)
    assert (guard.best_loss, guard.factor, guard.at_best) == (1.0, 0.25, True)
    later = Guard({"R1": torch.zeros(3)})
    later.load({name: tensor.clone() for name, tensor in guard.state().items()})
    assert (later.best_loss, later.factor, later.at_best) == (1.0, 0.25, True)
