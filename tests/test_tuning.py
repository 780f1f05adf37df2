"""Tuning of rounded layers: its gradients, what it lowers, and that what is stored is what was tuned."""

import json

import pytest
import torch
from tiny import write_model, write_tokens
from torch import Tensor

from dist_spin.config import load_config
from dist_spin.distributed import World
from dist_spin.errors import UserError
from dist_spin.layer_files import load_layer
from dist_spin.methods.tuning import RoundedWeights
from dist_spin.numerics.gptq import Solution
from dist_spin.numerics.quantizer import dequantize_weight, quantize_weight, weight_scales
from dist_spin.stages.common import run_dir
from dist_spin.stages.quantize import quantize


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
    rounded = RoundedWeights({"w": weight}, {"w": chosen}, {"w": 4}, symmetric)
    for before, after in zip(chosen, rounded.solution("w"), strict=True):
        assert torch.equal(before, after)
    expected = dequantize_weight(*chosen, group_size, torch.float64)
    assert torch.equal(rounded.weights(torch.float64)["w"], expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_a_learned_step_size(weight, symmetric):
    """Straight-through in the weight; in the scale, what a finite difference gives where no code changes."""
    scale, zero = weight_scales(weight, 4, symmetric)
    codes = quantize_weight(weight, scale, zero, 4, symmetric)
    rounded = RoundedWeights({"w": weight}, {"w": Solution(codes, scale, zero)}, {"w": 4}, symmetric)
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


def settings(tmp_path, *more: str) -> list[str]:
    model = write_model("gqa_tied", tmp_path / "model", layers=3)
    tokens = write_tokens(tmp_path / "tokens.npy", 16, 32)
    return [
        *(f"model.path={model}", "model.dtype=float32", f"output_dir={tmp_path}", "optimize.steps=0"),
        *(f"quantize.source=tokens:{tokens}#all", "quantize.seq_len=32", "quantize.n_sequences=16"),
        *("quant.w_bits=3", "quant.a_bits=6", "rotation.init=hadamard", *more),
    ]
