"""Factors of several Hessians of one shape at once, for the experts of a layer: each alone is too small to keep a GPU busy."""

import torch
from torch import Tensor

from dist_spin.numerics.gptq import Factor, GPTQOptions, added_diagonal, exact_products, prepare

FACTORED_AT_ONCE = 256  # columns that are left to the batched routines of the library; larger matrices go by halves


@torch.no_grad()
def prepare_all(hessians: Tensor, options: GPTQOptions) -> list[Factor]:
    """`prepare` of Hessians [experts, in, in], fp32 or fp64.

    On a CPU one after another, bit for bit. On a GPU together, equal up to rounding; one that is not positive definite with
    `percdamp` is left to `prepare`, which adds more or refuses it. Raises ValueError as that does.
    """
    if not hessians.is_cuda or len(hessians) == 1:
        return [prepare(hessian, options) for hessian in hessians]
    return factor_together(hessians, options)


def factor_together(hessians: Tensor, options: GPTQOptions) -> list[Factor]:
    """`prepare_all` by batched products, on any device; waits for it once. Holds three matrices for each Hessian."""
    diagonals = hessians.diagonal(dim1=1, dim2=2)
    dead = diagonals == 0
    orders = torch.argsort(diagonals, dim=1, descending=True, stable=True) if options.act_order else None
    damped = torch.empty_like(hessians)
    for i, hessian in enumerate(hessians):
        added = added_diagonal(hessian, dead[i], options.percdamp)
        if orders is None:
            damped[i], added = hessian.flip(0, 1), added.flip(0)
        else:
            backwards = orders[i].flip(0)
            damped[i], added = hessian[backwards][:, backwards], added[backwards]
        damped[i].diagonal().add_(added)
    with exact_products():
        invert_cholesky_(damped)
    feedback = damped.flip(1, 2)  # backwards again, the inverse is U of `Factor`, but for the division of its rows
    del damped
    feedback /= feedback.diagonal(dim1=1, dim2=2).clone()[..., None]
    works = torch.isfinite(feedback).all(2).all(1).tolist()
    return [
        Factor(matrix, None if orders is None else orders[i], dead[i], options.percdamp)
        if works[i]
        else prepare(hessians[i], options)
        for i, matrix in enumerate(feedback)
    ]


def invert_cholesky_(a: Tensor) -> None:
    """Replace symmetric matrices [experts, n, n] by the inverses of their lower Cholesky factors, zero above the diagonal.

    By halves: with [[A, B'], [B, C]], M A M' = 1 and L = B M', the Schur complement C - L L' has the inverse factor N, and the
    whole has [[M, 0], [-N L M, N]]; nearly all of it are products. Where a matrix is not positive definite, its result has NaN.
    """
    n = a.shape[-1]
    if n <= FACTORED_AT_ONCE:
        lower, info = torch.linalg.cholesky_ex(a)
        identity = torch.eye(n, dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        a.copy_(torch.where(info[:, None, None] == 0, inverse, torch.nan))
        return
    half = n // 2
    first, corner, last = a[:, :half, :half], a[:, half:, :half], a[:, half:, half:]
    a[:, :half, half:] = 0
    invert_cholesky_(first)
    below = corner @ first.mT  # L
    last.baddbmm_(below, below.mT, alpha=-1)
    invert_cholesky_(last)
    corner.copy_(last @ (below @ first)).neg_()
