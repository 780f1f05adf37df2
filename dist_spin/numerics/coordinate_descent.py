"""Codes made better after GPTQ by cyclic coordinate descent (Behdin et al. 2023, QuantEase, sections 3 and 4.1).

GPTQ never looks at a column again once later ones have been rounded. Here each column in turn, all others held, goes to the code
of least tr((W-Q) H (W-Q)ᵀ), H damped as GPTQ damped it: no step makes that larger. Scales stay as they are.

A block of columns is one product and one call of GPTQ's own column loop. With E = W - Q [rows, in] and T the upper
triangle, diagonal included, of the block of H, the columns' optima before the first is rounded are Q + E H T⁻¹ (block
Gauss-Seidel), and a rounding error met on the way goes to later columns by diag(T) T⁻¹, which is unit upper triangular as
GPTQ's feedback is. Rows are worked on in tiles as in `gptq`, with the same promise: split rows give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_spin.numerics.gptq import (
    Factor,
    GPTQOptions,
    QuantizedWeight,
    added_diagonal,
    exact_products,
    solve_block,
)
from dist_spin.numerics.row_tiles import propagate_error, tiled, untiled, whole_batches

PANEL = 2048  # columns of E H made at once: the product is large, and little of it is lost to updates inside the panel


@torch.no_grad()
def coordinate_descent(
    w: Tensor, quantized: QuantizedWeight, hessian: Tensor, factor: Factor, options: GPTQOptions, cd_passes: int
) -> QuantizedWeight:
    """`quantized` of rows w [rows, in] with better codes after `cd_passes` passes over its columns, from left to right.

    hessian: [in, in] in the solution's dtype, and factor: what `prepare` made of it under the same options. A pass
    takes rows · in² multiply-adds, GPTQ's own products half of that. Raises ValueError where the three do not fit together.
    """
    with_experts = QuantizedWeight(*(part[None] for part in quantized))
    refined = refine_all(w[None], with_experts, hessian[None], [factor], options, cd_passes)
    return QuantizedWeight(refined.codes[0], quantized.scale, quantized.zero)


@torch.no_grad()
def refine_all(
    w: Tensor,
    quantized: QuantizedWeight,
    hessians: Tensor,
    factors: Sequence[Factor],
    options: GPTQOptions,
    cd_passes: int,
) -> QuantizedWeight:
    """`coordinate_descent` of weights of one shape, w [experts, rows, in]: its codes, bit for bit on a CPU.

    A GPU rounds the triangular solves of more than eight experts otherwise than those of few.
    quantized: as `gptq.solve_all` returns it; hessians: [experts, in, in]; factors: of each expert.
    """
    rows, columns = w.shape[1:]
    if (
        quantized.codes.shape != w.shape
        or hessians.shape[-1] != columns
        or any(len(factor.dead) != columns for factor in factors)
    ):
        shapes = f"{list(w.shape[1:])}, codes {list(quantized.codes.shape[1:])}, Hessian {list(hessians.shape[1:])}"
        raise ValueError(f"weight, codes and Hessian do not fit: {shapes}")
    dead = torch.stack([factor.dead for factor in factors])[:, None]
    live = whole_batches(torch.where(dead, 0, w.to(hessians.dtype)))
    codes = tiled(whole_batches(quantized.codes.clone()))
    scale, zero = tiled(whole_batches(quantized.scale, 1.0)), tiled(whole_batches(quantized.zero))
    with exact_products():
        refined = _refine_tiles(tiled(live), QuantizedWeight(codes, scale, zero), hessians, factors, options, cd_passes)
    return QuantizedWeight(untiled(refined)[:, :rows], quantized.scale, quantized.zero)


def _refine_tiles(
    w: Tensor,
    quantized: QuantizedWeight,
    hessians: Tensor,
    factors: Sequence[Factor],
    options: GPTQOptions,
    cd_passes: int,
) -> Tensor:
    """Codes [E, T, in, R] better than those of `quantized` [E, T, …, R]; w [E, T, in, R] is overwritten.

    Nothing in here waits for the device: no tensor value decides a branch.
    """
    codes, scale, zero = quantized
    columns = w.shape[2]
    group_of = torch.arange(columns, device=w.device) // (columns // scale.shape[2])
    added = torch.stack(
        [added_diagonal(h, f.dead, f.damping) for h, f in zip(hessians, factors, strict=True)]
    )  # [E, in]

    def values(start: int, stop: int) -> Tensor:
        """Dequantised columns [E, T, B, R]."""
        groups = group_of[start:stop]
        return (codes[:, :, start:stop].to(w.dtype) - zero.index_select(2, groups)) * scale.index_select(2, groups)

    def subtract_products(tiles: Tensor, matrices: Tensor, others: Tensor) -> None:
        """`propagate_error` of each expert: tiles [E, T, n, R], matrices [E, n, B], others [E, T, B, R]."""
        for own_tiles, matrix, own_others in zip(tiles, matrices, others, strict=True):
            propagate_error(own_tiles, matrix, own_others)

    for start in range(0, columns, options.block_size):
        stop = min(start + options.block_size, columns)
        w[:, :, start:stop] -= values(start, stop)
    error = w
    for _ in range(cd_passes):
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            damped = hessians[:, first:last].clone()
            damped[..., first:last].diagonal(dim1=1, dim2=2).add_(added[:, first:last])
            pull = torch.zeros_like(error[:, :, first:last])  # -(E H) of the panel's columns
            subtract_products(pull, damped, error)
            for start in range(first, last, options.block_size):
                stop = min(start + options.block_size, last)
                a, b = start - first, stop - first  # the block within the panel
                triangle = damped[:, a:b, start:stop].triu()
                identity = torch.eye(b - a, dtype=w.dtype, device=w.device)
                inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
                before = values(start, stop)
                optimum = before.clone()
                subtract_products(optimum, inverse.mT, pull[:, :, a:b])
                feedback = triangle.diagonal(dim1=1, dim2=2)[..., None] * inverse
                groups = group_of[start:stop].expand(len(w), -1)
                codes[:, :, start:stop], _ = solve_block(optimum, feedback, scale, zero, groups, options)
                moved = before - values(start, stop)
                error[:, :, start:stop] += moved
                subtract_products(pull[:, :, b:], damped[:, b:, start:stop], moved)
    return codes
