"""Fused GPU kernels for what plain torch does in many launches; imported only where triton is installed.

All arithmetic is IEEE fp32. Results differ from the torch path of the same function only where two candidates are equal
within rounding (a fused multiply-add rounds once where torch rounds twice).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# In the kernels, adding and subtracting 12582912 = 1.5 * 2**23 rounds any |x| < 2**22 half to even.
ROWS_PER_PROGRAM = 32  # of a tile: columns of a block times these are held in registers
CLIP_BLOCK = 2048  # elements of a group looked at together


@triton.jit
def _rounded_element(x, FLOAT_BITS: tl.constexpr):
    """`format_rounding.round_elements` of x within the format's range: E2M1 for 4 bits, E4M3 for 8."""
    size = tl.abs(x)
    if FLOAT_BITS == 4:
        unit = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    else:  # an eighth of the power of two below it
        power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.maximum(power, 0.015625) * 0.125
    rounded = ((tl.div_rn(size, unit) + 12582912.0) - 12582912.0) * unit
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _solve_block_kernel(
    w_ptr,
    feedback_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    codes_ptr,
    residual_ptr,
    w_stride,
    scale_stride,
    expert_tiles,
    columns,
    lowest,
    highest,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLOAT_BITS: tl.constexpr,
):
    program = tl.program_id(0)
    tile = (program // (TILE // ROWS)).to(tl.int64)
    feedback_ptr += tile // expert_tiles * columns * columns
    group_ptr += tile // expert_tiles * columns
    rows = (program % (TILE // ROWS)) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = column[:, None] * TILE + rows[None, :]
    w = tl.load(w_ptr + tile * w_stride + at, mask=inside[:, None], other=0.0)  # [BLOCK, ROWS]
    out = tile * columns * TILE + rows
    for j in range(columns):
        spot = tile * scale_stride + tl.load(group_ptr + j) * TILE + rows
        scale = tl.load(scale_ptr + spot)
        zero = tl.load(zero_ptr + spot)
        feedback = tl.load(feedback_ptr + j * columns + column, mask=inside & (column > j), other=0.0)
        now = tl.sum(tl.where(column[:, None] == j, w, 0.0), axis=0)  # [ROWS]: a selection, so the sum is exact
        # Clamping to whole numbers before rounding gives what clamping after it does.
        step = tl.minimum(tl.maximum(tl.div_rn(now, scale), lowest - zero), highest - zero)
        if FLOAT_BITS == 0:
            step = (step + 12582912.0) - 12582912.0
        else:
            step = _rounded_element(step, FLOAT_BITS)
        error = now - step * scale
        tl.store(codes_ptr + out + j * TILE, (step + zero).to(codes_ptr.dtype.element_ty))
        tl.store(residual_ptr + out + j * TILE, error)
        w = w - feedback[:, None] * error[None, :]


def solve_block(
    w: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor,
    groups: Tensor,
    codes: Tensor,
    lowest: float,
    highest: float,
    float_bits: int = 0,
) -> Tensor:
    """`gptq.solve_block` in one launch; w is left alone.

    w: [..., T, B, R] fp32, a column range of [..., T, in, R]; feedback: [..., B, B]; scale, zero: [..., T, n, R] contiguous;
    groups: int64 [..., B], which of the n each column uses; codes: [..., T, B, R] contiguous, filled. Leading dimensions are
    experts, if any. float_bits: of the elements of a number format, 0 for int; its lowest and highest are elements. Returns
    residuals [..., T, B, R].
    """
    expert_tiles, columns, rows = w.shape[-3:]
    count = w.shape[:-2].numel()
    residual = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if count:
        _solve_block_kernel[(count * (rows // ROWS_PER_PROGRAM),)](
            w,
            feedback.contiguous(),
            scale,
            zero,
            groups.contiguous(),
            codes,
            residual,
            w.stride(-3),
            scale.stride(-3),
            expert_tiles,
            columns,
            float(lowest),
            float(highest),
            TILE=rows,
            ROWS=ROWS_PER_PROGRAM,
            BLOCK=triton.next_power_of_2(columns),
            FLOAT_BITS=float_bits,
            num_warps=4,
        )
    return residual


@triton.jit
def _clip_trial(
    start,
    width,
    low,
    high,
    percentage,
    lowest,
    highest,
    norm,
    tiny,
    nothing,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Error, scale and zero of a group with its range shrunken to a percentage."""
    lane = tl.arange(0, BLOCK)
    factor = tl.div_rn(percentage * 1.0, 100.0)
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-low * factor, high * factor), highest)
        scale = tl.where(scale < tiny, 1.0, scale)
        zero = nothing
    else:
        scale = tl.div_rn(high * factor - low * factor, highest - lowest)
        scale = tl.where(scale < tiny, 1.0, scale)
        zero = (tl.div_rn(-(low * factor), scale) + 12582912.0) - 12582912.0
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        x = tl.load(start + first + lane, mask=first + lane < width, other=0.0)
        code = (tl.div_rn(x, scale) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code + zero, lowest), highest)
        error = tl.abs((code - zero) * scale - x)
        total += tl.exp2(norm * tl.log2(error))  # 0 where the error is 0
    return tl.sum(total, axis=0), scale, zero


@triton.jit
def _clip_refined(
    best_error,
    best_scale,
    best_zero,
    best,
    start,
    width,
    low,
    high,
    lowest,
    highest,
    norm,
    tiny,
    most,
    least,
    REACH: tl.constexpr,
    STEP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best (error, scale, zero, percentage) less than REACH around the best so far, in steps of STEP."""
    if REACH > STEP:
        centre = best
        for i in range(2 * (REACH // STEP) - 1):
            percentage = centre + (REACH // STEP - 1 - i) * STEP
            inside = (percentage != centre) & (percentage <= most) & (percentage > least)
            if inside:
                error, scale, zero = _clip_trial(
                    start, width, low, high, percentage, lowest, highest, norm, tiny, low * 0.0, SYMMETRIC, BLOCK
                )
                better = error < best_error
                best_error = tl.where(better, error, best_error)
                best_scale = tl.where(better, scale, best_scale)
                best_zero = tl.where(better, zero, best_zero)
                best = tl.where(better, percentage, best)
    return best_error, best_scale, best_zero, best


@triton.jit
def _clip_kernel(
    w_ptr,
    scale_ptr,
    zero_ptr,
    width,
    lowest,
    highest,
    norm,
    tiny,
    most,
    least,
    COARSE: tl.constexpr,
    MIDDLE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    start = w_ptr + group * width
    lows = tl.zeros([BLOCK], dtype=tl.float32)
    highs = tl.zeros([BLOCK], dtype=tl.float32)
    poison = tl.zeros([BLOCK], dtype=tl.float32)  # NaN where the weight is NaN or infinite: it must show in the scale
    for first in range(0, width, BLOCK):
        x = tl.load(start + first + lane, mask=first + lane < width, other=0.0)
        lows = tl.minimum(lows, x)
        highs = tl.maximum(highs, x)
        poison += x * 0.0
    low = tl.min(lows, axis=0)
    high = tl.max(highs, axis=0)
    nothing = low * 0.0  # makes loop variables of numbers
    best_error = nothing + float("inf")
    best_scale = nothing + 1.0
    best_zero = nothing
    best = most + 0 * tl.program_id(0)  # a number, also where `most` is a constant
    for i in range(tl.cdiv(most - least, COARSE)):
        percentage = most - i * COARSE
        error, scale, zero = _clip_trial(
            start, width, low, high, percentage, lowest, highest, norm, tiny, nothing, SYMMETRIC, BLOCK
        )
        better = error < best_error  # the widest range wins a tie
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        best = tl.where(better, percentage, best)
    best_error, best_scale, best_zero, best = _clip_refined(
        best_error,
        best_scale,
        best_zero,
        best,
        start,
        width,
        low,
        high,
        lowest,
        highest,
        norm,
        tiny,
        most,
        least,
        COARSE,
        MIDDLE,
        SYMMETRIC,
        BLOCK,
    )
    best_error, best_scale, best_zero, best = _clip_refined(
        best_error,
        best_scale,
        best_zero,
        best,
        start,
        width,
        low,
        high,
        lowest,
        highest,
        norm,
        tiny,
        most,
        least,
        MIDDLE,
        1,
        SYMMETRIC,
        BLOCK,
    )
    tl.store(scale_ptr + group, best_scale + tl.sum(poison, axis=0))
    tl.store(zero_ptr + group, best_zero)


def search_clip(
    w: Tensor,
    group_size: int,
    lowest: int,
    highest: int,
    *,
    symmetric: bool,
    norm: float,
    percentages: range,
    strides: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """`quantizer.weight_scales` with a clip search, in one launch; w: [rows, in] fp32, group_size dividing `in`.

    strides: steps through `percentages` of the first and second look; (1, 1) is every one of them.

    Returns scale and zero [rows, in / group_size].
    """
    w = w.contiguous()
    rows, width = w.shape
    groups = width // group_size
    scale = torch.empty(rows, groups, dtype=w.dtype, device=w.device)
    zero = torch.empty_like(scale)
    if scale.numel():
        block = min(CLIP_BLOCK, triton.next_power_of_2(group_size))
        _clip_kernel[(rows * groups,)](
            w,
            scale,
            zero,
            group_size,
            float(lowest),
            float(highest),
            norm,
            torch.finfo(w.dtype).tiny,
            percentages.start,
            percentages.stop,
            COARSE=strides[0],
            MIDDLE=strides[1],
            SYMMETRIC=symmetric,
            BLOCK=block,
            num_warps=max(1, min(4, block // 128)),
        )
    return scale, zero
