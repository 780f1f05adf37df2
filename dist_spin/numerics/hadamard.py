"""Hadamard matrices of every order that a transformer needs, and their fast application.

One matrix is defined per order and every path here computes that same matrix, because a rotation folded into saved
weights must still be undone by the online transform of a later release:

    H_n = H_K (x) S_{n/K},    S_1 = [1],    S_{2m} = [[1, 1], [1, -1]] (x) S_m   (Sylvester),

with K the smallest order sharing n's odd part for which a core is known here (K = 1 when n is a power of two). A K above
512 gives way to a product of two smaller cores where n has the factors of two for it, because the product is applied as
two small matrices (29568, the width of Qwen2.5-72B: H_44 (x) H_84 (x) S_8 instead of H_924 (x) S_32). A core comes from
the first of these that applies:

1. Paley I, order q + 1, for a prime power q = 3 mod 4 (Paley 1933, J. Math. Phys. 12, lemma 3).
2. Paley II, order 2(q + 1), for a prime power q = 1 mod 4 (same paper, lemma 4).
3. Four circulants in the array of Goethals and Seidel (1967, Canad. J. Math. 19), order 4m, from `_CIRCULANTS`. When
   the four are symmetric these are Williamson's matrices (1944, Duke Math. J. 11).
4. The Kronecker product of two smaller cores.

Order 4m is missing for m = 47, 59, 81, 89, 93, 103, 107 and some above 107; a multiple 2^j of it may exist. Of the model
sizes we know, only 107 * 128 and 107 * 256 (Qwen1.5-14B and -32B) must fall back to `largest_block`.

Rows are vectors: a rotation acts as y = x @ R with R = H / sqrt(n). `kronecker_*` is the path for modules and
compiled code; `hadamard_transform` is a convenience for everything else.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor

# m: (g, four rows). Each row is the first row of an m x m circulant and takes one sign on each orbit of i -> g*i mod m;
# the string lists those signs with the orbits in the order of their least element. Found by matching pairs of power
# spectra: the four must add up to 4m at every frequency, which is what makes H @ H.T = 4m I.
_CIRCULANTS = {
    23: (22, ("+--++-+-+-++", "+--+--+++---", "+++---++--++", "+--+-+-+++++")),
    29: (28, ("++-+++---+--+-+", "++++---+++-+--+", "+-+-++---+--+-+", "+++++++---+-++-")),
    39: (16, ("+++--+++--+----", "+++++++---+----", "+++----+++--+-+", "++------++++---")),
    43: (4, ("+--+++-", "+-+-++-", "++-+-+-", "+-++---")),
    65: (29, ("+-++----+++-++-", "+++-++-+---+---", "+--+++--+++----", "+-++--+--+-----")),
    67: (
        37,
        ("+--++--+-++-++-+++-+---", "+---++-++----++++----+-", "++-++---+----++++-+-+--", "++++-+--+---+++-------+"),
    ),
    73: (2, ("+++++----", "+++--+--+", "+-++---++", "+++-----+")),
    101: (95, ("+++-+--+++--+--+---+-", "+-++++----+++++------", "++-+-+++++-++---+-+--", "+-+++++--+++----++-+-")),
    113: (16, ("+-+-+--+-++++-+--", "+--++++-++----++-", "++++-+-+-+--+--++", "+-+++++--+++---+-")),
    127: (2, ("++-+--+++-+--++-+--", "++++-+--++--+--+---", "+++-+-+--++-++-----", "++-+----+-++++-+---")),
}
_INT8_ONE = torch.ones(1, 1, dtype=torch.int8, device="cpu")
_INT8_TWO = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
# A single core above this is slow to apply; only 924 is met among model sizes.
CORE_LIMIT = 512


class NoHadamard(ValueError):
    """No Hadamard matrix of the order asked for can be built here."""


# ---------------------------------------------------------------------------------------------------------------------
# Which orders exist, and their matrices
# ---------------------------------------------------------------------------------------------------------------------


def hadamard_core(n: int) -> tuple[int, int]:
    """(K, 2^m) with n = K * 2^m, K the order of the core of H_n; K = 1 for a power of two.

    Raises NoHadamard if n is not a positive int or no core is known for it.
    """
    check_order(n)
    core = _core_order(n)
    if core is None:
        raise NoHadamard(f"no Hadamard matrix of order {n} is known here; its largest block is {largest_block(n)}")
    return core, n // core


def hadamard_matrix(n: int) -> Tensor:
    """H_n as int8 [n, n] on the CPU, entries +1 and -1, H_n @ H_n.T = n I. Raises NoHadamard.

    Builds all n^2 entries: for large n apply `kronecker_factors` instead.
    """
    core, power = hadamard_core(n)
    return torch.kron(core_matrix(core), sylvester(power))


def largest_block(n: int) -> int:
    """The largest order dividing n that has a Hadamard matrix here: n itself whenever possible, 1 if n is odd.

    I_{n/b} (x) H_b with b = largest_block(n) is the fall-back for a width without a Hadamard matrix of its own: every
    block is rotated alike and blocks do not mix. Raises NoHadamard if n is not a positive int.
    """
    check_order(n)
    odd = n // _power_of_two_in(n)
    divisors = [d for d in range(1, odd + 1, 2) if odd % d == 0]
    return max(d * (n // odd) for d in divisors if _core_order(d * (n // odd)) is not None)


def check_order(n: int) -> None:
    """Raise NoHadamard unless n is a positive int."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise NoHadamard(f"the order of a Hadamard matrix is a positive integer, not {n!r}")


def _power_of_two_in(n: int) -> int:
    return n & -n


def _core_order(n: int) -> int | None:
    power = _power_of_two_in(n)
    if power == n:
        return 1
    candidates = [n // power << j for j in range(2, power.bit_length())]
    known = next((k for k in candidates if _builder(k) is not None), None)
    if known is not None and known > CORE_LIMIT:
        return next((k for k in candidates if split_core(k)), known)
    return known


@cache
def _builder(k: int) -> Callable[[], Tensor] | None:
    """What builds a core of order k, a multiple of 4 but no power of two; or None. The order of the tries is fixed."""
    if _prime_power(k - 1):
        return partial(_paley_one, k - 1)
    if k % 8 == 4 and _prime_power(k // 2 - 1):
        return partial(_paley_two, k // 2 - 1)
    if k // 4 in _CIRCULANTS:
        return partial(_goethals_seidel, k // 4)
    parts = split_core(k)
    return partial(_product, *parts) if parts else None


@cache
def split_core(k: int) -> tuple[int, int] | None:
    """(a, b) with a b = k, both of them orders of cores, of the least sum; or None."""
    for a in range(math.isqrt(k) // 4 * 4, 8, -4):
        b = k // a
        odd_parts = a * b == k and b % 4 == 0 and _power_of_two_in(a) < a and _power_of_two_in(b) < b
        if odd_parts and _builder(a) and _builder(b):
            return a, b
    return None


@cache
def core_matrix(k: int) -> Tensor:
    """The core of order k, int8 [k, k]; shared, so never to be written to."""
    build = _builder(k) if k > 1 else partial(sylvester, 1)
    assert build is not None  # k came from _core_order
    # Built on request anywhere in a program, kept for good: not as a tensor that autograd would refuse later.
    with torch.inference_mode(mode=False):
        return build()


def sylvester(power: int) -> Tensor:
    """Sylvester's Hadamard matrix, int8 [power, power] for a power of two."""
    matrix = _INT8_ONE
    while len(matrix) < power:
        matrix = torch.kron(_INT8_TWO, matrix)
    return matrix


def _product(a: int, b: int) -> Tensor:
    return torch.kron(core_matrix(a), core_matrix(b))


def _paley_one(q: int) -> Tensor:
    """I + [[0, 1], [-1, Q]]: Q is skew for q = 3 mod 4, and the bordered Q squares to -q I."""
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    bordered[1:, 0] = -1
    bordered[1:, 1:] = _jacobsthal(q)
    return bordered.fill_diagonal_(1)


def _paley_two(q: int) -> Tensor:
    """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with C = [[0, 1], [1, Q]], symmetric for q = 1 mod 4."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    conference[1:, 1:] = _jacobsthal(q)
    conference[0, 0] = 0
    identity = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    corner = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(conference, _INT8_TWO) + torch.kron(identity, corner)


def _jacobsthal(q: int) -> Tensor:
    """Q [q, q] int8: +1 where the difference of two elements of GF(q) is a nonzero square, -1 where none, 0 if zero.

    The element of number i has the base-p digits of i as its coefficients.
    """
    p, k = cast(tuple[int, int], _prime_power(q))
    weights = torch.tensor([p**t for t in range(k)], device="cpu")
    elements = torch.arange(q, device="cpu")[:, None] // weights % p  # [q, k]
    character = torch.full((q,), -1, dtype=torch.int8, device="cpu")
    character[_nonzero_squares(elements, weights, p)] = 1
    character[0] = 0
    difference = torch.zeros(q, q, dtype=torch.int64, device="cpu")
    for digit, weight in zip(elements.T, weights, strict=True):
        difference += (digit - digit[:, None]) % p * weight
    return character[difference]


def _nonzero_squares(elements: Tensor, weights: Tensor, p: int) -> Tensor:
    """Numbers of the nonzero squares of GF(p^k), modulo the first polynomial of degree k that gives a field.

    GF(p)[x] / f is a field exactly if the squares of its nonzero elements are nonzero and each is met just twice: a
    repeated factor of f gives an element that squares to zero, two coprime factors give four roots of 1.
    """
    q, k = elements.shape
    squares = torch.zeros(q, 2 * k - 1, dtype=torch.int64, device="cpu")
    for t in range(k):
        squares[:, t : t + k] += elements[:, t, None] * elements
    for low in elements:  # f = x^k + the polynomial `low`
        reduced = squares.clone()
        for t in range(2 * k - 2, k - 1, -1):
            reduced[:, t - k : t] -= reduced[:, t, None] % p * low
        numbers = (reduced[1:, :k] % p * weights).sum(1).unique()
        if len(numbers) == (q - 1) // 2 and numbers[0] > 0:
            return numbers
    raise AssertionError(f"there is a field of order {q}")


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime; None if there is none."""
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if q % 2 and p**k == q else None


def _goethals_seidel(m: int) -> Tensor:
    """Order 4m from the circulants A, B, C, D of `_CIRCULANTS[m]`; flip(1) is the product with the back-identity."""
    g, rows = _CIRCULANTS[m]
    orbit = [-1] * m  # orbit[i]: which orbit i lies in
    for i in range(m):
        if orbit[i] < 0:
            number, j = max(orbit) + 1, i
            while orbit[j] < 0:
                orbit[j], j = number, j * g % m
    index = torch.arange(m, device="cpu")
    shift = (index - index[:, None]) % m
    circulants = []
    for row in rows:
        first = torch.tensor([1 if row[o] == "+" else -1 for o in orbit], dtype=torch.int8, device="cpu")
        circulants.append(first[shift])
    a = circulants[0]
    b, c, d = (x.flip(1) for x in circulants[1:])  # BR, CR, DR
    bt, ct, dt = (x.T.flip(1) for x in circulants[1:])  # B^T R, C^T R, D^T R
    blocks = [[a, b, c, d], [-b, a, dt, -ct], [-c, -dt, a, bt], [-d, ct, -bt, a]]
    return torch.cat([torch.cat(line, 1) for line in blocks])
