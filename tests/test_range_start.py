"""Rotations that start from activations: the descent by hand, the sample, and a run that starts from it."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_run, write_model

from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.evaluate.stage import evaluate
from dist_spin.model.layer_inputs import LayerTask
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics.cayley import orthogonality_error
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize
from dist_spin.numerics.random_rotations import random_hadamard
from dist_spin.optimize.train import train
from dist_spin.pipeline.range_init import mean_square_range, narrowed, sample_rows, square_range
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.tensor_file import load_tensors

CPU = torch.device("cpu")


@pytest.fixture
def world(restored_process):
    yield start("cpu", 60, 1)
    stop()


def loud_rows(n=64, tokens=4000):
    """Tokens of one length in which some channels are loud, as behind a norm."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, n, generator=generator)
    rows[:, 5] *= 30
    rows[:200, 9] *= 200  # few tokens, hugely
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def test_range_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 4.0, 4.0]])
    assert float(square_range(x)) == (9 + 1) / 2
    assert mean_square_range(x.repeat(3000, 1), torch.eye(3)) == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranges_narrow_and_so_does_the_rounding_error(dtype):
    rows, first = loud_rows(), random_hadamard(64, torch.Generator().manual_seed(1)).to(dtype)
    found, before, after = narrowed(first, rows, seed=0)
    assert found.dtype == dtype
    assert float(orthogonality_error(found)) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert before == pytest.approx(mean_square_range(rows, first))
    assert after == pytest.approx(mean_square_range(rows, found))
    assert after < 0.8 * before
    spec = QuantSpec(4)
    errors = [float((fake_quantize(y, spec) - y).square().mean()) for y in (rows.to(dtype) @ r for r in (first, found))]
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(narrowed(first, rows, seed=0)[0], found)


def test_a_start_that_cannot_be_bettered_is_kept(monkeypatch):
    monkeypatch.setattr("dist_spin.pipeline.range_init.ANGLE", 2.0)  # steps that only throw it about
    monkeypatch.setattr("dist_spin.pipeline.range_init.STEPS", 3)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 16, generator=generator).sign()  # of the smallest range for their length
    found, before, after = narrowed(torch.eye(16), rows, seed=0)
    assert torch.equal(found, torch.eye(16))
    assert before == after == pytest.approx(4.0)


def test_the_sample_is_what_the_sites_read(tmp_path):
    files = open_model(str(write_model("gqa_tied", tmp_path)), dtype=torch.float64)
    plain = RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float64)
    runner = LayerRunner(files.config, Sites(), device=CPU, dtype=torch.float64, rotated=False)
    hidden = plain.embedding()[torch.arange(96).view(4, 24)]
    task, chosen = LayerTask(0, runner, plain.layer(0), hidden), torch.randperm(96)[:30].sort().values
    rows, outputs = sample_rows(task, chosen)
    assert rows.shape == (2 * 30, 48)
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(60, dtype=torch.float64), atol=1e-5, rtol=0)
    normed = hidden.flatten(0, 1) / hidden.flatten(0, 1).square().mean(-1, keepdim=True).sqrt()
    nearest = torch.cdist(rows[:30], normed).amin(-1)
    assert float(nearest.max()) < 1e-5
    torch.testing.assert_close(outputs, runner.run(runner.build(0, plain.layer(0)), 0, hidden))
    shares = [  # of three ranks, of which the last has no sequence
        sample_rows(LayerTask(0, runner, plain.layer(0), hidden[first:last]), chosen - first * 24)
        for first, last in ((0, 3), (3, 4), (4, 4))
    ]
    torch.testing.assert_close(sum(part for part, _ in shares), rows)
    torch.testing.assert_close(torch.cat([part for _, part in shares]), outputs)


def settings(place, *more):
    words = ("optimize.steps=2", "optimize.lr=0.1", "quantize.method=none", "rotation.init=range")
    return load_config(None, tiny_run(place, *words, *more, split="#all"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_spin.pipeline.range_init.STEPS", 30)
    return tmp_path


def test_a_run_starts_from_it_once(place, world):
    config = settings(place)
    train(config, world)
    path = place / "run" / "rotations" / "start.safetensors"
    (figures,) = (line for line in read_lines(place / "run" / "events.jsonl") if line["event"] == "range_start")
    assert figures["after"] < figures["before"]
    fitted, first = load_tensors(path)[0], initial("hadamard", open_model(str(place / "model")).shape, 0)
    learned = load_file(place / "run" / "rotations" / "final.safetensors")
    for name, r in zip(("R1", "R2"), first, strict=True):
        assert fitted[name].dtype == torch.float64
        assert float(orthogonality_error(fitted[name])) < 1e-12
        assert float((learned[name] - fitted[name]).abs().max()) > 1e-3, name
        assert torch.equal(fitted[name], r) is (name == "R2")
    before = path.read_bytes(), path.stat().st_mtime_ns
    train(config, world)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.write_bytes(before[0][:-1])
    train(config, world)
    assert path.read_bytes() == before[0]
    assert path.with_suffix(".stale").read_bytes() == before[0][:-1]
    train(settings(place, "name=other", "rotation.seed=1"), world)
    assert (place / "other" / "rotations" / "start.safetensors").read_bytes() != before[0]


def test_it_may_be_all_there_is(place, world):
    config = settings(place, "optimize.steps=0")
    with pytest.raises(UserError, match="is not fitted"):
        evaluate(config, world)
    train(config, world)
    kept, fitted = (load_tensors(place / "run" / "rotations" / f"{name}.safetensors")[0] for name in ("final", "start"))
    assert all(torch.equal(kept[name], fitted[name]) for name in ("R1", "R2"))
    assert [row["method"] for row in evaluate(config, world)] == ["full precision", "given rotation"]
    assert not (place / "run" / "fingerprint.json").exists()
