"""Tuning of rounded layers: its gradients, what it lowers, and that what is stored is what was tuned."""

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor

from dist_spin.cli import main
from dist_spin.config import load_config
from dist_spin.layer_files import QuantizedLayer, layer_path, load_layer
from dist_spin.methods.tuning import RoundedWeights
from dist_spin.numerics.gptq import Solution
from dist_spin.numerics.quantizer import dequantize_weight, quantize_weight, weight_scales
from dist_spin.rundir import read_lines
from dist_spin.stages.common import run_dir


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tuning_starts_from_the_codes_that_were_chosen(weight, symmetric, group_size):
    scale, zero = weight_scales(weight, 4, symmetric, group_size, mse_clip=True)
    codes = quantize_weight(weight, scale, zero, 4, symmetric, group_size)
    codes[0, :5] = codes[0, :5].roll(1)  # other cells than the nearest, as GPTQ takes
    chosen = Solution(codes, scale, zero)
    rounded = RoundedWeights({"w": chosen}, {"w": 4}, symmetric)
    for before, after in zip(chosen, rounded.solution("w"), strict=True):
        assert torch.equal(before, after)
    expected = dequantize_weight(*chosen, group_size, torch.float64)
    assert torch.equal(rounded.weights(torch.float64)["w"], expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_a_learned_step_size(weight, symmetric):
    """Straight-through in the weight; in the scale, what a finite difference gives where no code changes."""
    scale, zero = weight_scales(weight, 4, symmetric)
    codes = quantize_weight(weight, scale, zero, 4, symmetric)
    rounded = RoundedWeights({"w": Solution(codes, scale, zero)}, {"w": 4}, symmetric)
    with torch.no_grad():
        rounded.v[0][0, 0, 0] = 40.0  # beyond the grid
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (rounded.weights(torch.float64)["w"] * target).sum().backward()
    g = (target * scale).unflatten(1, (1, -1))
    inside = torch.ones_like(g)
    inside[0, 0, 0] = 0
    torch.testing.assert_close(rounded.v[0].grad, g * inside)
    steps = rounded.v[0].detach()
    held = torch.round(steps) - steps  # rounding held: d(t * q(v / t)) / dt = q - v / t
    held[0, 0, 0] = 7 if symmetric else 15 - zero[0, 0]
    torch.testing.assert_close(rounded.t[0].grad, (g * held).sum(-1, keepdim=True))


@pytest.fixture
def words(tmp_path) -> list[str]:
    """A short run of rounded weights and activations on a random Hadamard."""
    model = write_model("gqa_tied", tmp_path / "model", layers=3)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 97, (16, 24)))
    return [
        *(f"model.path={model}", "model.dtype=float32", f"output_dir={tmp_path}", "optimize.steps=0"),
        *("rotation.init=hadamard", f"quantize.source=tokens:{tmp_path}/tokens.npy#all"),
        *("quantize.seq_len=24", "quantize.n_sequences=16", "quant.w_bits=3", "quant.a_bits=6"),
        *("distributed.device=cpu", "distributed.threads=1"),
    ]


def layers(words: list[str]) -> tuple[list[QuantizedLayer], list[dict[str, float]]]:
    """The layers that a run of `quantize` leaves, and what it noted of their tuning."""
    assert main(["quantize", *words]) == 0
    run = run_dir(load_config(None, words))
    noted = [line for line in read_lines(run.path / "events.jsonl") if line["event"] == "tuned"]
    return [load_layer(layer_path(run.layers(""), i))[0] for i in range(3)], noted


@pytest.mark.usefixtures("restored_process")
@pytest.mark.parametrize("options", [[], ["quant.w_symmetric=false", "quant.w_group_size=8"]], ids=str)
def test_tuning_starts_at_gptq_and_brings_the_output_nearer(words, options):
    words = [*words, *options]
    gptq, _ = layers([*words, "name=gptq", "quantize.quantize_activations=true"])
    still, before = layers([*words, "name=still", "quantize.tune_epochs=1", "quantize.tune_lr=1e-9"])
    for one, other in zip(gptq, still, strict=True):
        for role, solution in one.solutions.items():
            assert torch.equal(solution.codes, other.solutions[role].codes)
            torch.testing.assert_close(solution.scale, other.solutions[role].scale)
    tuned, after = layers([*words, "name=tuned", "quantize.tune_epochs=15", "quantize.tune_lr=0.02"])
    assert [line["layer"] for line in after] == [0, 1, 2]
    assert all(line["last_epoch"] < line["first_epoch"] for line in after)
    assert after[-1]["last_epoch"] < 0.8 * before[-1]["last_epoch"]
    moved = [
        (a.solutions[role].codes != b.solutions[role].codes).float().mean()
        for a, b in zip(gptq, tuned, strict=True)
        for role in a.solutions
    ]
    assert all(0 < share < 0.5 for share in moved)


@pytest.mark.usefixtures("restored_process")
def test_a_tuned_layer_that_is_lost_is_made_again_bit_by_bit(words):
    words = [*words, "name=tuned", "quantize.tune_epochs=2", "quantize.layers_per_job=2"]
    layers(words)
    path = layer_path(run_dir(load_config(None, words)).layers(""), 1)
    content = path.read_bytes()
    path.unlink()
    layers(words)
    assert path.read_bytes() == content
