"""Checkpoints whose numbers leave what can be computed: damaged weights, overflow of half precision, inputs that are zero."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import settings
from user_cases import WHOLE_WEIGHTS, Tensors, case, refusal, rewrite

from dist_spin.cli import main
from dist_spin.numerics.finite import all_finite, first_not_finite
from dist_spin.numerics.quantizer import quantize_weight
from dist_spin.storage.quantized_layers import layer_path, load_layer
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

DOWN = "model.layers.1.mlp.down_proj.weight"
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("numbers")
    settings(place, "mha")
    return place


def changed(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def in_place(tensors: Tensors) -> Tensors:
        change(tensors)
        return tensors

    return lambda directory: rewrite(directory, in_place)


@pytest.mark.parametrize("stage", ["optimize", "quantize", "evaluate", "export"])
@pytest.mark.parametrize("word", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_named(base, tmp_path, capfd, stage, word):
    words = case(base, tmp_path, changed(lambda t: t[DOWN][3].__setitem__(4, float(word))))
    if stage != "optimize":
        words += ["optimize.steps=0", "export.target=hf", *(WHOLE_WEIGHTS if stage == "evaluate" else [])]
    line = refusal(capfd, stage, words, code=3)
    assert f"model.safetensors: {DOWN} holds {word} at [3, 4]; download the model again" in line
    assert "optimize.lr" not in line


def overflowing(tensors: Tensors) -> None:
    tensors[UP].mul_(3000)
    tensors[GATE].mul_(1000)


@pytest.mark.parametrize("stage", ["optimize", "optimize with the guard", "quantize", "evaluate"])
def test_an_overflow_of_half_precision_names_the_layer_and_the_format_to_use(base, tmp_path, capfd, stage):
    words = [*case(base, tmp_path, changed(overflowing)), "model.dtype=float16"]
    words += [] if stage.startswith("optimize") else ["optimize.steps=0"]
    words += WHOLE_WEIGHTS if stage == "evaluate" else []
    words += ["optimize.guard_every=1" if "guard" in stage else "optimize.guard_every=0", "optimize.guard_sequences=4"]
    line = refusal(capfd, stage.split()[0], words, code=3)
    assert "float16 ends at 65504: set model.dtype=bfloat16 (or float32)" in line
    assert "layer 0" in line
    assert "optimize.lr" not in line
    assert main([stage.split()[0], *words, "model.dtype=float32", "name=wide"]) == 0


def test_a_linear_whose_input_is_always_zero_is_rounded_to_nearest_and_that_is_said(base, tmp_path, capfd):
    silent = ["model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    words = case(base, tmp_path, changed(lambda t: [t[name].zero_() for name in silent]))
    words += ["optimize.steps=0", "quant.w_mse_clip=false"]
    capfd.readouterr()
    assert main(["quantize", *words]) == 0
    printed = capfd.readouterr().err
    for role in ("o_proj", "down_proj"):
        assert f"layer 1: the input of {role} is always zero, so that its codes are rounded to nearest" in printed
    assert printed.count("always zero") == 2
    made, _ = load_layer(layer_path(RunDir(tmp_path / "runs" / "run").layers(), 1))
    codes, scale, zero = made.quantized_weights["mlp.down_proj"]
    assert codes.any()
    rounded = codes.double() * scale.double()
    again = quantize_weight(rounded, scale.double(), zero.double(), 4, symmetric=True, group_size=0)
    assert torch.equal(again, codes)
    assert made.figures["mlp.down_proj"]["error"] == 0
    assert main(["evaluate", *words]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_in_any_dtype(dtype, value):
    x = torch.ones(3, 5, dtype=dtype)
    assert all_finite(x)
    assert all_finite(x[:0])
    x[2, 1] = value
    assert not all_finite(x)
    index, number = first_not_finite(x)
    assert index == [2, 1]
    assert str(number) == str(value)
