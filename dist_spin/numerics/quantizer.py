"""Uniform integer quantisers: dynamic for activations, fixed scales for weights; the entry to those of `formats`.

Both use the same grid of integers. A value x becomes the code `clamp(round(x / scale) + zero, lowest, highest)` and comes back as
`(code - zero) * scale`; the symmetric grid has zero = 0 and codes -2^(b-1) … 2^(b-1)-1, the asymmetric one codes
0 … 2^b-1. Rounding is half to even. Arithmetic is fp32, fp64 for fp64 input, or a runtime's (`QuantSpec.half_steps`).
"""

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.format_rounding import group_gradient, grouped, round_groups
from dist_spin.numerics.formats import check_format

UNQUANTIZED_BITS = 16
ROW_TILE = 128  # rows that are always processed together; work split at its multiples gives bit-identical results
CLIP_NORM = 2.4  # exponent of the clip search's error (SpinQuant release; between least squares and least maximum)
CLIP_PERCENTAGES = (100, 20, -1)  # of the range, as arguments of `arange`: 1.00 down to 0.21
EVERY_CLIP, STAGED_CLIP = (1, 1), (16, 4)  # steps of the first and second look through them; the last has steps of 1
CPU_SEARCH_ELEMENTS = 2**16  # clip factors are tried together while their errors stay below this: they fit the cache
GPU_SEARCH_ELEMENTS = 2**25  # the same, where few launches count for more


@functools.cache
def triton_works() -> bool:
    """Whether Triton is installed, and a C compiler, with which it builds its launchers."""
    compilers = (os.environ.get("CC", ""), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(name) for name in compilers if name)


def fused_kernels(x: Tensor) -> Any | None:
    """The module of fused kernels where it serves tensors like x (fp32 on CUDA where Triton works); None elsewhere."""
    if not x.is_cuda or x.dtype != torch.float32 or not triton_works():
        return None
    from dist_spin.numerics import triton_kernels

    return triton_kernels


@dataclass(frozen=True)
class QuantSpec:
    """How one activation site is quantised. `bits` 16 leaves it alone.

    `group_size` counts neighbouring elements of the last dimension that share a scale; 0 means all of them (per token).
    `clip_ratio` shrinks the range that the codes span. `half_steps` computes a symmetric grid as compressed-tensors 0.20
    does, bit for bit: the largest value is (2^bits - 1) / 2 steps, so that it lies half a step beyond the highest code, and
    scale, quotient and result are each rounded to the input's dtype. `format`: int, or one of `formats.FORMATS`, where
    `half_steps` stands for the dtype alone; `tensor_scale`: NVFP4's global scale, 0 for each row's own. Raises ValueError
    when a field is out of range.
    """

    bits: int = UNQUANTIZED_BITS
    symmetric: bool = False
    group_size: int = 0
    clip_ratio: float = 1.0
    half_steps: bool = False
    format: str = "int"
    tensor_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.bits != UNQUANTIZED_BITS:
            code_range(self.bits, symmetric=self.symmetric)
        if self.format != "int":
            check_format(self.format, self.bits if self.enabled else 0, clip=self.clip_ratio)
        if self.group_size < 0:
            raise ValueError(f"group_size must be 0 (the whole last dimension) or positive, not {self.group_size}")
        if not 0 < self.clip_ratio <= 1:
            raise ValueError(f"clip_ratio must be above 0 and at most 1, not {self.clip_ratio}")
        if self.half_steps and not self.symmetric:
            raise ValueError("half_steps is a way of symmetric grids")

    @property
    def enabled(self) -> bool:
        return self.bits < UNQUANTIZED_BITS

    @property
    def steps(self) -> float:
        """Steps of a symmetric grid from 0 to the end of the range."""
        lowest, highest = code_range(self.bits, symmetric=True)
        return (highest - lowest) / 2 if self.half_steps else highest


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest code. Raises ValueError unless bits is 2 … 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8 (or 16 for no quantisation), not {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    if not x.is_floating_point():
        raise ValueError(f"a quantiser needs floating point input, not {x.dtype}")
    return accumulation_dtype(x.dtype)


def value_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value over the last dimension, the range stretched to include 0."""
    low, high = torch.aminmax(x, dim=-1)
    return low.clamp(max=0), high.clamp(min=0)


def _over(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded on every device: by a plain number, CUDA multiplies with the reciprocal instead."""
    return x / x.new_full((), number)


def scale_and_zero(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Grid that spans [low, high], low <= 0 <= high. A NaN bound gives a NaN scale, so it shows in the output."""
    lowest, highest = code_range(bits, symmetric=symmetric)
    scale = _over(torch.maximum(-low, high), highest) if symmetric else _over(high - low, highest - lowest)
    # An all-zero group, or one so small that its scale is not a normal number, becomes zeros instead of 0/0.
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
    return scale, torch.zeros_like(scale) if symmetric else torch.round(-low / scale)


def _encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Codes as floats, so that NaN survives; `scale` and `zero` must broadcast against x."""
    lowest, highest = code_range(bits, symmetric=symmetric)
    return torch.clamp(torch.round(x / scale) + zero, lowest, highest)


# Activations -----------------------------------------------------------------------------------------------------


def _activation_scale_and_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero of an activation's range."""
    if not spec.half_steps:
        return scale_and_zero(low, high, spec.bits, symmetric=spec.symmetric)
    scale = _over(torch.maximum(-low, high), spec.steps)
    return torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)


def quantize_activation(x: Tensor, spec: QuantSpec, ratio: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic quantisation along the last dimension.

    x: [..., d], any floating dtype. ratio: a scalar that shrinks the range further than `spec.clip_ratio` does.
    Returns codes [..., d], scale and zero [..., d / group], all in fp32 (fp64 for fp64 input; x's own dtype with
    `half_steps`); codes and zero hold integers, or NaN where the input's group holds NaN or infinity.
    Raises ValueError for a disabled spec, a group that does not divide d, or an integer tensor.
    """
    wide = _compute_dtype(x)
    groups = grouped(x if spec.half_steps else x.to(wide), spec.group_size)  # [..., n, group]
    low, high = value_range(groups)
    clip = spec.clip_ratio if ratio is None else spec.clip_ratio * ratio.to(low.dtype)
    scale, zero = _activation_scale_and_zero(low * clip, high * clip, spec)
    codes = _encode(groups, scale.unsqueeze(-1), zero.unsqueeze(-1), spec.bits, symmetric=spec.symmetric)
    return codes.flatten(-2), scale, zero


def dequantize_activation(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Inverse of `quantize_activation`: codes [..., d], scale and zero [..., n] to values [..., d] in scale's dtype."""
    groups = codes.unflatten(-1, (scale.shape[-1], codes.shape[-1] // scale.shape[-1]))
    return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


def _formatted(x: Tensor, spec: QuantSpec) -> Tensor:
    groups = grouped(x if spec.half_steps else x.to(_compute_dtype(x)), spec.group_size)
    return round_groups(groups, spec.format, spec.tensor_scale).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    """Quantise forward, identity backward. `x + (q - x).detach()` would round twice and miss q in low precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: QuantSpec) -> Tensor:
        if spec.format == "int":
            return dequantize_activation(*quantize_activation(x, spec)).to(x.dtype)
        return _formatted(x, spec).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


def fake_quantize(x: Tensor, spec: QuantSpec) -> Tensor:
    """Quantise and dequantise x [..., d] along its last dimension; same shape and dtype.

    The gradient is the identity everywhere, also for clamped values (straight-through estimator, Bengio et al. 2013);
    scale and zero carry none. With `bits` 16, x itself is returned. A weight [out, in] may be passed as well: the
    result equals its quantisation with unsearched `weight_scales`. Raises ValueError as `quantize_activation` does.
    """
    if not spec.enabled:
        return x
    return _StraightThrough.apply(x, spec)


class _LearnedRange(torch.autograd.Function):
    """Quantise with a learned clip: forward as `quantize_activation`, backward `range_gradients`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: Tensor | None, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(x, ratio)
        ctx.spec = spec
        values = (
            dequantize_activation(*quantize_activation(x, spec, ratio)) if spec.format == "int" else _formatted(x, spec)
        )
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, ratio = ctx.saved_tensors
        d_x, d_ratio = range_gradients(x, grad_outputs[0], ctx.spec, ratio)
        return d_x.to(x.dtype), None if ratio is None else d_ratio.to(ratio.dtype), None


def range_quantize(x: Tensor, spec: QuantSpec, ratio: Tensor | None = None) -> Tensor:
    """`fake_quantize` whose gradient also goes through the range of the codes: to x's extremes and to `ratio`.

    ratio: learned clip of int, a scalar tensor in (0, 1], beside `spec.clip_ratio`. Only rounding is straight-through. With
    `bits` 16, x itself is returned. Raises ValueError as `quantize_activation`.
    """
    return _LearnedRange.apply(x, ratio, spec) if spec.enabled else fake_quantize(x, spec)


def range_gradients(x: Tensor, g: Tensor, spec: QuantSpec, ratio: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of <g, Q(x)> by x [..., d] and by the clip ratio (scalar), in fp32 (fp64 for fp64 x).

    With codes inside the grid Q(x) = x + e, e = scale * (round(x / scale) - x / scale), and rounding held constant gives
    dQ = dx + (e / scale) dscale (Esser et al. 2020, LSQ, eq. 3); a clamped code is a bound of the range itself: an extreme of
    the group times the ratio, whose gradient goes to the elements that set it. Other formats: `group_gradient`.
    """
    wide = _compute_dtype(x)
    groups, g = grouped(x.to(wide), spec.group_size), grouped(g.to(wide), spec.group_size)  # [..., n, group]
    if spec.format != "int":
        return group_gradient(groups, g, spec.format).flatten(-2), g.new_zeros(())
    low, high = (bound.unsqueeze(-1) for bound in value_range(groups))
    clip = spec.clip_ratio if ratio is None else spec.clip_ratio * ratio.to(wide)
    scale, zero = _activation_scale_and_zero(low * clip, high * clip, spec)
    lowest, highest = code_range(spec.bits, symmetric=spec.symmetric)
    raw = torch.round(groups / scale) + zero
    over, under = raw > highest, raw < lowest
    inside = ~(over | under)
    d_scale = (g * inside * ((raw - zero) - groups / scale)).sum(-1, keepdim=True)
    d_over, d_under = (g * over).sum(-1, keepdim=True), (g * under).sum(-1, keepdim=True)
    if spec.symmetric:  # the range is ± the larger bound
        d_bound = (d_scale + d_over * highest + d_under * lowest) / spec.steps
        d_high, d_low = torch.where(high >= -low, d_bound, 0.0), torch.where(high < -low, -d_bound, 0.0)
    else:
        d_scale = d_scale + (d_over + d_under) * (
            -low * clip / scale - zero
        )  # what rounding the zero adds to the bounds
        d_high = d_over + d_scale / (highest - lowest)
        d_low = d_under - d_scale / (highest - lowest)
    d_ratio = (d_high * high + d_low * low).sum() * spec.clip_ratio
    d_x = g * inside
    for bound, d_bound in ((high, d_high), (low, d_low)):
        extreme = (groups == bound) & (bound != 0)
        d_x = d_x + extreme * (d_bound * clip / extreme.sum(-1, keepdim=True).clamp(min=1))
    return d_x.flatten(-2), d_ratio


# Weights ---------------------------------------------------------------------------------------------------------


def weight_scales(
    w: Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    group_size: int = 0,
    mse_clip: bool = False,
    strides: tuple[int, int] = EVERY_CLIP,
    norm: float = CLIP_NORM,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row, or each group of `group_size` neighbours along `in` (0: the whole row).

    w: [out, in]. Returns scale and zero [out, n_groups] in fp32 (fp64 for fp64 w). With `mse_clip`, the range of each
    group is the best of 80 shrunken ones, 1.00 down to 0.21, by the sum of |error| ** norm; the widest wins a tie. `strides`:
    EVERY_CLIP tries all of them, STAGED_CLIP 19, closer and closer around the best: the same where the error has one
    valley, in a quarter of the time.
    Raises ValueError for bits outside 2 … 8 and a group that does not divide `in`.
    """
    groups = grouped(w.to(_compute_dtype(w)), group_size)  # [out, n, group]
    low, high = value_range(groups)
    if not mse_clip:
        return scale_and_zero(low, high, bits, symmetric=symmetric)
    if (kernels := fused_kernels(low)) is not None:
        bounds = code_range(bits, symmetric=symmetric)
        searched = range(CLIP_PERCENTAGES[0], CLIP_PERCENTAGES[1])
        fitted: tuple[Tensor, Tensor] = kernels.search_clip(
            w.to(low.dtype),
            groups.shape[-1],
            *bounds,
            symmetric=symmetric,
            norm=norm,
            percentages=searched,
            strides=strides,
        )
        return fitted
    # On a CPU the last elements of a loop take the scalar `pow`, whose last bit differs from the vector one's: equal
    # chunks keep a row's result the same whichever rows come with it, and fit the cache. A GPU has one `pow`.
    rows = ROW_TILE if w.device.type == "cpu" else max(1, w.shape[0])
    chunks = zip(groups.split(rows), low.split(rows), high.split(rows), strict=True)
    fitted_chunks = [_search_clip(*c, bits, symmetric=symmetric, strides=strides, norm=norm) for c in chunks]
    scales, zeros = zip(*fitted_chunks, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search_clip(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, *, symmetric: bool, strides: tuple[int, int], norm: float
) -> tuple[Tensor, Tensor]:
    """Best grid among the shrunken ranges; groups [rows, n, group], low and high [rows, n]."""
    members = groups.movedim(-1, 0).unsqueeze(1).contiguous()  # [group, 1, rows, n]: sums fold along whole rows
    limit = CPU_SEARCH_ELEMENTS if groups.device.type == "cpu" else GPU_SEARCH_ELEMENTS
    at_once = max(1, limit // max(1, members.numel()))
    most, least = CLIP_PERCENTAGES[0], CLIP_PERCENTAGES[1]
    best_error, best_scale, best_zero = torch.full_like(low, torch.inf), low, low
    best = torch.full_like(low, most)  # percentage
    for reach, step in ((0, strides[0]), strides, (strides[1], 1)):
        if reach and reach <= step:
            continue
        # Made on the device: copying a list there would wait for it.
        kind: dict[str, Any] = {"dtype": low.dtype, "device": low.device}
        if reach:
            offsets = torch.arange(reach - step, step - reach - 1, -step, **kind)
            percentages = (best + offsets[:, None, None]).clamp(least + 1, most)  # [k, rows, n]
        else:
            percentages = torch.arange(most, least, -step, **kind)[:, None, None]
        for candidates in percentages.split(at_once):
            factors = _over(candidates, 100)
            scale, zero = scale_and_zero(low * factors, high * factors, bits, symmetric=symmetric)  # [factors, rows, n]
            error = _encode(members, scale, zero, bits, symmetric=symmetric).sub_(zero).mul_(scale).sub_(members)
            total, index = _folded_sum(error.abs_().pow_(norm)).min(0, keepdim=True)
            better = ~(total[0] >= best_error)  # the widest range wins a tie; NaN replaces numbers, so it shows
            best_error = torch.where(better, total[0], best_error)
            best_scale = torch.where(better, scale.gather(0, index)[0], best_scale)
            best_zero = torch.where(better, zero.gather(0, index)[0], best_zero)
            best = torch.where(better, candidates.expand_as(scale).gather(0, index)[0], best)
    return best_scale, best_zero


def _folded_sum(x: Tensor) -> Tensor:
    """Sum over the first dimension, overwriting x, in an order fixed by its length: library sums heed the rest too."""
    while (length := len(x)) > 1:
        half = length // 2
        x[:half] += x[length - half :]
        x = x[: length - half]
    return x[0]


def code_dtype(bits: int, *, symmetric: bool) -> torch.dtype:
    """int8, except for 8-bit asymmetric codes 0 … 255, which are uint8."""
    return torch.uint8 if code_range(bits, symmetric=symmetric)[1] > 127 else torch.int8


def quantize_weight(
    w: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True, group_size: int = 0
) -> Tensor:
    """Round w [out, in] to the nearest code of its grid (RTN).

    scale, zero: [out, n_groups] as from `weight_scales`. Returns codes [out, in] in `code_dtype(bits, symmetric)`; NaN
    has no code, so w must be finite. Raises ValueError as `weight_scales` does.
    """
    groups = grouped(w.to(scale.dtype), group_size)  # [out, n, group]
    codes = _encode(groups, scale.unsqueeze(-1), zero.unsqueeze(-1), bits, symmetric=symmetric)
    return codes.flatten(-2).to(code_dtype(bits, symmetric=symmetric))


def dequantize_weight(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weight [out, in] in `dtype` from codes [out, in] and scale, zero [out, n_groups]; computed in scale's dtype."""
    groups = grouped(codes.to(scale.dtype), group_size)  # [out, n, group]
    return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte: int8 [..., in] to uint8 [..., in / 2], the even column in the low nibble.

    Raises ValueError when `in` is odd, or when the codes fit neither -8 … 7 nor 0 … 15.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes are packed in pairs; the last dimension, {codes.shape[-1]}, is odd")
    if codes.numel():
        lowest, highest = (int(bound) for bound in torch.aminmax(codes))
        if not (-8 <= lowest and highest <= 7) and not (0 <= lowest and highest <= 15):
            raise ValueError(f"codes span {lowest} … {highest}, which fits neither -8 … 7 nor 0 … 15")
    return pack_nibbles(codes)


def pack_nibbles(codes: Tensor) -> Tensor:
    """`pack_int4` of codes that are known to fit, without looking at them: a GPU need not be waited for."""
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, *, symmetric: bool = True) -> Tensor:
    """Inverse of `pack_int4`: uint8 [..., in / 2] to int8 [..., in]; `symmetric` codes are -8 … 7, others 0 … 15."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return (nibbles ^ 8) - 8 if symmetric else nibbles
