"""Invertible transforms with few parameters: Kronecker pairs of small matrices (Sun et al. 2024, FlatQuant), orthogonal maps.

Row vectors: y = x (A (x) B), so a weight [out, n] that meets y is multiplied by the inverse transpose.
"""

import math

import torch
from torch import Tensor

DENSE_LIMIT = 2048  # up to this width one dense product is faster on a GPU than two with small factors
SQUARINGS, TERMS = 6, 8  # of `orthogonal`: to 1e-9 for skew matrices of norm up to 32


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(a - b, a + b) with the smallest a >= sqrt(n) such that a^2 - n is a square b^2: the factors of n nearest its root.

    Raises ValueError where there are none (n = 2 mod 4, or below 1).
    """
    if n < 1 or n % 4 == 2:
        raise ValueError(f"{n} is no product of two factors of equal parity")
    a = math.isqrt(n - 1) + 1
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    return a - b, a + b


def apply_pair(x: Tensor, left: Tensor, right: Tensor | None = None) -> Tensor:
    """x [..., n] times left (x) right, n = len(left) * len(right); `right` None is the identity. In x's dtype."""
    width = x.shape[-1]
    left = left.to(x.dtype)
    if right is None and x.is_cuda and width <= DENSE_LIMIT:
        right = torch.eye(width // len(left), dtype=x.dtype, device=x.device)
    if right is not None:
        right = right.to(x.dtype)
        if x.is_cuda and width <= DENSE_LIMIT:
            return x @ torch.kron(left, right)
    y = x.unflatten(-1, (len(left), -1))
    if right is not None:
        y = y @ right
    return (left.mT @ y).flatten(-2)


def orthogonal(skew: Tensor) -> Tensor:
    """exp of the skew part [..., n, n] of the upper triangle: an orthogonal matrix, by products alone.

    `torch.linalg.matrix_exp` chooses its degree by looking at values, for which a GPU must wait.
    """
    upper = skew.triu(1)
    a = (upper - upper.mT) / 2**SQUARINGS
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    out = identity + a / TERMS
    for term in range(TERMS - 1, 0, -1):  # Horner's rule
        out = identity + a @ out / term
    for _ in range(SQUARINGS):
        out = out @ out
    return out
