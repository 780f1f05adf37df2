"""`learned_clipping` in one GPU kernel forwards and one backwards, where torch launches dozens; imported only where triton is.

All arithmetic is IEEE fp32, in torch's order and without fused multiply-adds: the result is that of the torch path to the bit,
gradients are but for the order of sums over a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# In the kernels, adding and subtracting 12582912 = 1.5 * 2**23 rounds any |x| < 2**22 half to even.
MAX_WIDTH = 16384  # of a group: a program holds whole groups in registers
TILE = 1024  # elements that a program holds where groups are shorter
ELEMENTS_PER_WARP = 256


@triton.jit
def _grid(x, shrink_low, shrink_high, lowest, highest, tiny, SYMMETRIC: tl.constexpr):
    """Of groups x [ROWS, BLOCK]: smallest and largest value, scale and zero, each [ROWS]."""
    low = tl.minimum(tl.min(x, axis=1), 0.0)
    high = tl.maximum(tl.max(x, axis=1), 0.0)
    poison = tl.sum(x * 0.0, axis=1)  # NaN where a value is NaN or infinite: it must show in the result
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-(low * shrink_low), high * shrink_high), highest)
        scale = tl.where(scale < tiny, 1.0, scale) + poison
        zero = low * 0.0
    else:
        scale = tl.div_rn(high * shrink_high - low * shrink_low, highest - lowest)
        scale = tl.where(scale < tiny, 1.0, scale) + poison
        zero = (tl.div_rn(-(low * shrink_low), scale) + 12582912.0) - 12582912.0
    return low, high, scale, zero


@triton.jit
def _forward_kernel(
    x_ptr,
    shrink_low_ptr,
    shrink_high_ptr,
    out_ptr,
    groups,
    width,
    lowest,
    highest,
    tiny,
    SYMMETRIC: tl.constexpr,
    SHRINK_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = (row[:, None] < groups) & (lane[None, :] < width)
    at = row[:, None] * width + lane[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    shrink_low = tl.load(shrink_low_ptr + row * SHRINK_PER_GROUP, mask=row < groups, other=1.0)
    shrink_high = tl.load(shrink_high_ptr + row * SHRINK_PER_GROUP, mask=row < groups, other=1.0)
    _low, _high, scale, zero = _grid(x, shrink_low, shrink_high, lowest, highest, tiny, SYMMETRIC)
    code = (tl.div_rn(x, scale[:, None]) + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code + zero[:, None], lowest), highest)
    tl.store(out_ptr + at, ((code - zero[:, None]) * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr,
    g_ptr,
    shrink_low_ptr,
    shrink_high_ptr,
    d_x_ptr,
    d_low_ptr,
    d_high_ptr,
    groups,
    width,
    lowest,
    highest,
    tiny,
    SYMMETRIC: tl.constexpr,
    SHRINK_PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = (row[:, None] < groups) & (lane[None, :] < width)
    at = row[:, None] * width + lane[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    shrink_low = tl.load(shrink_low_ptr + row * SHRINK_PER_GROUP, mask=row < groups, other=1.0)
    shrink_high = tl.load(shrink_high_ptr + row * SHRINK_PER_GROUP, mask=row < groups, other=1.0)
    low, high, scale, zero = _grid(x, shrink_low, shrink_high, lowest, highest, tiny, SYMMETRIC)
    steps = tl.div_rn(x, scale[:, None])
    rounded = (steps + 12582912.0) - 12582912.0
    code = rounded + zero[:, None]
    below = code < lowest
    above = code > highest
    kept = (code >= lowest) & (code <= highest)
    if SYMMETRIC:
        outside = tl.where(above, highest, tl.where(below, lowest, 0.0))
        per_scale = g * tl.where(kept, rounded - steps, 0.0) + g * outside
        d_bound = tl.div_rn(tl.sum(per_scale, axis=1), highest)
        from_low = -(low * shrink_low) > high * shrink_high
        d_low = tl.where(from_low, -d_bound, 0.0)
        d_high = tl.where(from_low, 0.0, d_bound)
    else:
        shift = tl.div_rn(-(low * shrink_low), scale) - zero  # what rounding the zero moved the bounds by, in steps
        per_scale = g * tl.where(kept, rounded - steps, shift[:, None])
        d_step = tl.div_rn(tl.sum(per_scale, axis=1), highest - lowest)
        d_low = tl.sum(tl.where(below, g, 0.0), axis=1) - d_step
        d_high = tl.sum(tl.where(above, g, 0.0), axis=1) + d_step
    narrow = d_x_ptr.dtype.element_ty
    to_low = tl.where((x == low[:, None]) & (low < 0)[:, None], (d_low * shrink_low)[:, None], 0.0)
    to_high = tl.where((x == high[:, None]) & (high > 0)[:, None], (d_high * shrink_high)[:, None], 0.0)
    d_x = (tl.where(kept, g, 0.0) + to_low.to(narrow).to(tl.float32)).to(narrow).to(tl.float32)
    d_x = (d_x + to_high.to(narrow).to(tl.float32)).to(narrow)
    tl.store(d_x_ptr + at, d_x, mask=inside)
    tl.store(d_low_ptr + row, d_low * low, mask=row < groups)
    tl.store(d_high_ptr + row, d_high * high, mask=row < groups)


def forward(
    x: Tensor, shrink_low: Tensor, shrink_high: Tensor, code_range: tuple[int, int], *, symmetric: bool
) -> Tensor:
    """Groups x [..., d], d at most MAX_WIDTH, quantised and dequantised, contiguous.

    shrink_low, shrink_high: fp32, each one number or broadcasting against [..., 1].
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(_forward_kernel, x, (x,), (shrink_low, shrink_high), (out,), code_range, symmetric=symmetric)
    return out


def backward(
    x: Tensor, g: Tensor, shrink_low: Tensor, shrink_high: Tensor, code_range: tuple[int, int], *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its shape and dtype, and of each group's own shrink factors, fp32 [..., 1]. g: that of the result."""
    x, g = x.contiguous(), g.contiguous()
    d_x = torch.empty_like(x)
    d_low, d_high = (torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device) for _ in range(2))
    shrinks = (shrink_low, shrink_high)
    _launch(_backward_kernel, x, (x, g), shrinks, (d_x, d_low, d_high), code_range, symmetric=symmetric)
    return d_x, d_low, d_high


def _launch(
    kernel: object,
    x: Tensor,
    inputs: tuple[Tensor, ...],
    shrinks: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    code_range: tuple[int, int],
    *,
    symmetric: bool,
) -> None:
    width = x.shape[-1]
    groups = x.numel() // max(width, 1)
    if not groups:
        return
    per_group = any(shrink.numel() != 1 for shrink in shrinks)
    if per_group:
        shrinks = tuple(shrink.expand(*x.shape[:-1], 1).contiguous() for shrink in shrinks)  # type: ignore[assignment]
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    kernel[(triton.cdiv(groups, rows),)](  # type: ignore[index]
        *inputs,
        *shrinks,
        *outputs,
        groups,
        width,
        float(code_range[0]),
        float(code_range[1]),
        torch.finfo(torch.float32).tiny,
        SYMMETRIC=symmetric,
        SHRINK_PER_GROUP=int(per_group),
        ROWS=rows,
        BLOCK=block,
        num_warps=max(1, min(16, rows * block // ELEMENTS_PER_WARP)),
        enable_fp_fusion=False,
    )
