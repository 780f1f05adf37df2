"""The quantisers: hand-worked grids, properties of every grid, straight-through gradients, packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_spin.numerics import quantizer
from dist_spin.numerics.quantizer import (
    EVERY_CLIP,
    ROW_TILE,
    STAGED_CLIP,
    QuantSpec,
    dequantize_activation,
    dequantize_weight,
    fake_quantize,
    pack_int4,
    quantize_activation,
    quantize_weight,
    unpack_int4,
    weight_scales,
)

# No deadline: the first call of some torch operations takes half a second.
unhurried = settings(deadline=None, max_examples=100)
BITS = st.integers(2, 8)
WIDTH = 8


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Up to four rows of eight fp32 values, with zeros, repeats and subnormal numbers among them."""
    numbers = st.floats(-1e4, 1e4, width=32) | st.just(0.0)
    rows = draw(st.lists(st.lists(numbers, min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=4))
    return torch.tensor(rows, dtype=torch.float32)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN equal to NaN."""
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


# Activations


def test_asymmetric_grid_by_hand() -> None:
    codes, scale, zero = quantize_activation(torch.tensor([-1.0, 0.2, 0.6, 2.0]), QuantSpec(bits=2))
    assert (scale.tolist(), zero.tolist(), codes.tolist()) == ([1.0], [1.0], [0, 1, 2, 3])


def test_symmetric_grid_by_hand() -> None:
    x = torch.tensor([-14.0, 5.0, 6.9, 7.0])  # scale 14 / 7 = 2; 2.5 and 3.5 round to the even neighbour
    codes, scale, zero = quantize_activation(x, QuantSpec(bits=4, symmetric=True))
    assert (scale.tolist(), zero.tolist(), codes.tolist()) == ([2.0], [0.0], [-7, 2, 3, 4])


def test_range_includes_zero() -> None:
    _, scale, zero = quantize_activation(torch.tensor([[3.0, 15.0], [-3.0, -15.0]]), QuantSpec(bits=4))
    assert scale.tolist() == [[1.0], [1.0]]
    assert zero.tolist() == [[0.0], [15.0]]


def test_clip_ratio_shrinks_the_range() -> None:
    x = torch.tensor([0.0, 1.0, 15.0, 30.0])
    assert fake_quantize(x, QuantSpec(bits=4, clip_ratio=0.5)).tolist() == [0.0, 1.0, 15.0, 15.0]


@unhurried
@given(matrices(), BITS, st.booleans(), st.sampled_from([0, 2, 4]), st.sampled_from([torch.float32, torch.float64]))
def test_grid_properties(x: Tensor, bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    spec = QuantSpec(bits, symmetric, group_size)
    codes, scale, zero = quantize_activation(x, spec)
    lowest, highest = quantizer.code_range(bits, symmetric=symmetric)
    assert codes.dtype == scale.dtype == zero.dtype == dtype
    assert scale.shape == (len(x), WIDTH // (group_size or WIDTH))
    assert torch.equal(codes, codes.round())
    assert lowest <= codes.min()
    assert codes.max() <= highest
    y = fake_quantize(x, spec)
    assert torch.equal(y, dequantize_activation(codes, scale, zero))
    step = scale.repeat_interleave(WIDTH // scale.shape[1], dim=1)
    assert ((x - y).abs() <= 0.5001 * step).all()  # every value is within the range, so rounding is all the error
    assert (y[x == 0] == 0).all()


@unhurried
@given(matrices(), BITS, st.sampled_from([0, 2, 4]))
def test_symmetric_fake_quantisation_is_idempotent(x: Tensor, bits: int, group_size: int) -> None:
    spec = QuantSpec(bits, symmetric=True, group_size=group_size)
    once = fake_quantize(x.double(), spec)
    torch.testing.assert_close(fake_quantize(once, spec), once, rtol=1e-14, atol=1e-300)


@unhurried
@given(matrices(), BITS, st.booleans())
def test_groups_are_independent_rows(x: Tensor, bits: int, symmetric: bool) -> None:
    grouped = fake_quantize(x, QuantSpec(bits, symmetric, group_size=4))
    assert torch.equal(grouped, fake_quantize(x.view(-1, 4), QuantSpec(bits, symmetric)).view(-1, WIDTH))


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_zero_and_vanishing_groups_become_zeros(symmetric: bool) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1.0, -1.0]])
    y = fake_quantize(x, QuantSpec(4, symmetric))
    assert y[:2].tolist() == [[0, 0], [0, 0]]
    assert y[2].abs().max() > 0.9


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_show(symmetric: bool, bad: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = bad
    y = fake_quantize(x, QuantSpec(4, symmetric, group_size=4))
    assert y[0, :4].isnan().any()
    assert y[0, 4:].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_is_the_quantised_value_and_the_gradient_the_identity(dtype: torch.dtype) -> None:
    spec = QuantSpec(4, group_size=16, clip_ratio=0.6)
    x = torch.randn(5, 32, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = fake_quantize(x, spec)
    assert same(y, dequantize_activation(*quantize_activation(x.detach(), spec)).to(dtype))
    gradient = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(gradient)
    assert x.grad is not None
    assert same(x.grad, gradient)  # with clip_ratio 0.6, values are clamped among these


def test_sixteen_bits_leaves_the_tensor_alone() -> None:
    x = torch.randn(3, 4)
    assert not QuantSpec().enabled
    assert fake_quantize(x, QuantSpec()) is x


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    spec = QuantSpec(4, group_size=8)

    def site(x: Tensor) -> Tensor:
        return fake_quantize(2 * x, spec)

    x = torch.randn(3, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.compile(site, fullgraph=True, backend="aot_eager")(x)
    assert same(y, site(x))
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad == 2).all()


@pytest.mark.parametrize(
    "fields", [{"bits": 1}, {"bits": 9}, {"bits": 17}, {"group_size": -1}, {"clip_ratio": 0.0}, {"clip_ratio": 1.1}]
)
def test_impossible_specs_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        QuantSpec(**fields)


def test_impossible_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        fake_quantize(torch.ones(2, 10), QuantSpec(4, group_size=4))
    with pytest.raises(ValueError, match="floating point"):
        fake_quantize(torch.ones(2, 8, dtype=torch.int32), QuantSpec(4))
    with pytest.raises(ValueError, match="bits"):
        quantize_activation(torch.ones(2, 8), QuantSpec())


# Weights


@unhurried
@given(matrices(), BITS, st.booleans(), st.sampled_from([0, 2, 4]))
def test_weight_round_trip(w: Tensor, bits: int, symmetric: bool, group_size: int) -> None:
    scale, zero = weight_scales(w, bits, symmetric=symmetric, group_size=group_size)
    assert scale.dtype == zero.dtype == torch.float32
    codes = quantize_weight(w, scale, zero, bits, symmetric=symmetric, group_size=group_size)
    back = dequantize_weight(codes, scale, zero, group_size)
    assert torch.equal(quantize_weight(back, scale, zero, bits, symmetric=symmetric, group_size=group_size), codes)
    assert torch.equal(back, fake_quantize(w, QuantSpec(bits, symmetric, group_size)))


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, False)])
def test_codes_reach_both_ends_of_the_range(bits: int, symmetric: bool) -> None:
    w = torch.linspace(-1, 2, 1001)[None]
    scale, zero = weight_scales(w, bits, symmetric=symmetric)
    codes = quantize_weight(w, scale, zero, bits, symmetric=symmetric)
    assert codes.dtype == (torch.uint8 if (bits, symmetric) == (8, False) else torch.int8)
    assert (codes.min().item(), codes.max().item()) == ((-64, 127) if symmetric else (0, 2**bits - 1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, 7])
@pytest.mark.parametrize("norm", [2.4, 1.5])
def test_clip_search_finds_the_best_of_eighty(symmetric: bool, group_size: int, norm: float) -> None:
    w = torch.randn(3, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scale, zero = weight_scales(w, 3, symmetric=symmetric, group_size=group_size, mse_clip=True, norm=norm)
    plain, _ = weight_scales(w, 3, symmetric=symmetric, group_size=group_size)
    levels = 3 if symmetric else 7
    for row in range(3):
        for g, group in enumerate(w[row].split(group_size or 21)):
            costs = []
            for step in range(80):
                low, high = min(0.0, group.min().item()), max(0.0, group.max().item())
                width = max(-low, high) if symmetric else high - low
                s = width * (1 - step / 100) / levels
                z = 0 if symmetric else round(-low * (1 - step / 100) / s)
                # Rounding and clamping picks the grid's nearest point.
                grid = [s * k for k in (range(-4, 4) if symmetric else range(-z, 8 - z))]
                cost = sum(min(abs(v - point) for point in grid) ** norm for v in group.tolist())
                costs.append((cost, step, s, z))
            _, step, s, z = min(costs)
            assert scale[row, g].item() == pytest.approx(s, rel=1e-12)
            assert zero[row, g].item() == z
    assert (scale <= plain).all()
    assert (scale < plain).any()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_staged_clip_search_finds_what_trying_all_does(bits: int, device: str) -> None:
    w = torch.randn(500, 768, generator=torch.Generator().manual_seed(5)).to(device)
    every, staged = (weight_scales(w, bits, mse_clip=True, strides=how)[0] for how in (EVERY_CLIP, STAGED_CLIP))
    unsearched, _ = weight_scales(w, bits)
    assert (staged / every - 1).abs().mean() < 0.005  # the valley is flat at its bottom, so its neighbours may win
    assert (staged <= unsearched).all()
    assert bits == 8 or (staged < unsearched).float().mean() > 0.9


def test_clip_search_keeps_the_full_range_of_what_is_already_exact() -> None:
    w = torch.tensor([[-7.0, -3.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    scale, _ = weight_scales(w, 4, mse_clip=True)
    assert scale.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("group_size", [0, 8])
def test_clip_search_row_by_row_is_bit_identical(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(2 * ROW_TILE + 5, 40, generator=torch.Generator().manual_seed(4))
    whole = weight_scales(w, 4, symmetric=True, group_size=group_size, mse_clip=True)
    parts = [weight_scales(rows, 4, symmetric=True, group_size=group_size, mse_clip=True) for rows in w.split(ROW_TILE)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
    monkeypatch.setattr(quantizer, "CPU_SEARCH_ELEMENTS", 1)  # one factor at a time
    assert torch.equal(weight_scales(w, 4, symmetric=True, group_size=group_size, mse_clip=True)[0], whole[0])


@pytest.mark.parametrize("mse_clip", [False, True])
def test_a_weight_that_is_nan_shows_in_its_scale(mse_clip: bool) -> None:
    w = torch.ones(2, 4)
    w[1, 2] = float("nan")
    scale, _ = weight_scales(w, 4, mse_clip=mse_clip)
    assert scale.isnan().tolist() == [[False], [True]]


def test_weights_need_two_to_eight_bits() -> None:
    with pytest.raises(ValueError, match="bits"):
        weight_scales(torch.ones(2, 4), 16)


def test_low_precision_weights_are_measured_in_fp32() -> None:
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert torch.equal(weight_scales(w, 4)[0], weight_scales(w.float(), 4)[0])


# Packing


@unhurried
@given(st.booleans(), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2**32))
def test_packing_round_trip(symmetric: bool, rows: int, pairs: int, seed: int) -> None:
    lowest = -8 if symmetric else 0
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(lowest, lowest + 16, (rows, 2 * pairs), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, pairs))
    assert torch.equal(unpack_int4(packed, symmetric=symmetric), codes)


def test_every_byte_unpacks_and_packs_again() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_int4(unpack_int4(every)), every)
    assert torch.equal(pack_int4(unpack_int4(every, symmetric=False)), every)


def test_even_columns_lie_in_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([[1, -1, 7, -8]], dtype=torch.int8)).tolist() == [[0xF1, 0x87]]


@pytest.mark.parametrize("codes", [[1, 2, 3], [16, 0], [-9, 0], [-1, 8]])
def test_what_does_not_fit_four_bits_is_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"odd|fits neither"):
        pack_int4(torch.tensor(codes, dtype=torch.int8))
