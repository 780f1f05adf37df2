"""`dist-spin bench scaling`: its parts on numbers worked out by hand, and all of it on real measurements of 1 and 2 ranks."""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import Job, command
from tiny import write_model

from dist_spin.bench import scaling_model as model
from dist_spin.bench.optimize import step_flop
from dist_spin.bench.options import add_arguments
from dist_spin.bench.quantize import measure
from dist_spin.bench.scaling import HEADER, read, run
from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.runtime.distributed import World

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("restored_process")]

# A decoder layer of 4 * 16 + 3 * 4 * 10 = 184 weights, 368 bytes; embedding and head 4 * 25 = 100 weights, 200 bytes each.
SHAPE = Shape(hidden=4, intermediate=10, heads=2, kv_heads=2, head_dim=2, layers=3, vocab=25)
FREE = model.Machine(link=1e30, copy=1e30, contention=0.0, memory=1 << 40)


def point(ranks: int = 1, sequences: int = 4, micro: int = 2, level: str = "none", layers: int = 3) -> model.Point:
    return model.Point(ranks, ranks, sequences, 8, layers, 16, micro, {level: layers})


def test_forward_and_backward_are_the_flop_that_percentages_are_of():
    for shape in (SHAPE, Shape(48, 80, 4, 2, 16, 2, 97)):
        forward, backward = model.layer_flop(shape, 8, 16)
        tokens = 40
        assert tokens * (shape.layers * (forward + backward) + 4 * shape.vocab * shape.hidden) == step_flop(
            shape, 40, 8
        )


def test_flop_of_a_layer_by_hand():
    forward, backward = model.layer_flop(SHAPE, 8, 16)
    linears, attention = 2 * 184, 2 * 4 * 8
    assert forward == linears + attention + 8 * 16  # two sites, two products of [4, 4]
    assert backward == linears + 2.5 * attention + 4 * 16
    _, backward4 = model.layer_flop(SHAPE, 8, 4)
    assert backward4 == 2 * linears + 2.5 * attention + 2 * 16 * 7  # five of [4, 4]; o's [4, q]; v's [kv, 4]


@pytest.mark.parametrize(
    ("gather", "compute", "contention", "cost"),
    [(2, 5, 0, 0), (2, 5, 0.5, 1), (7, 5, 0, 2), (7, 5, 0.5, 4.5), (7, 5, 1, 7), (0, 5, 1, 0)],
)
def test_a_gather_hides_behind_compute_unless_it_is_longer(gather, compute, contention, cost):
    assert model.hidden_cost(gather, compute, contention) == cost


def test_a_pass_gathers_every_layer_twice_and_the_ends_once():
    machine = model.Machine(link=10.0, copy=20.0, contention=0.0, memory=1)
    # No compute to hide behind: all that a rank receives is in the open.
    compute, copies, gather, gathered = model.layers_time(SHAPE, point(2), model.Fit(1e30, 0), machine)
    moved = 3 * 2 * 368 + 2 * 200
    assert gathered == moved / 2  # the other rank's half, in one pass of two sequences
    assert gather == pytest.approx(gathered / 10)
    assert copies == pytest.approx(2 * moved / 20)
    assert compute == pytest.approx(0)
    # Four sequences on one rank: two passes, nothing to receive.
    compute, copies, gather, gathered = model.layers_time(SHAPE, point(1), model.Fit(100.0, 0.5), machine)
    assert (gather, gathered, copies) == (0, 0, pytest.approx(2 * 2 * moved / 20))
    head = 4 * 100 * 32 / 100  # seconds
    once = step_flop(SHAPE, 32, 8) / 100 - head
    assert compute == pytest.approx(once + head + 2 * 3 * 0.5)
    twice = model.Point(1, 1, 4, 8, 3, 16, 2, {"none": 1, "sites": 2})  # a fifth of two layers is computed again
    compute, *_ = model.layers_time(SHAPE, twice, model.Fit(100.0, 0.5), machine)
    assert compute == pytest.approx(once * (1 + 0.2 * 2 / 3) + head + 2 * 3 * 0.5)


@pytest.mark.parametrize("contention", [0.0, 0.4, 1.0])
def test_the_fit_finds_what_made_the_measurements(contention):
    machine = model.Machine(link=2e3, copy=1e5, contention=contention, memory=1)
    true = model.Fit(rate=3e4, overhead=0.2)
    for ranks in (1, 2):
        points = [point(ranks, 4, 1), point(ranks, 4, 2, "sites"), point(ranks, 8, 4, "layer"), point(ranks, layers=2)]
        measured = [(p, sum(model.layers_time(SHAPE, p, true, machine)[:3])) for p in points]
        found = model.fit(SHAPE, measured, machine)
        assert found.rate == pytest.approx(true.rate, rel=1e-6)
        assert found.overhead == pytest.approx(true.overhead, rel=1e-6)
        alone = model.fit(SHAPE, measured[:1], machine)  # all of it counts as products
        assert alone.overhead == 0
        assert sum(model.layers_time(SHAPE, points[0], alone, machine)[:3]) == pytest.approx(measured[0][1])


def test_gathers_that_take_longer_than_the_step_are_refused():
    slow = model.Machine(link=1.0, copy=1e30, contention=0.0, memory=1)
    with pytest.raises(ValueError, match="longer than was measured"):
        model.fit(SHAPE, [(point(2), 1.0)], slow)


def test_parts_outside_of_the_layers():
    machine = model.Machine(link=64.0, copy=1e30, contention=0.0, memory=1)
    fixed = model.Fixed(ranks=2, reduce=5.0, cayley=3.0, checkpoint_wait=0.1, requantize=9.0)
    # R1 has 4 * 16 bytes: a rank receives 1/2 of them at 2 ranks and 3/4 at 4; the products go from 2.5 s to half of that.
    assert model.cayley_time(SHAPE, 2, fixed, machine) == pytest.approx(3.0)
    assert model.cayley_time(SHAPE, 4, fixed, machine) == pytest.approx(1.25 + 0.75)
    # The gradient has 4 * (16 + 3 * 4) bytes, 1.75 s on the link: a ring sends it once at 2 ranks, 1.5 times at 4.
    assert model.reduce_time(SHAPE, 3, 2, fixed, machine) == pytest.approx(5.0)
    assert model.reduce_time(SHAPE, 3, 4, fixed, machine) == pytest.approx(5.0 + 0.5 * 1.75)
    # v, o and down of three layers: 2 * 3 * 4 * (4 + 4 + 10) bytes, 6.75 s.
    assert model.requantize_time(SHAPE, point(2), fixed, machine) == pytest.approx(9.0)
    assert model.requantize_time(SHAPE, point(4), fixed, machine) == pytest.approx((9 - 3.375) / 2 + 5.0625)


def test_more_ranks_divide_compute_and_weights_and_nothing_else():
    machine = model.Machine(link=1e3, copy=1e5, contention=0.2, memory=1)
    fixed = model.Fixed(ranks=1, reduce=0.1, cayley=0.2, checkpoint_wait=0.3, requantize=0.0)
    one, four = (model.predict(SHAPE, point(n, 8, 2), model.Fit(1e5, 0.0), fixed, machine) for n in (1, 4))
    assert four.compute == pytest.approx(one.compute / 4)
    assert four.checkpoint_wait == one.checkpoint_wait == 0.3
    assert one.gather == one.gathered == 0 < four.gather
    parts = (four.compute, four.copies, four.gather, four.requantize, four.reduce, four.cayley, four.checkpoint_wait)
    assert four.step == pytest.approx(sum(parts))
    assert one.memory - four.memory == pytest.approx((3 * 368 + 400) * 3 / 4)


def test_a_plan_keeps_as_much_as_fits():
    roomy = model.planned(SHAPE, 2, 2, 6, 8, 3, 16, FREE)
    assert (roomy.share, roomy.micro, roomy.micro_batches, roomy.levels) == (3, 3, 1, {"none": 3})
    cramped = model.planned(SHAPE, 2, 2, 6, 8, 3, 16, model.Machine(1, 1, 0, 1 << 30))
    assert (cramped.micro, cramped.micro_batches, cramped.levels) == (1, 3, {"layer": 3})


def test_a_whole_run_by_hand():
    common = {"step": 2.0, "steps": 10, "loading": 3.0, "layer": 4.0, "forward": 1.0, "merge": 0.5}
    common |= {"states_bytes": 100.0, "model_bytes": 50.0, "disk": 10.0, "starting": 1.0}
    found = model.pipeline(7, 2, per_job=2, **common)  # jobs of 2, 2, 2 and 1 layers on two devices
    assert found == {"learning": 24.0, "boundaries": 1 + 6 * 1.5 + 30, "gptq": 2 * 9.0, "assembly": 6.0}
    assert model.pipeline(7, 2, per_job=7, **common)["boundaries"] == 0


def counted_gathers(words: list[str], out: Path) -> None:
    """A rank that counts in one backward pass what FSDP2 gathers, by module, and the passes; saved to `out` by rank 0."""
    from dist_spin.config.loader import load_config
    from dist_spin.optimize.setup import build_training
    from dist_spin.optimize.train import forward_backward
    from dist_spin.runtime import distributed

    config = load_config(None, words)
    world = distributed.start("cpu", 60, 1)
    learning = build_training(config, world)
    forward_backward(learning)  # the first pass of all sets hooks up
    with torch.profiler.profile() as profile:
        forward_backward(learning)
    names = [event.name for event in profile.events()]
    prefix = "FSDP::all_gather ("
    counts = Counter(name.removeprefix(prefix).rstrip(")") for name in names if name.startswith(prefix))
    if world.is_rank0:
        out.write_text(json.dumps(counts))
    distributed.stop()


def test_the_engine_gathers_what_the_model_says(words, tmp_path):
    job = Job(2, counted_gathers, [*words, f"output_dir={tmp_path}"], tmp_path / "counts", log=tmp_path / "log")
    assert job.wait() == [0, 0], job.log.read_text()
    micro_batches = point(2, sequences=5, micro=1).micro_batches
    assert json.loads((tmp_path / "counts").read_text()) == {
        "embed": micro_batches,
        "layers.0": 2 * micro_batches,
        "layers.1": 2 * micro_batches,
        "head": micro_batches,
    }


def narrow_command(*words: str) -> int:
    """`dist-spin WORDS` with one thread per rank however many ranks there are; the benchmark takes its share of the cores."""
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())
    return command(*words)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A shape, and files of `bench optimize` from one rank (several configurations) and from two."""
    place = tmp_path_factory.mktemp("bench")
    write_model("mha", place / "shape")
    words = ["bench", "optimize", str(place / "shape"), "--steps", "1", "model.dtype=float32", "optimize.seq_len=32"]
    for ranks, more in ((1, ["--sequences", "2,4", "--layers", "1,2"]), (2, ["--sequences", "4"])):
        job = Job(ranks, narrow_command, *words, *more, "--json", str(place / f"{ranks}.json"), log=place / "log")
        assert job.wait() == [0] * ranks, job.log.read_text()
    return place


def test_the_command_sets_the_model_beside_real_measurements(measured, tmp_path, capsys):
    quantize = ["--shape", "tiny", "--sequences", "2", "--seq-len", "16", "--repeats", "1", "--device", "cpu"]
    job = Job(
        1, narrow_command, "bench", "quantize", *quantize, "--out", str(tmp_path / "q.json"), log=tmp_path / "log"
    )
    assert job.wait() == [0], job.log.read_text()
    files = [str(measured / "1.json"), str(measured / "2.json")]
    more = ["--predict", "2,4", "--shard-ranks", "0,2", "--quantize", str(tmp_path / "q.json"), "--layers-per-job", "1"]
    assert main(["bench", "scaling", *files, "--shape", str(measured / "shape"), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == list(HEADER)
    rows = [dict(zip(HEADER, row, strict=True)) for row in cells[2:]]
    seen = [(row["layers"], row["seqs"], row["GPUs"], row["per group"], row["step s"] == "predicted") for row in rows]
    assert seen == [
        ("1", "2", "1", "1", False),
        ("1", "4", "1", "1", False),
        ("2", "2", "1", "1", False),
        ("2", "4", "1", "1", False),
        ("2", "4", "2", "2", False),
        *[("2", sequences, ranks, group, True) for sequences, ranks, group in
          [("2", "2", "2"), ("2", "4", "4"), ("2", "4", "2"), ("4", "4", "4"), ("4", "4", "2")]],
    ]  # fmt: skip
    one = next(r for r in json.loads((measured / "1.json").read_text()) if (r["layers"], r["sequences"]) == (2, 4))
    two = json.loads((measured / "2.json").read_text())
    assert float(rows[4]["efficiency %"]) == pytest.approx(100 * one["step_s"] / (2 * two["step_s"]), abs=0.06)
    for row in rows:
        parts = ("compute", "copies", "gather", "requantize", "reduce", "Cayley", "wait")
        assert float(row["model s"]) == pytest.approx(sum(float(row[part]) for part in parts), abs=4e-4, rel=6e-4)
        assert float(row["compute"]) > 0
    assert [line.split(":")[0] for line in lines if line.startswith("whole run")] == [
        f"whole run, {ranks} GPUs, {sequences} sequences per step" for sequences in (2, 4) for ranks in (1, 2, 4)
    ]


def scaling(*words: str) -> int:
    """`bench scaling WORDS` without the command line around it, which would turn mistakes into exit codes."""
    parser = argparse.ArgumentParser()
    add_arguments("scaling", parser)
    return run(parser.parse_args(words))


def test_ranks_share_a_layer_of_experts_and_one_of_them_answers(measured, tmp_path):
    out = tmp_path / "q.json"
    words = ["--shape", "tiny-moe", "--sequences", "2", "--seq-len", "16", "--repeats", "1", "--device", "cpu"]
    job = Job(2, narrow_command, "bench", "quantize", *words, "--out", str(out), log=tmp_path / "log")
    assert job.wait() == [0, 0], job.log.read_text()
    assert job.log.read_text().count("one tiny-moe decoder layer, 2 x 16 tokens") == 1
    figures = json.loads(out.read_text())
    assert (figures["ranks"], figures["sequences"]) == (2, 2)
    with pytest.raises(UserError, match="shared by 2 ranks"):
        scaling(str(measured / "1.json"), "--shape", str(measured / "shape"), "--quantize", str(out))
    with pytest.raises(UserError, match="--sequences 3 does not divide among 2 ranks"):
        measure(argparse.Namespace(sequences=3), World(0, 2, 0, 2, torch.device("cpu")))


def test_what_does_not_fit_says_so(measured, capsys):
    more = ["--shape", str(measured / "shape"), "--predict", "4", "--device-gib", "0.0001"]
    assert scaling(str(measured / "2.json"), *more) == 0
    assert "does not fit" in capsys.readouterr().out


def test_mistakes_are_told(measured, tmp_path):
    with pytest.raises(UserError, match=r"1\.json holds no figures of bench optimize"):
        scaling(str(tmp_path / "1.json"))
    (tmp_path / "other.json").write_text('[{"step_s": 1}]')
    with pytest.raises(UserError, match="figures are missing"):
        scaling(str(tmp_path / "other.json"), "--shape", str(measured / "shape"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        scaling(str(measured / "2.json"), "--shape", str(tmp_path))
    figures = json.loads((measured / "2.json").read_text()) | {"tflops_per_device": 400.0}
    (tmp_path / "other.json").write_text(json.dumps(figures))
    with pytest.raises(UserError, match="FLOP was measured"):
        scaling(str(tmp_path / "other.json"), "--shape", str(measured / "shape"))


def test_figures_of_earlier_versions_are_read_under_their_names_of_now(tmp_path):
    row = {"step_s": 1.0, "ranks": 1, "tokens_per_step": 4096, "recompute": {}, "stall_s": 0.1, "fit_grids_s": 0.2}
    (tmp_path / "old.json").write_text(json.dumps(row))
    (figures,) = read(tmp_path / "old.json")
    assert (figures["checkpoint_wait_s"], figures["requantize_s"], figures["w_bits"]) == (0.1, 0.2, 4)
    assert not {"stall_s", "fit_grids_s"} & figures.keys()
