"""Fake quantisation whose clipping is learned: the range shrinks by factors that have a gradient.

The grid is that of `numerics.quantizer`, with low * f_low and high * f_high in place of the extremes of each group. Rounding is
straight-through (Bengio et al. 2013), so with s the step and r = round(x / s) a value inside the range has gradients 1 for x
and r - x / s for s, and one outside has the gradient of the bound that it was moved to (learned step sizes, Esser et al. 2020).
The extremes are values of x, so what reaches a bound also reaches the element that set it.
"""

from typing import Any

import torch
from torch import Tensor

from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.quantizer import code_range, scale_and_zero, triton_works, value_range


def fused_kernels(x: Tensor) -> Any | None:
    """The module of fused kernels where it serves groups like x [..., d] (on CUDA where Triton works); None elsewhere."""
    if not x.is_cuda or accumulation_dtype(x.dtype) != torch.float32 or not triton_works():
        return None
    from dist_spin.numerics import triton_clipping

    return triton_clipping if x.shape[-1] <= triton_clipping.MAX_WIDTH else None


class _ClippedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shrink_low: Tensor,
        shrink_high: Tensor,
        bits: int,
        symmetric: bool,  # noqa: FBT001 (autograd hands arguments on by position)
        even: bool,  # noqa: FBT001
    ) -> Tensor:
        lowest, highest = code_range(bits, symmetric=symmetric)
        ctx.code_range = -highest if even else lowest, highest, symmetric
        ctx.kernels = fused_kernels(x)
        if ctx.kernels is not None:
            ctx.save_for_backward(x, shrink_low, shrink_high)
            result: Tensor = ctx.kernels.forward(x, shrink_low, shrink_high, ctx.code_range[:2], symmetric=symmetric)
            return result
        wide = accumulation_dtype(x.dtype)
        low, high = (end.unsqueeze(-1) for end in value_range(x))
        clipped = low.to(wide) * shrink_low, high.to(wide) * shrink_high
        scale, zero = scale_and_zero(*clipped, bits, symmetric=symmetric)
        ctx.save_for_backward(x, low, high, shrink_low, shrink_high, scale, zero)
        codes = (x / scale).round_().add_(zero).clamp_(*ctx.code_range[:2])
        return codes.sub_(zero).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        lowest, highest, symmetric = ctx.code_range
        g = grad_outputs[0]
        if ctx.kernels is not None:
            x, *shrinks = ctx.saved_tensors
            d_x, *d_shrinks = ctx.kernels.backward(x, g, *shrinks, (lowest, highest), symmetric=symmetric)
            sums = [d.sum_to_size(s.shape).to(s.dtype) for d, s in zip(d_shrinks, shrinks, strict=True)]
            return d_x, *sums, None, None, None
        x, low, high, shrink_low, shrink_high, scale, zero = ctx.saved_tensors
        steps = x / scale
        rounded = torch.round(steps)
        codes = rounded + zero
        below, above = codes < lowest, codes > highest
        inside = ~(below | above)
        # What rounding the zero moved the bounds by, in steps; 0 on a symmetric grid.
        shift = 0 if symmetric else -low.to(scale.dtype) * shrink_low / scale - zero
        per_scale = g * torch.where(inside, rounded - steps, shift)  # [..., d], in the scale's dtype
        if symmetric:
            # One bound, the larger of the two sides, and the codes reach further below it than above.
            outside = g * (above.to(scale.dtype) * highest + below.to(scale.dtype) * lowest)
            d_bound = (per_scale + outside).sum(-1, keepdim=True) / highest
            from_low = -low.to(scale.dtype) * shrink_low > high.to(scale.dtype) * shrink_high
            d_low, d_high = torch.where(from_low, -d_bound, 0), torch.where(from_low, 0, d_bound)
        else:
            d_step = per_scale.sum(-1, keepdim=True) / (highest - lowest)
            d_low = (g * below).sum(-1, keepdim=True, dtype=scale.dtype) - d_step
            d_high = (g * above).sum(-1, keepdim=True, dtype=scale.dtype) + d_step
        d_x = g * inside
        # A bound that was stretched to include 0 is no value of x.
        d_x += torch.where((x == low) & (low < 0), d_low * shrink_low, 0).to(d_x.dtype)
        d_x += torch.where((x == high) & (high > 0), d_high * shrink_high, 0).to(d_x.dtype)
        d_shrink_low = (d_low * low).sum_to_size(shrink_low.shape)
        d_shrink_high = (d_high * high).sum_to_size(shrink_high.shape)
        return d_x, d_shrink_low.to(shrink_low.dtype), d_shrink_high.to(shrink_high.dtype), None, None, None


def clipped_quantize(
    x: Tensor, shrink: tuple[Tensor, Tensor], bits: int, *, symmetric: bool, group_size: int = 0, even: bool = False
) -> Tensor:
    """Quantise and dequantise x [..., d] with a range shrunken by learned factors; same shape and dtype.

    shrink: factors of the lower and upper end of every group, above 0, each a scalar or broadcasting against
    [..., d / group, 1], in fp32 (fp64 for fp64 x). Differentiable in x and both. Factors of 1 give `fake_quantize`.
    even: leave a symmetric grid's lowest code out, as values that are cut at both ends of their range do.
    """
    width = x.shape[-1]
    groups = x.unflatten(-1, (-1, group_size)) if group_size not in (0, width) else x.unsqueeze(-2)
    return _ClippedQuantize.apply(groups, *shrink, bits, symmetric, even and symmetric).flatten(-2)
