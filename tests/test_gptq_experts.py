"""Weights of one shape solved together, each with its own Hessian, as the experts of a layer are: the codes of each alone."""

import pytest
import torch
from test_gptq import correlated_inputs, hessian_of
from torch import Tensor

from dist_spin.numerics import batched_factor
from dist_spin.numerics.batched_factor import factor_together, prepare_all
from dist_spin.numerics.coordinate_descent import coordinate_descent, refine_all
from dist_spin.numerics.format_weights import tensor_scale_of
from dist_spin.numerics.gptq import GPTQOptions, QuantizedWeight, output_errors, prepare, solve, solve_all
from dist_spin.numerics.quantizer import ROW_TILE, dequantize_weight
from dist_spin.quantize.site_solver import equal_parts

COLUMNS = 96


def experts(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Weights [4, rows, 96] and Hessians [4, 96, 96]: of usual inputs, with dead ones, of few tokens, singular."""
    hessians = torch.stack([hessian_of(correlated_inputs(tokens, COLUMNS, tokens)) for tokens in (400, 300, 40, 200)])
    hessians[1, [3, 50]] = hessians[1, :, [3, 50]] = 0
    # Two inputs that are always the same, and no others like them: exactly singular however it is factored.
    hessians[3, :2] = hessians[3, :, :2] = 0
    hessians[3, :2, :2] = 4
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, rows, COLUMNS, generator=generator, dtype=torch.float64).to(dtype), hessians.to(dtype)


OPTIONS = [
    GPTQOptions(mse_clip=True),
    GPTQOptions(symmetric=False, act_order=True, block_size=40),
    GPTQOptions(group_size=32, mse_clip=True, symmetric=False),
    GPTQOptions(group_size=16, act_order=True),
    GPTQOptions(bits=4, group_size=16, format="nvfp4"),
    GPTQOptions(bits=8, format="fp8", act_order=True),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_of_experts_solved_together_are_those_of_each_alone(options: GPTQOptions, device: str) -> None:
    weights, hessians = (t.to(device) for t in experts(ROW_TILE + 45, torch.float32))
    factors = prepare_all(hessians, options)
    scaled = [options] * 4
    if options.format == "nvfp4":
        scaled = [GPTQOptions(**{**vars(options), "tensor_scale": tensor_scale_of(w)}) for w in weights]
    together = solve_all(weights, factors, scaled)
    refined = refine_all(weights, together, hessians, factors, options, 2)
    errors = output_errors(weights, refined, hessians, options)
    assert together.codes.float().std() > 1
    assert not dequantize_weight(*together, options.group_size)[1, :, [3, 50]].any()  # dead inputs of one of them
    for i, (w, hessian, factor, own) in enumerate(zip(weights, hessians, factors, scaled, strict=True)):
        alone = solve(w, factor, own)
        better = coordinate_descent(w, alone, hessian, factor, own, 2)
        for part, one, refined_part, refined_one in zip(together, alone, refined, better, strict=True):
            assert torch.equal(part[i].float(), one.float())
            assert torch.equal(refined_part[i].float(), refined_one.float())
        torch.testing.assert_close(errors[i], output_errors(w, better, hessian, own), rtol=1e-3, atol=1e-6)
    backwards = solve_all(weights.flip(0), factors[::-1], scaled[::-1])
    assert torch.equal(backwards.codes.flip(0).float(), together.codes.float())


@pytest.mark.parametrize("percdamp", [0.01, 0.0])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("at_once", [5, 24, 256])
def test_factors_made_together_are_those_of_each(
    percdamp: float, act_order: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_factor, "FACTORED_AT_ONCE", at_once)
    _, hessians = experts(1)
    if not percdamp:
        hessians = hessians[[0, 1, 3]]  # rounding alone decides whether the Hessian of few tokens can be factored
    options = GPTQOptions(percdamp=percdamp, act_order=act_order)
    before = hessians.clone()
    dampings = []
    for hessian, factor in zip(before, factor_together(hessians, options), strict=True):
        alone = prepare(hessian, options)
        torch.testing.assert_close(factor.feedback, alone.feedback, rtol=1e-8, atol=1e-10)
        assert torch.equal(factor.dead, alone.dead)
        assert (factor.order is None) == (alone.order is None)
        assert factor.order is None or alone.order is None or torch.equal(factor.order, alone.order)
        assert factor.damping == alone.damping
        dampings.append(factor.damping)
    assert torch.equal(hessians, before)
    assert dampings == ([0.01] * 4 if percdamp else [0.0, 0.0, 1e-6])


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_a_gpu_finds_nearly_the_codes_of_each_expert_alone(options: GPTQOptions) -> None:
    """Factors made together differ by rounding: a code may flip where two are equally near, and what follows in its row."""
    weights, hessians = (t.cuda() for t in experts(1000, torch.float32))
    together = solve_all(weights, prepare_all(hessians, options), [options] * 4)
    errors = output_errors(weights, together, hessians, options).sum(1)
    for i, (w, hessian) in enumerate(zip(weights, hessians, strict=True)):
        alone = solve(w, prepare(hessian, options), options)
        assert (alone.codes == together.codes[i]).float().mean() > 0.99
        expected = output_errors(w, alone, hessian, options).sum(0)
        torch.testing.assert_close(errors[i], expected, rtol=1e-2, atol=0)


def test_one_unusable_expert_is_refused_as_it_is_alone() -> None:
    weights, hessians = experts(3)
    for bad, message in ((float("nan"), "NaN"), (0.0, "all zero"), (-1.0, "not positive definite")):
        damaged = hessians.clone()
        damaged[2] = torch.eye(COLUMNS, dtype=damaged.dtype) * bad
        with pytest.raises(ValueError, match=message):
            factor_together(damaged, GPTQOptions())
    options = GPTQOptions()
    with pytest.raises(ValueError, match="input columns"):
        solve_all(weights[..., :64], prepare_all(hessians, options), [options] * 4)
    found = QuantizedWeight(*(torch.zeros(4, 3, n) for n in (64, 1, 1)))
    with pytest.raises(ValueError, match="do not fit"):
        refine_all(weights, found, hessians, prepare_all(hessians, options), options, 1)


def test_parts_are_nearly_equal_and_hold_no_more_than_they_may() -> None:
    for count, most in ((128, 23), (8, 8), (8, 100), (5, 1), (60, 7)):
        parts = equal_parts(count, most)
        assert [i for start, stop in parts for i in range(start, stop)] == list(range(count))
        sizes = {stop - start for start, stop in parts}
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
        assert len(parts) == -(-count // most)
