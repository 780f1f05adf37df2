"""GPTQ against a plain oracle, and what fan-out relies on: rows and samples may be split."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_spin.numerics import gptq, quantizer
from dist_spin.numerics import hessian as hessian_module
from dist_spin.numerics.gptq import (
    GPTQOptions,
    output_errors,
    prepare,
    solve,
)
from dist_spin.numerics.hessian import Hessian
from dist_spin.numerics.quantizer import ROW_TILE, dequantize_weight, quantize_weight, weight_scales
from dist_spin.numerics.row_tiles import split_rows


def correlated_inputs(tokens: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs whose features share a few strong directions, as activations of language models do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(4, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    return (shared @ mixing + 0.5 * noise).to(dtype)


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[-1], dtype=x.dtype)
    hessian.add(x)
    return hessian.mean()


def problem(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return w.to(dtype), hessian_of(correlated_inputs(4 * columns, columns, seed, dtype))


class Result(NamedTuple):
    """A quantised weight and how good it is; errors are tr(E H Eᵀ) / tr(W H Wᵀ) with the undamped H."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    error: float
    damping: float
    rtn_error: float  # rounding to nearest on the same scales


def gptq_quantize(w: Tensor, hessian: Tensor, options: GPTQOptions) -> Result:
    """The three calls of the quantize stage for one linear: factor, solve, measure."""
    factor = prepare(hessian, options)
    quantized = solve(w, factor, options)
    error, rtn, reference = output_errors(w, quantized, hessian, options).sum(0).tolist()
    reference = reference or 1.0  # a zero weight, or one that only meets dead inputs, is reproduced exactly
    return Result(*quantized, error=error / reference, damping=factor.damping, rtn_error=rtn / reference)


# The oracle: one column at a time, the inverse Hessian of the remaining columns updated explicitly (Frantar et al.
# 2022, equations 2 and 3). No Cholesky factor, no blocks, no tiles, and its own quantiser.


def oracle_grid(values: np.ndarray, options: GPTQOptions) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of each row of `values`."""
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    if options.symmetric:
        return np.maximum(-low, high) / (2 ** (options.bits - 1) - 1), np.zeros(len(values))
    scale = (high - low) / (2**options.bits - 1)
    return scale, np.round(-low / scale)


def oracle(w: Tensor, hessian: Tensor, options: GPTQOptions) -> np.ndarray:
    """Codes [rows, in]."""
    weight, h = w.numpy().copy(), hessian.numpy()
    rows, columns = weight.shape
    group = options.group_size or columns
    lowest = -(2 ** (options.bits - 1)) if options.symmetric else 0
    highest = lowest + 2**options.bits - 1
    order = np.argsort(-np.diag(h), kind="stable") if options.act_order else np.arange(columns)
    grids = {g: oracle_grid(weight[:, g * group : (g + 1) * group], options) for g in range(columns // group)}
    inverse = np.linalg.inv(h + options.percdamp * np.diag(h).mean() * np.eye(columns))
    codes = np.zeros((rows, columns))
    for j in order:
        if j % group == 0 and not options.act_order:
            grids[j // group] = oracle_grid(weight[:, j : j + group], options)
        scale, zero = grids[j // group]
        codes[:, j] = np.clip(np.round(weight[:, j] / scale) + zero, lowest, highest)
        error = weight[:, j] - (codes[:, j] - zero) * scale
        weight -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("group_size", "block_size"), [(0, 128), (0, 8), (0, 7), (4, 8), (8, 8), (16, 8), (6, 8), (24, 7)]
)
def test_codes_are_the_oracles(symmetric: bool, act_order: bool, group_size: int, block_size: int) -> None:
    w, hessian = problem(9, 48)
    options = GPTQOptions(3, symmetric, group_size, block_size=block_size, act_order=act_order)
    result = gptq_quantize(w, hessian, options)
    assert np.array_equal(result.codes.numpy(), oracle(w, hessian, options))
    assert result.scale.shape == (9, 48 // (group_size or 48))
    assert result.damping == options.percdamp


@pytest.mark.parametrize("group_size", [32, 64])
def test_codes_are_the_oracles_with_groups_inside_blocks_of_128(group_size: int) -> None:
    w, hessian = problem(ROW_TILE + 3, 256)
    options = GPTQOptions(group_size=group_size)
    assert np.array_equal(gptq_quantize(w, hessian, options).codes.numpy(), oracle(w, hessian, options))


@pytest.mark.parametrize(
    "options",
    [
        GPTQOptions(),
        GPTQOptions(symmetric=False),
        GPTQOptions(group_size=32),
        GPTQOptions(group_size=64, symmetric=False, mse_clip=True),
        GPTQOptions(act_order=True),
        GPTQOptions(bits=3, group_size=32, act_order=True),
        GPTQOptions(bits=8, symmetric=False),
        GPTQOptions(mse_clip=True),
    ],
    ids=str,
)
def test_error_is_the_outputs_and_below_rounding_to_nearest(options: GPTQOptions) -> None:
    x = correlated_inputs(1024, 128, dtype=torch.float32)
    w = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    result = gptq_quantize(w, hessian_of(x), options)
    outputs = x @ w.T

    def relative(codes: Tensor) -> float:
        q = dequantize_weight(codes, result.scale, result.zero, options.group_size)
        return float((x @ q.T - outputs).square().sum() / outputs.square().sum())

    assert result.error == pytest.approx(relative(result.codes), rel=1e-3)
    nearest = quantize_weight(
        w, result.scale, result.zero, options.bits, symmetric=options.symmetric, group_size=options.group_size
    )
    assert result.rtn_error == pytest.approx(relative(nearest), rel=1e-3)
    assert 0 < result.error < 0.7 * result.rtn_error


def test_uncorrelated_inputs_leave_nothing_to_gain() -> None:
    w = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    result = gptq_quantize(w, torch.diag(torch.arange(1.0, 17.0)), GPTQOptions())
    assert torch.equal(result.codes, quantize_weight(w, *weight_scales(w, 4), bits=4))
    assert result.error == result.rtn_error


def test_whole_row_scales_come_from_the_original_weight() -> None:
    w, hessian = problem(6, 32)
    for options in (GPTQOptions(mse_clip=True), GPTQOptions(group_size=8, act_order=True, symmetric=False)):
        result = gptq_quantize(w, hessian, options)
        scale, zero = weight_scales(
            w, 4, symmetric=options.symmetric, group_size=options.group_size, mse_clip=options.mse_clip
        )
        assert torch.equal(result.scale, scale)
        assert torch.equal(result.zero, zero)


@pytest.mark.parametrize("group_size", [0, 32])
def test_eight_bit_asymmetric_codes_are_unsigned(group_size: int) -> None:
    w, hessian = problem(4, 64)
    result = gptq_quantize(w, hessian, GPTQOptions(bits=8, symmetric=False, group_size=group_size))
    assert result.codes.dtype == torch.uint8
    assert result.codes.max() > 200
    assert result.error < 1e-5


# Hessians that need care


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_become_zero_and_change_nothing_else(act_order: bool) -> None:
    x = correlated_inputs(200, 24)
    x[:, [3, 17]] = 0
    live = [j for j in range(24) if j not in (3, 17)]
    w = torch.randn(7, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w[:, 3] = 100  # would ruin the row's scale if it counted
    options = GPTQOptions(symmetric=False, act_order=act_order)
    result = gptq_quantize(w, hessian_of(x), options)
    q = dequantize_weight(result.codes, result.scale, result.zero)
    assert (q[:, [3, 17]] == 0).all()
    without = gptq_quantize(w[:, live], hessian_of(x[:, live]), options)
    assert torch.equal(result.codes[:, live], without.codes)
    assert result.error == pytest.approx(without.error)


@pytest.mark.parametrize("percdamp", [0.0, 1e-9])
def test_a_singular_hessian_gets_more_damping(percdamp: float) -> None:
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    result = gptq_quantize(w, torch.ones(16, 16), GPTQOptions(percdamp=percdamp))  # rank 1
    assert percdamp < result.damping <= 1e-2
    kept = (w - dequantize_weight(result.codes, result.scale, result.zero)).sum(1).abs()
    assert (kept < 0.51 * result.scale[:, 0]).all()  # only the sum of a row matters, and the last column rounds it


def test_unusable_hessians_are_refused() -> None:
    w = torch.randn(4, 8)
    poisoned = torch.eye(8)
    poisoned[2, 5] = float("nan")
    for hessian, message in (
        (poisoned, "NaN"),
        (torch.full((8, 8), float("inf")), "infinity"),
        (torch.zeros(8, 8), "all zero"),
        (-torch.eye(8), "not positive definite"),
        (torch.ones(8, 4), "square"),
        (torch.eye(6), "input columns"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq_quantize(w, hessian, GPTQOptions())


def test_unusable_weights_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="weight holds NaN"):
        gptq_quantize(torch.full((2, 4), float("nan")), torch.eye(4), GPTQOptions())
    with pytest.raises(ValueError, match="does not divide"):
        gptq_quantize(torch.ones(2, 4), torch.eye(4), GPTQOptions(group_size=3))
    for fields in (
        {"bits": 16},
        {"group_size": -1},
        {"percdamp": -0.1},
        {"percdamp": 11.0},
        {"block_size": 0},
        {"clip_norm": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            GPTQOptions(**fields)


@pytest.mark.parametrize("group_size", [0, 32])
def test_scales_can_be_held_in_fewer_bits(group_size: int) -> None:
    """A runtime that stores scales in bfloat16 then has the same weight; codes are chosen for those scales."""
    w, hessian = problem(16, 64, torch.float32)
    options = GPTQOptions(group_size=group_size)
    wide = gptq_quantize(w, hessian, options)
    narrow = gptq_quantize(w, hessian, replace(options, scale_dtype=torch.bfloat16))
    assert narrow.scale.dtype == torch.float32
    assert torch.equal(narrow.scale, narrow.scale.bfloat16().float())
    assert not torch.equal(wide.scale, wide.scale.bfloat16().float())
    torch.testing.assert_close(narrow.scale[:, 0], wide.scale[:, 0], rtol=2**-8, atol=0)
    assert narrow.error < 1.1 * wide.error
    steps = w / narrow.scale.repeat_interleave(group_size or 64, 1)
    assert (narrow.codes[:, 0] == steps[:, 0].round().clamp(-8, 7)).all()  # the first column is rounded as it is


def test_a_zero_weight_has_no_error() -> None:
    result = gptq_quantize(torch.zeros(3, 8), torch.eye(8), GPTQOptions())
    assert (result.error, result.rtn_error) == (0.0, 0.0)
    assert not result.codes.any()


def test_inputs_are_left_alone() -> None:
    w, hessian = problem(4, 16)
    w_before, hessian_before = w.clone(), hessian.clone()
    gptq_quantize(w, hessian, GPTQOptions(act_order=True))
    assert torch.equal(w, w_before)
    assert torch.equal(hessian, hessian_before)


# Splitting the work

SPLIT_OPTIONS = [
    GPTQOptions(),
    GPTQOptions(group_size=32, mse_clip=True, symmetric=False),
    GPTQOptions(mse_clip=True, clip_norm=2.0),
    GPTQOptions(group_size=64, act_order=True),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", SPLIT_OPTIONS, ids=str)
def test_rows_solved_apart_are_bit_identical(options: GPTQOptions, device: str) -> None:
    w, hessian = problem(2 * ROW_TILE + 45, 192, torch.float32)
    w, hessian = w.to(device), hessian.to(device)
    factor = prepare(hessian, options)
    whole = solve(w, factor, options)
    assert whole.codes.float().std() > 1
    for parts in (2, 3):
        ranges = split_rows(len(w), parts)
        pieces = [solve(w[start:stop], factor, options) for start, stop in ranges]
        for raise_on_any_failure, apart in zip(whole, zip(*pieces, strict=True), strict=True):
            assert torch.equal(raise_on_any_failure, torch.cat(apart))
        sums = [output_errors(w[a:b], piece, hessian, options) for (a, b), piece in zip(ranges, pieces, strict=True)]
        torch.testing.assert_close(torch.cat(sums), output_errors(w, whole, hessian, options), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [1, ROW_TILE, 5 * ROW_TILE + 7])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_split_rows_covers_every_row_once(rows: int, parts: int) -> None:
    ranges = split_rows(rows, parts)
    assert len(ranges) == parts
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert all(start % ROW_TILE == 0 for start, stop in ranges if start < stop)


def test_a_rank_without_rows_gets_an_empty_solution() -> None:
    w, hessian = problem(4, 16)
    for options in (GPTQOptions(), GPTQOptions(group_size=8, mse_clip=True)):
        quantized = solve(w[:0], prepare(hessian, options), options)
        assert quantized.codes.shape == (0, 16)
        assert len(quantized.scale) == len(quantized.zero) == 0


def test_samples_summed_apart_give_the_same_codes() -> None:
    x = correlated_inputs(600, 64)
    w = torch.randn(10, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    merged = Hessian(64, dtype=torch.float64)
    for part in x.split(150):
        partial = Hessian(64, dtype=torch.float64)
        partial.add(part.view(5, 30, 64))
        merged.total += partial.total
        merged.count += partial.count
    assert merged.count == 600
    whole = gptq_quantize(w, hessian_of(x), GPTQOptions())
    assert torch.equal(gptq_quantize(w, merged.mean(), GPTQOptions()).codes, whole.codes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessian_of_half_precision_inputs_is_not_rounded(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "TOKEN_CHUNK", 100)
    monkeypatch.setattr(hessian_module, "LEAST_PANEL", 6)  # three panels, the last one narrower
    x = correlated_inputs(320, 16, dtype=dtype).to(device)
    hessian = Hessian(16, device=device)
    hessian.add(x)
    exact = 2 * x.double().T @ x.double() / 320
    assert hessian.total.dtype == torch.float32
    torch.testing.assert_close(hessian.mean().double(), exact, rtol=1e-5, atol=1e-5)


def test_hessian_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Hessian(4).mean()
    with pytest.raises(ValueError, match="features"):
        Hessian(4).add(torch.ones(2, 8))


@pytest.mark.gpu
def test_column_loop_never_waits_for_the_device(forbid_waits: Callable[[ModuleType, str], None]) -> None:
    forbid_waits(gptq, "_solve_tiles")
    w, hessian = problem(200, 128, torch.float32)
    for options in SPLIT_OPTIONS:
        assert gptq_quantize(w.cuda(), hessian.cuda(), options).error < 0.05


@pytest.mark.gpu
def test_device_finds_the_codes_of_the_cpu() -> None:
    w, hessian = problem(200, 128)
    for options in SPLIT_OPTIONS:
        on_cpu, on_device = gptq_quantize(w, hessian, options), gptq_quantize(w.cuda(), hessian.cuda(), options)
        assert torch.equal(on_device.codes.cpu(), on_cpu.codes)


FUSED_OPTIONS = [
    *SPLIT_OPTIONS,
    GPTQOptions(bits=8, symmetric=False, mse_clip=True),
    GPTQOptions(bits=3, block_size=40, mse_clip=True),
    GPTQOptions(group_size=256, mse_clip=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("options", FUSED_OPTIONS, ids=str)
def test_fused_solver_agrees_with_torch(options: GPTQOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes may differ where two are equally near within rounding, and then in what follows in the same row."""
    w, hessian = (t.cuda() for t in problem(1000, 768, torch.float32))
    assert gptq.fused_kernels(w) is not None, "Triton or its C compiler is missing"
    fused = gptq_quantize(w, hessian, options)
    for module in (gptq, quantizer):
        monkeypatch.setattr(module, "fused_kernels", lambda x: None)
    plain = gptq_quantize(w, hessian, options)
    assert plain.codes.float().std() > 1
    assert (fused.codes == plain.codes).float().mean() > 0.99
    # To the last bits only: a fused multiply-add rounds once, and a group is fitted to what earlier columns left of it.
    assert torch.isclose(fused.scale, plain.scale, rtol=1e-5, atol=0).float().mean() > 0.99
    assert fused.error == pytest.approx(plain.error, rel=1e-3)
    assert fused.rtn_error == pytest.approx(plain.rtn_error, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [1, 40, 128])
def test_fused_block_is_the_torch_block(symmetric: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    options = GPTQOptions(symmetric=symmetric)
    w = torch.randn(5, 300, ROW_TILE, generator=generator, device="cuda")
    feedback = torch.randn(300, 300, generator=generator, device="cuda").triu(1) * 0.05 + torch.eye(300, device="cuda")
    scale = torch.rand(5, 3, ROW_TILE, generator=generator, device="cuda") * 0.3 + 0.1
    zero = torch.zeros_like(scale) if symmetric else torch.randint(0, 15, scale.shape, device="cuda").float()
    groups = torch.arange(columns, device="cuda") % 3
    block = (feedback.T.contiguous().T[100 : 100 + columns, 100 : 100 + columns], scale, zero, groups, options)
    fused, residual = gptq.solve_block(w[:, 100 : 100 + columns], *block)
    monkeypatch.setattr(gptq, "fused_kernels", lambda x: None)
    codes, expected = gptq.solve_block(w[:, 100 : 100 + columns].clone(), *block)
    same = (fused.float() == codes).all(1)  # [T, R]: rows without a tie
    assert same.float().mean() > 0.98
    torch.testing.assert_close(residual.mT[same], expected.mT[same], rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_a_poisoned_weight_shows_in_its_scale() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.randn(6, 3000, device="cuda")
        w[2, 2999] = bad
        scale, _ = weight_scales(w, 4, mse_clip=True)
        assert scale[2].isnan().all()
        assert scale[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.gpu
def test_a_process_that_allows_tf32_gets_the_same_codes() -> None:
    w, hessian = (t.cuda() for t in problem(300, 256, torch.float32))
    exact = gptq_quantize(w, hessian, GPTQOptions())
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(gptq_quantize(w, hessian, GPTQOptions()).codes, exact.codes)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_large_triangle_is_inverted_by_halves(monkeypatch):
    monkeypatch.setattr(gptq, "INVERTED_AT_ONCE", 5)
    for n in (5, 6, 83, 256):
        generator = torch.Generator().manual_seed(n)
        upper = torch.randn(n, n, generator=generator, dtype=torch.float64).div_(n).triu_(1) + torch.eye(n)
        inverse = upper.clone()
        gptq.invert_unit_upper_(inverse)
        torch.testing.assert_close(inverse @ upper, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.equal(inverse, inverse.triu())


def test_a_factor_does_not_depend_on_how_its_triangle_is_inverted(monkeypatch):
    _, hessian = problem(4, 96)
    at_once = prepare(hessian, GPTQOptions(act_order=True)).feedback
    monkeypatch.setattr(gptq, "INVERTED_AT_ONCE", 16)
    torch.testing.assert_close(prepare(hessian, GPTQOptions(act_order=True)).feedback, at_once, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_figures_on_a_gpu_have_three_digits():
    w, hessian = (x.float() for x in problem(256, 1024))
    options = GPTQOptions()
    quantized = solve(w, prepare(hessian, options), options)
    here = output_errors(w, quantized, hessian, options).sum(0)
    on_gpu = output_errors(w.cuda(), type(quantized)(*(x.cuda() for x in quantized)), hessian.cuda(), options).sum(0)
    torch.testing.assert_close(on_gpu.cpu(), here, rtol=1e-3, atol=0)
