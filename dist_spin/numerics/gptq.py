"""GPTQ (Frantar et al. 2022): round a weight column by column and let the later columns make up for each error.

For a linear y = W x with W [out, in] and H = (2/n) Σ x xᵀ, the loss of a rounded Q is tr((W-Q) H (W-Q)ᵀ). Every row of
W sees the same H, so one `prepare` (the Cholesky part) serves all linears with the same input, and `solve` may be given
any rows. Rows are worked on in tiles of `ROW_TILE`, every operation either elementwise or on exactly one tile: rows
split at multiples of it (`split_rows`) give the codes of the whole matrix bit for bit, on the same kind of device with
the same number of threads, and so do weights of one shape, such as experts, that are solved together (`solve_all`).
Products are IEEE fp32 (or fp64) whatever the process has set for its other matmuls.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_spin.numerics.format_rounding import E4M3, round_elements
from dist_spin.numerics.format_weights import format_codes, format_scales, tensor_scale_of
from dist_spin.numerics.formats import FORMATS, check_format
from dist_spin.numerics.quantizer import (
    CLIP_NORM,
    ROW_TILE,
    code_dtype,
    code_range,
    dequantize_weight,
    fused_kernels,
    quantize_weight,
    weight_scales,
)
from dist_spin.numerics.row_tiles import propagate_error, tiled, untiled, whole_batches

ERROR_PANEL = 4096  # columns of a Hessian multiplied at once where errors are measured
TRIANGLE_PANELS = 8  # in which a product with a triangular matrix leaves out its zeros: 9/16 of the work
INVERTED_AT_ONCE = 4096  # columns of a triangular matrix that are inverted by one solve
FIRST_RETRY_DAMPING = 1e-6  # where retries start when percdamp is smaller
MAX_DAMPING = 10.0  # a positive semidefinite matrix never needs this much


@dataclass(frozen=True)
class GPTQOptions:
    """How a weight is quantised. Raises ValueError when a field is out of range.

    `group_size` neighbours along `in` share a scale (0: the whole row); `mse_clip` searches each range, see
    `weight_scales`, for the least sum of |error| ** `clip_norm`. `percdamp` times the mean of H's diagonal is added to the
    diagonal. `block_size` columns are worked on before the rest is updated: it changes speed, not the result (up to
    rounding). `act_order` takes columns by falling diagonal of H, with every group's scale fixed from the original weight.
    `scale_dtype`: what scales are rounded to before a code is chosen, for runtimes that hold them so; None leaves them in
    the solve's dtype. `format`: int, or one of `formats.FORMATS`, whose scales `mse_clip` searches; `tensor_scale`: NVFP4's
    global scale, None for that of the weight that is solved.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int = 0
    mse_clip: bool = False
    percdamp: float = 0.01
    block_size: int = 128
    act_order: bool = False
    scale_dtype: torch.dtype | None = None
    clip_norm: float = CLIP_NORM
    format: str = "int"
    tensor_scale: float | None = None

    def __post_init__(self) -> None:
        code_range(self.bits, symmetric=self.symmetric)
        if self.format != "int":
            check_format(self.format, self.bits)
        if self.group_size < 0:
            raise ValueError(f"group_size must be 0 (the whole row) or positive, not {self.group_size}")
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be above 0, not {self.clip_norm}")
        if not 0 <= self.percdamp <= MAX_DAMPING:
            raise ValueError(f"percdamp must be 0 to {MAX_DAMPING:g}, not {self.percdamp}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, not {self.block_size}")


def fitted_scales(w: Tensor, options: GPTQOptions, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of w [rows, in] as `weight_scales` finds them under the options, the scale rounded to `scale_dtype`."""
    common: dict[str, Any] = {"group_size": group_size, "norm": options.clip_norm}
    if options.format == "int":
        scale, zero = weight_scales(w, options.bits, symmetric=options.symmetric, mse_clip=options.mse_clip, **common)
    else:
        scale = format_scales(w, options.format, tensor_scale=options.tensor_scale, search=options.mse_clip, **common)
        zero = torch.zeros_like(scale)
    return scale if options.scale_dtype is None else scale.to(options.scale_dtype).to(scale.dtype), zero


def nearest_codes(w: Tensor, scale: Tensor, zero: Tensor, options: GPTQOptions) -> Tensor:
    """Codes [..., rows, in] of w [..., rows, in] on its grid, rounded to nearest."""
    if options.format != "int":
        return format_codes(w, scale, options.format)
    return quantize_weight(w, scale, zero, options.bits, symmetric=options.symmetric, group_size=options.group_size)


def with_tensor_scale(options: GPTQOptions, w: Tensor) -> GPTQOptions:
    """The options with the global scale of w [rows, in], where the format has one and it is not set."""
    if options.format != "nvfp4" or options.tensor_scale is not None:
        return options
    return replace(options, tensor_scale=tensor_scale_of(w))


def _dtype_of_codes(options: GPTQOptions) -> torch.dtype:
    return code_dtype(options.bits, symmetric=options.symmetric) if options.format == "int" else E4M3


class Factor(NamedTuple):
    """What `solve` needs of a Hessian; columns in solving order.

    With U upper triangular and Uᵀ U = H⁻¹ (H damped), `feedback` is U with each row divided by its diagonal entry:
    row j says how much of column j's rounding error every later column takes over.
    """

    feedback: Tensor  # [in, in], unit upper triangular
    order: Tensor | None  # [in] original column of each solved one, or None when they are taken from left to right
    dead: Tensor  # [in] bool, original order: inputs that were always 0
    damping: float  # what was added to H's diagonal, as a fraction of the mean over live columns


class QuantizedWeight(NamedTuple):
    """Quantised rows, columns in original order; `dequantize_weight` turns them back into a weight."""

    codes: Tensor  # [out, in] int8 (uint8 for 8-bit asymmetric; E4M3 for formats other than int)
    scale: Tensor  # [out, n_groups] in the factor's dtype
    zero: Tensor  # [out, n_groups] integers, same dtype


@torch.no_grad()
def prepare(hessian: Tensor, options: GPTQOptions) -> Factor:
    """Factor a Hessian [in, in] (fp32 or fp64) once for every linear that shares its input.

    Dead inputs (diagonal 0) get diagonal 1, which decouples them. Where the factorisation fails, damping grows tenfold
    until it works. Raises ValueError for a Hessian that is not square, not finite, all zero, or indefinite.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"a Hessian is square, not {list(hessian.shape)}")
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity: the layer's calibration inputs overflowed")
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if dead.all():
        raise ValueError("the Hessian is all zero: the layer saw no input during calibration")
    order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else None
    damping = options.percdamp
    with exact_products():
        while (feedback := _feedback(hessian, order, added_diagonal(hessian, dead, damping))) is None:
            damping = max(10 * damping, FIRST_RETRY_DAMPING)
            if damping > MAX_DAMPING:
                raise ValueError(
                    f"the Hessian is not positive definite even with {MAX_DAMPING:g} times its mean diagonal"
                )
    return Factor(feedback, order, dead, damping)


def added_diagonal(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """What damping adds to a Hessian's diagonal, [in]: 1 for `dead` inputs, and a fraction of the mean over live ones."""
    return dead + damping * (hessian.diagonal().sum() / (~dead).sum())


def _feedback(hessian: Tensor, order: Tensor | None, added: Tensor) -> Tensor | None:
    """Unit upper triangular factor of a damped Hessian's inverse, or None where it is not positive definite.

    hessian: [in, in], left alone; order: as in `Factor`; added: [in], what damping adds to the diagonal. Reversing rows
    and columns turns a lower Cholesky factor into an upper one, H = R Rᵀ, so that U = R⁻¹ satisfies Uᵀ U = H⁻¹ without
    ever forming the inverse. No more than two matrices of this size are held beside the Hessian, three where it is small.
    """
    backwards = torch.arange(len(hessian), device=hessian.device).flip(0) if order is None else order.flip(0)
    damped = hessian.flip(0, 1) if order is None else hessian[backwards][:, backwards]
    damped.diagonal().add_(added[backwards])
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    if info.any():
        return None
    upper = lower.flip(0, 1)  # R
    del lower
    # Row j of U is divided by U[j, j] = 1 / R[j, j]; that is the inverse of R with columns scaled to unit diagonal.
    upper /= upper.diagonal().clone()
    invert_unit_upper_(upper)
    return upper if torch.isfinite(upper).all() else None


def invert_unit_upper_(upper: Tensor) -> None:
    """Replace a unit upper triangular matrix [n, n], zero below its diagonal, by its inverse.

    Large ones by halves, [[A, B], [0, C]] to [[A^-1, -A^-1 B C^-1], [0, C^-1]] (Du Croz and Higham 1992): products of which
    panels leave the zeros out take a third of the operations of a solve against the identity.
    """
    n = len(upper)
    if n <= INVERTED_AT_ONCE:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True, unitriangular=True))
        return
    half = n // 2
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    invert_unit_upper_(first)
    invert_unit_upper_(last)
    product = torch.empty_like(corner)
    width = -(-half // TRIANGLE_PANELS)
    for start in range(0, half, width):
        rows = slice(start, start + width)
        torch.mm(first[rows, start:], corner[start:], out=product[rows])
    for start in range(0, n - half, width):
        stop = min(start + width, n - half)
        corner[:, start:stop] = product[:, :stop] @ last[:stop, start:stop]
    corner.neg_()


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in full precision, as a factorisation needs, whatever the process chose for its model."""
    with _product_precision("highest"):
        yield


@contextmanager
def _product_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def solve(w: Tensor, factor: Factor, options: GPTQOptions) -> QuantizedWeight:
    """Quantise rows w [rows, in], any floating dtype, with a factor prepared under the same options.

    Grouped scales are fitted when the solve reaches the group, from the weight as updated by all earlier columns; with
    `act_order` (whose columns mix groups) and for whole rows, from the original weight. Columns of dead inputs are 0.
    Raises ValueError for a weight that is not finite, does not fit the factor, or is not divisible into groups.
    """
    return QuantizedWeight(*(part[0] for part in solve_all(w[None], [factor], [options])))


@torch.no_grad()
def solve_all(w: Tensor, factors: Sequence[Factor], options: Sequence[GPTQOptions]) -> QuantizedWeight:
    """`solve` of weights of one shape, w [experts, rows, in], each with its own factor: its codes, bit for bit.

    options: of each; they may differ in `tensor_scale` alone. Returns codes and scales with the experts in front.
    """
    rows, columns = w.shape[1:]
    if any(columns != len(factor.feedback) for factor in factors):
        raise ValueError(f"the weight has {columns} input columns, its Hessian {len(factors[0].feedback)}")
    group_size = options[0].group_size or columns
    if columns % group_size:
        raise ValueError(f"group_size {group_size} does not divide the weight's {columns} input columns")
    if not torch.isfinite(w).all():
        raise ValueError("the weight holds NaN or infinity")
    dead = torch.stack([factor.dead for factor in factors])[:, None]
    live = whole_batches(torch.where(dead, 0, w.to(factors[0].feedback.dtype)))
    options = [with_tensor_scale(own, weight) for own, weight in zip(options, live, strict=True)]
    if factors[0].order is None and group_size < columns:
        scales = None
    else:
        scales = scales_of_all(live, options, options[0].group_size)
    with exact_products():
        solved = _solve_tiles(live, scales, group_size, factors, options)
    return QuantizedWeight(*(part[:, :rows] for part in solved))


def scales_of_all(w: Tensor, options: Sequence[GPTQOptions], group_size: int) -> tuple[Tensor, Tensor]:
    """`fitted_scales` of w [experts, rows, in], each expert's under its own options; all at once where those are the same."""
    if all(own == options[0] for own in options):
        scale, zero = fitted_scales(w.flatten(0, 1), options[0], group_size)
        return scale.unflatten(0, w.shape[:2]), zero.unflatten(0, w.shape[:2])
    scales, zeros = zip(
        *(fitted_scales(one, own, group_size) for one, own in zip(w, options, strict=True)), strict=True
    )
    return torch.stack(scales), torch.stack(zeros)


def _solve_tiles(
    w: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    group_size: int,
    factors: Sequence[Factor],
    options: Sequence[GPTQOptions],
) -> QuantizedWeight:
    """Solve w [experts, tiles * ROW_TILE, in]; `scales`: scale and zero, or None to fit each group when it is reached.

    Nothing in here waits for the device: no tensor value decides a branch.
    """
    columns, group_count = w.shape[-1], w.shape[-1] // group_size
    orders = [factor.order for factor in factors if factor.order is not None]  # of each expert, or of none
    position = torch.stack(orders) if orders else torch.arange(columns, device=w.device).expand(len(w), -1)
    tiles = tiled(torch.take_along_dim(w, position[:, None], 2) if orders else w)  # [E, T, in, R]
    if scales is None:
        scale = tiles.new_ones(*tiles.shape[:2], group_count, ROW_TILE)  # [E, T, n, R]
        zero = torch.zeros_like(scale)
    else:
        scale, zero = tiled(scales[0]), tiled(scales[1])
    group_of = position // group_size  # [E, in] group of each solved column
    codes = torch.empty(tiles.shape, dtype=_dtype_of_codes(options[0]), device=w.device)

    # A group's fit needs its columns fully updated, so no block reaches past a group that waits to be fitted.
    span = columns if scales is not None else group_size
    for first in range(0, columns, span):
        if scales is None:
            fitted = scales_of_all(untiled(tiles[:, :, first : first + span]), options, 0)
            for whole, part in zip((scale, zero), fitted, strict=True):
                whole[:, :, first // span] = part.view(*tiles.shape[:2], ROW_TILE)
        for start in range(first, first + span, options[0].block_size):
            stop = min(start + options[0].block_size, first + span)
            codes[:, :, start:stop], residual = solve_block(
                tiles[:, :, start:stop],
                torch.stack([factor.feedback[start:stop, start:stop] for factor in factors]),
                scale,
                zero,
                group_of[:, start:stop],
                options[0],
            )
            for later, factor, error in zip(tiles[:, :, stop:], factors, residual, strict=True):
                propagate_error(later, factor.feedback[start:stop, stop:].T, error)

    solved = untiled(codes)
    for expert, order in zip(solved, orders, strict=False):
        expert.copy_(expert[:, order.argsort()])
    return QuantizedWeight(solved, untiled(scale), untiled(zero))


def solve_block(
    w: Tensor, feedback: Tensor, scale: Tensor, zero: Tensor, groups: Tensor, options: GPTQOptions
) -> tuple[Tensor, Tensor]:
    """Round the columns of one block in turn, each error fed to the block's later columns.

    w: [..., T, B, R], overwritten; feedback: [..., B, B], unit upper triangular; scale, zero: [..., T, n, R]; groups: [..., B],
    which of the n each column uses. Leading dimensions are experts, if any. Returns codes and residuals w - q at the time of
    rounding, both [..., T, B, R]. Elementwise in T, R.
    """
    lowest, highest = code_range(options.bits, symmetric=options.symmetric)
    number_format = FORMATS.get(options.format)
    if (kernels := fused_kernels(w)) is not None:
        if number_format is not None:
            codes, most = torch.empty(w.shape, dtype=w.dtype, device=w.device), number_format.largest
            block = (w, feedback, scale, zero, groups, codes)
            return codes, kernels.solve_block(*block, -most, most, number_format.bits)
        codes = torch.empty(w.shape, dtype=code_dtype(options.bits, symmetric=options.symmetric), device=w.device)
        return codes, kernels.solve_block(w, feedback, scale, zero, groups, codes, lowest, highest)
    at = groups[..., None, :, None].expand(w.shape)
    scale, zero = scale.gather(-2, at), zero.gather(-2, at)  # [..., T, B, R]
    low, high = lowest - zero, highest - zero  # bounds of round(w / scale), which saves adding zero in the loop
    steps, residual = torch.empty_like(scale), torch.empty_like(scale)
    for j in range(w.shape[-2]):
        column, step, error, unit = (x[..., j, :] for x in (w, steps, residual, scale))  # [..., T, R]
        torch.div(column, unit, out=step)
        if number_format is None:
            step.round_().clamp_(low[..., j, :], high[..., j, :])
        else:
            step.copy_(round_elements(step, number_format))
        torch.mul(step, unit, out=error)
        torch.sub(column, error, out=error)
        later = feedback[..., None, j, j + 1 :, None]
        w[..., j + 1 :, :].addcmul_(later, error[..., None, :], value=-1)
    return steps.add_(zero), residual


@torch.no_grad()
def output_errors(w: Tensor, quantized: QuantizedWeight, hessian: Tensor, options: GPTQOptions) -> Tensor:
    """Of each row of w [..., rows, in]: e H eᵀ of the solution, the same of RTN on its scales, w H wᵀ; fp64 [..., rows, 3].

    hessian: [..., in, in]; leading dimensions are experts, if any. Sums over rows are tr(E H Eᵀ) and so on. H is symmetric,
    so only its upper block triangle is multiplied. They are for people to read and decide nothing, so a GPU multiplies fp32
    in TF32, which leaves three of their digits or more.
    """
    codes, scale, zero = quantized
    w = w.to(hessian.dtype)
    nearest = nearest_codes(w, scale, zero, options)
    figures = torch.zeros(*w.shape[:-1], 3, dtype=torch.float64, device=w.device)
    with _product_precision("high" if w.is_cuda else "highest"):
        for q, figure in zip((codes, nearest, None), figures.unbind(-1), strict=True):
            error = w if q is None else w - dequantize_weight(q, scale, zero, options.group_size, w.dtype)
            for start in range(0, w.shape[-1], ERROR_PANEL):
                stop = min(start + ERROR_PANEL, w.shape[-1])
                product = error[..., start:stop] @ hessian[..., start:stop, start:]
                product[..., stop - start :] *= 2
                figure += product.mul_(error[..., start:]).sum(-1, dtype=torch.float64)
    return figures
