"""Steps on the orthogonal group by an iterated Cayley transform (Li, Fuxin, Todorovic 2020; used by SpinQuant).

The state is X [..., n, n] with orthonormal rows. Gradients live in the coordinates Omega of X(Omega) = (I + Omega) X: for a
Euclidean gradient G of X that is G X^T, and its skew part A is all that moves X along the manifold. The published step,
    W = skew part of (-G^T X),  alpha = min(lr, 1 / ||W||_1),
    Y_0 = X^T + alpha W X^T,  Y <- X^T + (alpha/2) W (X^T + Y),  X <- Y^T,
becomes in these coordinates (W = X^T A X, Y = X^T Z)
    Z_0 = I + alpha A,  Z <- I + (alpha/2) A (I + Z),  X <- Z^T X,
whose columns of Z, and so rows of the new X, do not interact: each rank can compute its own.

Written in increments, Z = I + S + T_1 + ... with S = alpha A and T_k = (S/2) T_(k-1), only the last product X + (Z - I)^T X
is as large as X. The others are corrections of it, so on a GPU they run in TF32, several times faster: an error of 5e-4 in
T_1 ~ S^2/2 is far below the fp32 rounding of X.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

ITERATIONS = 5  # of the fixed point; the published number
PROBES = 32  # random vectors that matrices are tried with
NEAR, SETTLED, NEAREST_STEPS = (
    0.1,
    1e-8,
    6,
)  # Frobenius norms of X X^T - I: from where, and to where, steps replace an SVD


def tangent(lie_grad: Tensor) -> Tensor:
    """Skew part [..., n, n] of a gradient in the coordinates Omega: the Riemannian gradient, free of normal components."""
    return (lie_grad - lie_grad.mT) / 2


def step_size(x: Tensor, direction: Tensor, lr: float) -> Tensor:
    """alpha = min(lr, 1 / ||X^T A X||_1) for each matrix, ||.||_1 the largest column sum of magnitudes.

    Args:
        x: orthonormal [..., n, n]. direction: skew A [..., n, n]. lr: upper bound.

    Returns:
        alpha [..., 1, 1]; lr where the direction is zero.
    """
    return capped_step(column_sums(x, direction, slice(None)).amax(-1), lr)


def column_sums(x: Tensor, direction: Tensor, columns: slice) -> Tensor:
    """Column sums of magnitudes of X^T A X, for some of its columns: [..., columns]."""
    with _tf32():
        return (x.mT @ (direction @ x[..., columns])).abs().sum(-2)


def capped_step(norm: Tensor, lr: float) -> Tensor:
    """min(lr, 1 / norm) for norms [...], as [..., 1, 1]; lr where the norm is zero."""
    return torch.where(norm > 0, (1 / norm).clamp(max=lr), lr)[..., None, None]


def retract_rows(
    x: Tensor, direction: Tensor, alpha: Tensor | float, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows [start, stop) of X moved against `direction` by the iterated Cayley transform.

    Args:
        x: orthonormal [..., n, n]. direction: skew A [..., n, n], the way in which the loss grows.
        alpha: step length, a number or [..., 1, 1].

    Returns:
        [..., stop - start, n], the rows of Cayley(-alpha A) X; exact up to (alpha ||A|| / 2)^(ITERATIONS + 1).
    """
    scaled = direction * alpha
    moved = correction = scaled[..., start:stop]  # [..., n, c]: Z - I
    with _tf32():
        for _ in range(ITERATIONS):
            correction = 0.5 * (scaled @ correction)
            moved = moved + correction
    return x[..., start:stop, :] + moved.mT @ x


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Let products of fp32 matrices on CUDA round their operands to TF32; other dtypes and devices know no difference."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def orthogonality_error(x: Tensor) -> Tensor:
    """Largest |X X^T - I| entry over all matrices of [..., n, n]; a scalar tensor."""
    return (x @ x.mT - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max()


def is_orthogonal(x: Tensor, within: float) -> bool:
    """Whether every entry of X X^T - I is below `within` in magnitude, for all matrices of [..., n, n].

    Mostly answered without X X^T, which for n = 8192 in fp64 takes a CPU seconds: where (X X^T - I) v is below it for random v
    of signs. For each v an entry that is not hides behind the others of its row with a probability of a half at most.
    """
    n = x.shape[-1]
    signs = torch.randint(2, (n, PROBES), generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    if bool((x @ (x.mT @ signs) - signs).abs().max() < within):
        return True
    return bool(orthogonality_error(x) < within)


def newton_schulz(x: Tensor, iterations: int = 2) -> Tensor:
    """Pull a nearly orthonormal X [..., n, n] back to its nearest orthogonal matrix (Newton-Schulz for the polar factor).

    Converges quadratically: an error of 1e-3 is 1e-6 after one iteration and at rounding after two.
    """
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


def nearest_orthogonal(x: Tensor) -> Tensor:
    """The orthogonal polar factor of X [..., n, n] in fp64: the nearest orthogonal matrix in Frobenius norm.

    Near it by Newton-Schulz steps down to rounding, elsewhere by SVD, which for n = 8192 takes a GPU half a minute.
    """
    x = x.double()
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    near = x
    for _ in range(NEAREST_STEPS):
        gram = near @ near.mT
        off = torch.linalg.matrix_norm(gram - identity).max()
        if not off < NEAR:
            break
        near = 1.5 * near - 0.5 * gram @ near
        if off < SETTLED:  # the step has squared it
            return near
    u, _, v = torch.linalg.svd(x)
    return u @ v


BETAS, EPS = (0.9, 0.95), 1e-12  # of Adam (Kingma and Ba 2015)


def adam_moments(mean: Tensor, square: Tensor, gradient: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Take a gradient into the running moments, in place; their corrected values m and sqrt(v) + EPS, whose ratio is the step.

    Args:
        mean, square: running moments in the gradient's shape, zero before the first step. step: from 1.
    """
    mean.lerp_(gradient, 1 - BETAS[0])
    square.lerp_(gradient.square(), 1 - BETAS[1])
    return mean / (1 - BETAS[0] ** step), (square / (1 - BETAS[1] ** step)).sqrt() + EPS
