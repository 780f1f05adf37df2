"""A whole run with everything learned: what learning measured is what the merged model gives; a guard's decisions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_run

from dist_spin.compare.plan import at_bits
from dist_spin.compare.stage import Comparison
from dist_spin.config.loader import load_config
from dist_spin.errors import NumericsError, UserError
from dist_spin.evaluate.stage import evaluate
from dist_spin.model.sites_config import CLIP_SITES
from dist_spin.optimize.best_state import BestState
from dist_spin.optimize.train import train
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import build_variant
from dist_spin.quantize.stage import quantize
from dist_spin.runtime.distributed import start, stop
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.quantized_layers import load_layer
from dist_spin.storage.rotations import load_transforms
from dist_spin.storage.run_directory import LEARNED, RunDir, run_dir


def settings(place: Path, *more: str) -> list[str]:
    return tiny_run(
        place,
        "optimize.batch_size=3",
        "optimize.micro_batch_size=3",
        "optimize.steps=3",
        "optimize.optimizer=cayley_adam",
        "optimize.lr=0.02",
        "optimize.scale_lr=0.1",
        "optimize.scales=true",
        "optimize.clips=true",
        "optimize.guard_every=1",
        "quantize.n_sequences=6",
        f"evaluate.sources=[tokens:{place / 'held-out.npy'}#all]",
        "evaluate.unquantized_weights=true",
        *more,
        kind="biases",
        split="#all",
    )


@pytest.fixture
def place(tmp_path) -> Path:
    settings(tmp_path)
    np.save(tmp_path / "held-out.npy", np.load(tmp_path / "model" / "tokens.npy")[-8:])
    return tmp_path


@pytest.fixture
def world(restored_process):
    yield start("cpu", 60, 1)
    stop()


def test_the_merged_model_has_the_loss_that_learning_measured(place, world):
    config, run = load_config(None, settings(place)), RunDir(place / "run")
    train(config, world)
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
    train(load_config(None, settings(place, *wild)), world)
    events = read_lines(place / "wild" / "events.jsonl")
    assert [line for line in events if line["event"] == "back_off"]
    ends = [line for line in events if line["event"] == "held_out"]
    assert ends[-1]["best"] <= ends[0]["loss"]
    with pytest.raises(NumericsError, match="not finite"):
        train(load_config(None, settings(place, *wild, "name=unguarded", "optimize.guard_every=0")), world)


@pytest.mark.parametrize("objective", ["cross_entropy", "kl"])
def test_a_hostile_learning_rate_ends_no_worse_than_it_started(place, world, objective):
    """The rotations, scales and clips that come out, measured by another run that starts from their file."""
    rates = ("optimize.lr=1.5", "optimize.scale_lr=3", "optimize.clip_lr=3", "optimize.schedule=constant")
    words = [*settings(place, *rates), "optimize.guard_every=3", f"optimize.objective={objective}"]
    train(load_config(None, [*words, "name=hostile", "optimize.steps=7"]), world)
    events = read_lines(place / "hostile" / "events.jsonl")
    assert [line for line in events if line["event"] == "back_off"]
    given = f"rotation.load={place / 'hostile' / 'rotations' / 'final.safetensors'}"
    train(load_config(None, [*words, "name=again", "optimize.steps=1", given]), world)
    started, ended = (
        next(line for line in read_lines(place / name / "events.jsonl") if line["event"] == "held_out")["loss"]
        for name in ("hostile", "again")
    )
    assert ended <= started * (1 + 1e-9)
    best = [line["best"] for line in events if line["event"] == "held_out"][-1]
    assert ended == pytest.approx(best, rel=1e-9)


OFF = ("quant.a_bits=16", "quant.k_bits=16", "quant.v_bits=16")


def test_where_nothing_is_rounded_at_run_time_learning_rounds_to_other_bits(place, world):
    """W4A16: learned at 4 bits, everything merges, and without rounded weights the model is the original one."""
    with pytest.raises(UserError, match=r"nothing to learn; set optimize\.a_bits=4"):
        train(load_config(None, settings(place, *OFF)), world)
    config = load_config(None, settings(place, *OFF, "optimize.a_bits=4", "name=weights"))
    train(config, world)
    losses = [line["loss"] for line in read_lines(place / "weights" / "metrics.jsonl")]
    assert len(set(losses)) == 3
    learned = load_transforms(place / "weights" / "rotations" / "final.safetensors")
    assert bool((learned["clip"] == 1).all())  # they were of another width
    assert all(float(s.log().abs().max()) > 0.01 for name, s in learned.items() if name != "clip")
    quantize(config, world)
    exact, merged, rounded = (row["ppl"] for row in evaluate(config, world))
    assert merged == pytest.approx(exact, rel=1e-9)
    assert abs(rounded - exact) > 1e-6 * exact


def test_rotations_alone_may_be_learned_from_rounded_weights(place, world):
    plain = ("optimize.scales=false", "optimize.clips=false", "optimize.w_bits=4", "optimize.guard_every=0")
    train(load_config(None, settings(place, *OFF, *plain)), world)
    steps = read_lines(place / "run" / "metrics.jsonl")
    assert len(steps) == 3
    assert all(min(line["angle_r1"], line["angle_r2"], line["grad_norm"]) > 1e-6 for line in steps)


def test_a_comparison_applies_clips_at_the_bits_they_were_learned_at(place, world):
    config = load_config(None, settings(place))
    train(config, world)
    files = open_configured_model(config)
    learned = build_variant(config, files, LEARNED, world.device)
    work = Comparison(config, world, files, StopRequest(), {})
    clips = learned.sites.clips
    assert clips is not None
    assert bool((clips < 1).all())
    for bits, kept in (((4, 4, 4), CLIP_SITES), ((4, 8, 8), ()), ((4, 16, 16), ()), ((4, 4, 8), CLIP_SITES[:4])):
        sites = work.at_sites(learned, at_bits(config, "gptq", bits), config).sites
        expected = torch.stack(
            [clips[:, i] if site in kept else torch.ones(2) for i, site in enumerate(CLIP_SITES)], -1
        )
        assert torch.equal(sites.clips, expected)
        assert sites.layer(1).a.bits == bits[1]


def test_a_file_of_learned_rotations_gives_its_clips_to_the_bits_they_were_learned_at(place, world):
    config = load_config(None, settings(place))
    train(config, world)
    final = run_dir(config).rotations / "final.safetensors"
    for name, bits, kept in (("same", 4, CLIP_SITES), ("keys", 8, ("v",))):
        more = [f"name={name}", f"rotation.load={final}", "optimize.steps=0", f"quant.k_bits={bits}"]
        more += [f"quant.a_bits={bits}"]
        given = load_config(None, settings(place, *more))
        train(given, world)
        clips = build_variant(given, open_configured_model(given), LEARNED, world.device).sites.clips
        learned = load_transforms(final)["clip"]
        assert clips is not None
        for i, site in enumerate(CLIP_SITES):
            assert torch.equal(clips[:, i], learned[:, i] if site in kept else torch.ones(2, dtype=learned.dtype))


@pytest.mark.parametrize(
    "widths", [("quant.a_bits=8",), ("quant.w_group_size=16",), ("quant.k_bits=8", "quant.a_bits=8")]
)
def test_other_widths_go_through_learning_rounding_and_measuring(place, world, widths):
    config = load_config(None, settings(place, *widths))
    train(config, world)
    quantize(config, world)
    exact, merged, rounded = (row["ppl"] for row in evaluate(config, world))
    assert all(0.5 < ppl / exact < 2 for ppl in (merged, rounded))


def test_groups_that_do_not_fit_the_model_are_refused_in_one_line(place, world):
    for stage, more in ((train, ()), (quantize, ("name=given", "optimize.steps=0"))):
        for which in "wa":
            config = load_config(None, settings(place, f"quant.{which}_group_size=32", *more))
            said = f"{which}_group_size=32 does not divide this model's input sizes 48, 80; use 16,"
            with pytest.raises(UserError, match=said):
                stage(config, world)


def test_a_guard_keeps_the_best_and_returns_to_it():
    masters = {"R1": torch.zeros(3)}
    best_state = BestState(masters)
    losses = [(1.0, 2.0, False), (2.0, 1.0, False), (3.0, 1.02, False), (4.0, 1.2, True), (5.0, math.nan, True)]
    for value, loss, jumped in losses:
        masters["R1"].fill_(value)
        best_state.moved()
        assert best_state.update(loss) is jumped
        assert float(masters["R1"][0]) == (2.0 if jumped else value)
    assert (best_state.best_loss, best_state.factor, best_state.at_best) == (1.0, 0.25, True)
    later = BestState({"R1": torch.zeros(3)})
    later.load({name: tensor.clone() for name, tensor in best_state.state().items()})
    assert (later.best_loss, later.factor, later.at_best) == (1.0, 0.25, True)
