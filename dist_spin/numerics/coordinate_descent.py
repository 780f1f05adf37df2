"""Codes made better after GPTQ by cyclic coordinate descent (Behdin et al. 2023, QuantEase, sections 3 and 4.1).

GPTQ never looks at a column again once later ones have been rounded. Here each column in turn, all others held, goes to the code
of least tr((W-Q) H (W-Q)ᵀ), H damped as GPTQ damped it: no step makes that larger. Scales stay as they are.

A block of columns is one product and one call of GPTQ's own column loop. With E = W - Q [rows, in] and T the upper
triangle, diagonal included, of the block of H, the columns' optima before the first is rounded are Q + E H T⁻¹ (block
Gauss-Seidel), and a rounding error met on the way goes to later columns by diag(T) T⁻¹, which is unit upper triangular as
GPTQ's feedback is. Rows are worked on in tiles as in `gptq`, with the same promise: split rows give the same bits.
"""

import torch
from torch import Tensor

from dist_spin.numerics.gptq import (
    Factor,
    GPTQOptions,
    QuantizedWeight,
    added_diagonal,
    exact_products,
    propagate_error,
    solve_block,
    tiled,
    untiled,
    whole_batches,
)

PANEL = 2048  # columns of E H made at once: the product is large, and little of it is lost to updates inside the panel


@torch.no_grad()
def coordinate_descent(
    w: Tensor, quantized: QuantizedWeight, hessian: Tensor, factor: Factor, options: GPTQOptions, cd_passes: int
) -> QuantizedWeight:
    """`quantized` of rows w [rows, in] with better codes after `cd_passes` passes over its columns, from left to right.

    hessian: [in, in] in the solution's dtype, and factor: what `prepare` made of it under the same options. A pass
    takes rows · in² multiply-adds, GPTQ's own products half of that. Raises ValueError where the three do not fit together.
    """
    rows, columns = w.shape
    if quantized.codes.shape != w.shape or len(hessian) != columns or len(factor.dead) != columns:
        shapes = f"{list(w.shape)}, codes {list(quantized.codes.shape)}, Hessian {list(hessian.shape)}"
        raise ValueError(f"weight, codes and Hessian do not fit: {shapes}")
    codes, scale, zero = quantized
    live = whole_batches(torch.where(factor.dead, 0, w.to(hessian.dtype)))
    codes = tiled(whole_batches(codes.clone()))
    scale, zero = tiled(whole_batches(scale, 1.0)), tiled(whole_batches(zero))
    with exact_products():
        refined = _refine_tiles(tiled(live), QuantizedWeight(codes, scale, zero), hessian, factor, options, cd_passes)
    return QuantizedWeight(untiled(refined)[:rows], quantized.scale, quantized.zero)


def _refine_tiles(
    w: Tensor, quantized: QuantizedWeight, hessian: Tensor, factor: Factor, options: GPTQOptions, cd_passes: int
) -> Tensor:
    """Codes [T, in, R] better than those of `quantized` [T, …, R]; w [T, in, R] is overwritten.

    Nothing in here waits for the device: no tensor value decides a branch.
    """
    codes, scale, zero = quantized
    columns = w.shape[1]
    group_of = torch.arange(columns, device=w.device) // (columns // scale.shape[1])
    added = added_diagonal(hessian, factor.dead, factor.damping)

    def values(start: int, stop: int) -> Tensor:
        """Dequantised columns [T, B, R]."""
        groups = group_of[start:stop]
        return (codes[:, start:stop].to(w.dtype) - zero.index_select(1, groups)) * scale.index_select(1, groups)

    for start in range(0, columns, options.block_size):
        stop = min(start + options.block_size, columns)
        w[:, start:stop] -= values(start, stop)
    error = w
    for _ in range(cd_passes):
        for first in range(0, columns, PANEL):
            last = min(first + PANEL, columns)
            damped = hessian[first:last].clone()
            damped[:, first:last].diagonal().add_(added[first:last])
            pull = torch.zeros_like(error[:, first:last])  # -(E H) of the panel's columns
            propagate_error(pull, damped, error)
            for start in range(first, last, options.block_size):
                stop = min(start + options.block_size, last)
                a, b = start - first, stop - first  # the block within the panel
                triangle = damped[a:b, start:stop].triu()
                inverse = torch.linalg.solve_triangular(
                    triangle, torch.eye(b - a, dtype=w.dtype, device=w.device), upper=True
                )
                before = values(start, stop)
                optimum = before.clone()
                propagate_error(optimum, inverse.T, pull[:, a:b])
                feedback = triangle.diagonal()[:, None] * inverse
                codes[:, start:stop], _ = solve_block(optimum, feedback, scale, zero, group_of[start:stop], options)
                moved = before - values(start, stop)
                error[:, start:stop] += moved
                propagate_error(pull[:, b:], damped[b:, start:stop], moved)
    return codes
