"""Floating-point formats: bit-equal to compressed-tensors' own arithmetic, straight-through, and as GPTQ's grid."""

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, quant_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reference_round_trip
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_spin.model.rotate_quantize import RotationParam, ScaleAndClip, rotate_quantize
from dist_spin.numerics.coordinate_descent import coordinate_descent
from dist_spin.numerics.format_rounding import global_scale, group_scales, round_elements
from dist_spin.numerics.format_weights import format_codes, format_scales, pack_e2m1, tensor_scale_of, unpack_e2m1
from dist_spin.numerics.formats import FORMATS
from dist_spin.numerics.gptq import GPTQOptions, output_errors, prepare, solve
from dist_spin.numerics.hessian import Hessian
from dist_spin.numerics.quantizer import QuantSpec, dequantize_weight, fake_quantize, range_quantize
from dist_spin.numerics.row_tiles import split_rows

# Element, scale and group of compressed-tensors' own presets; for fp8 those of its W8A8 per channel and per token.
REFERENCE = {
    "fp8": QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True),
    "mxfp8": quant_scheme.MXFP8["input_activations"],
    "mxfp4": quant_scheme.MXFP4["input_activations"],
    "nvfp4": quant_scheme.NVFP4["input_activations"],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
HOSTILE = (
    0.0,
    -0.0,
    1e-45,
    -1e-39,
    1.2e-38,
    6e-8,
    2.4e-5,
    1e-4,
    0.25,
    1.75,
    5.0,
    6.0,
    447.0,
    -465.0,
    3e4,
    6e4,
    -1e38,
    torch.inf,
)


@st.composite
def hostile_tensors(draw: st.DrawFn) -> Tensor:
    """Rows [3, 96] of one size, in which numbers stand that are hard on scales: zeros, subnormals, halves, the largest."""
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(3, 96, generator=generator) * 2.0 ** draw(st.integers(-140, 100))
    x[:, 32:48] *= draw(st.sampled_from((0.0, 1e-4, 1.0, 1e4)))
    for column, number in draw(st.lists(st.tuples(st.integers(0, 95), st.sampled_from(HOSTILE)), max_size=6)):
        x[draw(st.integers(0, 2)), column] = number
    x = x.to(dtype)
    return torch.nan_to_num(x, posinf=LARGEST[dtype], neginf=-LARGEST[dtype])


def round_trip_of_reference(x: Tensor, name: str, shared: Tensor | None) -> Tensor:
    args = REFERENCE[name]
    groups = x.unflatten(-1, (-1, args.group_size or x.shape[-1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, shared)
    return reference_round_trip(x, scale, zero, args, shared)


@given(x=hostile_tensors(), name=st.sampled_from(list(FORMATS)))
@settings(max_examples=150, deadline=None)
def test_round_trips_are_those_of_compressed_tensors_to_the_bit(x: Tensor, name: str) -> None:
    shared = generate_gparam(x.min(), x.max()) if name == "nvfp4" else None
    own = 0.0 if shared is None else float(global_scale(x.abs().amax()))
    assert shared is None or own == float(shared)
    spec = QuantSpec(FORMATS[name].bits, True, FORMATS[name].group, half_steps=True, format=name, tensor_scale=own)
    found, expected = fake_quantize(x, spec), round_trip_of_reference(x, name, shared)
    assert found.dtype == x.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.to(x.dtype).nan_to_num())
    wide = fake_quantize(x, QuantSpec(FORMATS[name].bits, True, FORMATS[name].group, format=name, tensor_scale=own))
    if (
        name in ("mxfp4", "mxfp8") and x.dtype != torch.float16
    ):  # powers of two: the dtype of the arithmetic changes nothing
        assert torch.equal(wide.nan_to_num(), found.nan_to_num())


@given(x=hostile_tensors(), name=st.sampled_from(list(FORMATS)))
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_of_weights_are_those_of_compressed_tensors(x: Tensor, name: str) -> None:
    w = x.float()
    shared = generate_gparam(w.min(), w.max()) if name == "nvfp4" else None
    given_scale = None if shared is None else tensor_scale_of(w)
    group = FORMATS[name].group
    scale = format_scales(w, name, group_size=group, tensor_scale=given_scale, norm=2.4, search=False)
    codes = format_codes(w, scale, name)
    found = dequantize_weight(codes, scale, torch.zeros_like(scale), group)
    expected = round_trip_of_reference(w, name, shared)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    if FORMATS[name].bits == 4 and not found.isnan().any():
        packed = pack_e2m1(codes)
        assert torch.equal(packed, pack_fp4_to_uint8(codes.float()))
        assert torch.equal(unpack_e2m1(packed).float(), unpack_fp4_from_uint8(packed, *w.shape, dtype=torch.float32))


def inputs_and_weight() -> tuple[Tensor, Tensor]:
    """Inputs [200, 64] whose features are of many sizes and correlated, and a weight [24, 64], fp64."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(200, 64, generator=generator, dtype=torch.float64) @ torch.randn(
        64, 64, generator=generator, dtype=torch.float64
    )
    return mixed * torch.logspace(-1, 1, 64, dtype=torch.float64), torch.randn(
        24, 64, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_stays_on_the_grid_and_beats_rounding_to_nearest(name: str, act_order: bool) -> None:
    x, w = inputs_and_weight()
    hessian = Hessian(64, torch.float64)
    hessian.add(x)
    mean, number_format = hessian.mean(), FORMATS[name]
    options = GPTQOptions(
        number_format.bits, group_size=number_format.group, mse_clip=True, act_order=act_order, format=name
    )
    solved = solve(w, prepare(mean, options), options)
    elements = solved.codes.double()
    allowed = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    if number_format.bits == 4:
        allowed = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.isin(elements.abs(), allowed.abs()).all()
    if number_format.scale == "e8m0":
        assert torch.equal(solved.scale, torch.exp2(torch.log2(solved.scale).round()))
    if name == "nvfp4":
        blocks = solved.scale.float() * tensor_scale_of(w)
        assert torch.allclose(blocks, blocks.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    error, nearest, size = output_errors(w, solved, mean, options).sum(0)
    assert 0 < error < nearest < size
    refined = coordinate_descent(w, solved, mean, prepare(mean, options), options, 1)
    assert output_errors(w, refined, mean, options).sum(0)[0] < error
    assert torch.isin(refined.codes.double().abs(), allowed.abs()).all()
    # Rows may be shared over ranks at whole tiles without a change.
    tall = w.repeat(12, 1)
    shared = GPTQOptions(**{**vars(options), "tensor_scale": tensor_scale_of(w) if name == "nvfp4" else None})
    whole = solve(tall, prepare(mean, shared), shared)
    parts = [solve(tall[a:b], prepare(mean, shared), shared) for a, b in split_rows(len(tall), 2)]
    assert torch.equal(torch.cat([part.codes.float() for part in parts]), whole.codes.float())


@pytest.mark.parametrize("name", FORMATS)
def test_a_search_of_scales_never_loses_and_knows_four_over_six(name: str) -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    group, common = FORMATS[name].group, {"tensor_scale": tensor_scale_of(w) if name == "nvfp4" else None, "norm": 2.0}
    errors = []
    for search in (False, True):
        scale = format_scales(w, name, group_size=group, search=search, **common)
        moved = dequantize_weight(format_codes(w, scale, name), scale, torch.zeros_like(scale), group) - w
        errors.append(moved.square().unflatten(1, (-1, group or 96)).sum(-1))
    assert (errors[1] <= errors[0]).all()
    assert bool(errors[1].sum() < errors[0].sum()) == (len(FORMATS[name].factors) > 1)
    if name == "nvfp4":  # 4, 4, 2, 2 fit exactly where the largest is put at 4, and not where it is put at 6
        w = torch.tensor([[4.0, 4.0, 2.0, -2.0] * 4, [6.0, 3.0, 1.0, 0.5] * 4])
        scale = format_scales(w, name, group_size=16, tensor_scale=448.0, norm=2.0, search=True)
        assert torch.equal(dequantize_weight(format_codes(w, scale, name), scale, torch.zeros_like(scale), 16), w)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_straight_through(name: str) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    spec = QuantSpec(FORMATS[name].bits, True, FORMATS[name].group, format=name)
    rounded = fake_quantize(x, spec)
    assert 0 < float((rounded - x).detach().abs().max()) < 1
    (rounded * direction).sum().backward()
    assert torch.equal(x.grad, direction)


def _with_scale_of_the_largest(x: Tensor, name: str) -> Tensor:
    """Q(x), for plain autograd: rounding of elements and of scales held constant, scales proportional to the largest value."""
    number_format = FORMATS[name]
    groups = x.unflatten(-1, (-1, number_format.group or x.shape[-1]))
    largest = groups.abs().amax(-1)
    scale = (largest * (group_scales(largest, number_format) / largest).detach()).unsqueeze(-1)
    units = (groups / scale).clamp(-number_format.largest, number_format.largest)
    return ((units + (round_elements(units, number_format) - units).detach()) * scale).flatten(-2)


@pytest.mark.parametrize("name", FORMATS)
def test_learned_scales_beside_a_rotation_have_the_gradient_through_the_groups_scales(name: str) -> None:
    """Against plain autograd of Q((x R) * s) / s R^T with rounding held constant."""
    generator = torch.Generator().manual_seed(3)
    x, direction = torch.randn(2, 7, 64, generator=generator, dtype=torch.float64).unbind()
    r = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    spec = QuantSpec(FORMATS[name].bits, True, FORMATS[name].group, format=name)
    log_scale, oracle = (torch.linspace(-1, 1, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rotation = RotationParam(r, nn.Parameter(torch.zeros_like(r)))
    (rotate_quantize(x, rotation, spec, ScaleAndClip(log_scale, None)) * direction).sum().backward()
    z = x @ r * oracle.exp()
    rounded = _with_scale_of_the_largest(z, name)
    torch.testing.assert_close(rounded, fake_quantize(z, spec), rtol=1e-12, atol=0)
    (rounded / oracle.exp() @ r.T * direction).sum().backward()
    torch.testing.assert_close(log_scale.grad, oracle.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_a_group_that_grows_as_a_whole_keeps_its_relative_error(name: str) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    spec = QuantSpec(FORMATS[name].bits, True, FORMATS[name].group, format=name)
    direction = torch.randn_like(x)
    rounded = range_quantize(x, spec)
    (rounded * direction).sum().backward()
    torch.testing.assert_close((x.grad * x).sum(-1), (rounded * direction).sum(-1), rtol=1e-9, atol=1e-12)
