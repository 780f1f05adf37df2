"""The fast Hadamard transform along the last dimension, as products with Kronecker factors or by the CUDA library."""

import importlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from dist_spin.numerics.hadamard import (
    CORE_LIMIT,
    check_order,
    core_matrix,
    hadamard_core,
    hadamard_matrix,
    split_core,
    sylvester,
)

# One dense matrix beats two up to here on an H100 (bfloat16; twice as fast at 1024, slower at 2048). Powers of two only:
# the entries of a single factor have no partner to make up for the rounding of their magnitude (see `_scales`).
_DENSE_LIMIT = 1024
# What the CUDA kernel of fast_hadamard_transform takes.
_LIBRARY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LIBRARY_LIMIT = 2**15


# ---------------------------------------------------------------------------------------------------------------------
# Application
# ---------------------------------------------------------------------------------------------------------------------


def kronecker_factors(
    n: int, block: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Dense factors of the rotation I_{n/block} (x) H_block / sqrt(block), for `kronecker_apply`.

    Args:
        n: width that will be rotated. block: order of the Hadamard matrix, a divisor of n; 0 means n.
        dtype, device: of the factors. Build them in the dtype of the activations.

    Returns:
        (A [a, a], B [b, b]) with A (x) B = H_block / sqrt(block), split so that a + b, the multiplications per element,
        is least; or (H_block / sqrt(block),) if block is a power of two up to 1024 or has nothing to split off. All
        entries of a factor have one magnitude. A is H_K (x) S, B is Sylvester. Where K is a product above 512 of two
        cores, each of them is a factor of its own: (A, B) or (A, B, Sylvester).

    Raises NoHadamard if there is none of order `block`, ValueError if `block` does not divide n.
    """
    block = _check_block(n, block)
    core, power = hadamard_core(block)
    scale = block**-0.5
    if core > CORE_LIMIT and (parts := split_core(core)):
        matrices = [core_matrix(k) for k in parts] + [sylvester(power)] * (power > 1)
        first = 2.0 ** -round(math.log2(parts[0]) / 2)  # a power of two, which every format keeps
        scales = (first, *_scales(scale / first, parts[1])) if power > 1 else _scales(scale, parts[0])
        return tuple(m.to(device, dtype) * s for m, s in zip(matrices, scales, strict=True))
    if power == 1 or (core == 1 and block <= _DENSE_LIMIT):
        return (hadamard_matrix(block).to(device, dtype) * scale,)
    right = min((1 << j for j in range(1, power.bit_length())), key=lambda b: (block // b + b, b))
    left = block // right
    scale_left, scale_right = _scales(scale, left)
    return (
        hadamard_matrix(left).to(device, dtype) * scale_left,
        sylvester(right).to(device, dtype) * scale_right,
    )


def kronecker_apply(x: Tensor, factors: tuple[Tensor, ...], *, inverse: bool = False) -> Tensor:
    """y = x @ (I (x) A (x) B ...), or by the transpose if `inverse`; x and y [..., n], n a multiple of a * b ....

    Computes in x.dtype; differentiable in x; plain torch operations without caches, so it compiles into one graph.
    Raises ValueError if the width does not fit.
    """
    sizes = [factor.shape[0] for factor in factors]  # a list: the compiler takes no generator
    block = math.prod(sizes)
    if x.shape[-1] % block:
        raise ValueError(f"the last dimension of x is {x.shape[-1]}, no multiple of the Hadamard block {block}")
    matrices = [factor.to(x.dtype).mT if inverse else factor.to(x.dtype) for factor in factors]
    y = x.reshape(-1, sizes[-1]) @ matrices[-1]  # the last of the dimensions [tokens * n/block, a, b]
    for i in range(len(sizes) - 2, -1, -1):
        y = matrices[i].mT @ y.reshape(-1, sizes[i], math.prod(sizes[i + 1 :]))
    return y.reshape(x.shape)


def hadamard_transform(x: Tensor, block: int = 0, *, inverse: bool = False) -> Tensor:
    """x @ (I (x) H_block / sqrt(block)), or its transpose if `inverse`; x [..., n], block 0 means n.

    On CUDA orders for which that is faster run in the kernel of the package fast_hadamard_transform where it is installed;
    the numbers are those of `kronecker_apply` to rounding. Raises as `kronecker_factors` does.
    """
    block = _check_block(x.shape[-1], block)
    library = faster_library(block, x.dtype, x.device)
    if library is None:
        return kronecker_apply(x, _cached_factors(block, x.dtype, x.device), inverse=inverse)
    return _library_apply(library, x, block, inverse=inverse)


def library_transform(x: Tensor) -> Tensor:
    """x @ H_n / sqrt(n) by the kernel of fast_hadamard_transform, faster or not; x [..., n], where `library_gap` is ""."""
    library = _library()
    assert library is not None
    return _library_apply(library, x, x.shape[-1], inverse=False)


def faster_library(block: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, float], Tensor] | None:
    """The kernel of fast_hadamard_transform where it beats two dense products, else None.

    It does where nothing is left for a product, so at powers of two. On an H100 with 4096 rows of bfloat16, kernel and core
    against two products: 4096: 39 against 77 us; 14336 = 28 * 512: 257 against 180; 28672 = 28 * 1024: 566 against 342.
    """
    if hadamard_core(block)[0] > 1 or library_gap(block, dtype, device):
        return None
    return _library()


def library_gap(block: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel of fast_hadamard_transform cannot do this order here; "" where it can."""
    if device.type != "cuda":
        return "its kernel is for CUDA"
    if dtype not in _LIBRARY_DTYPES:
        return f"its kernel does not take {dtype}"
    core, power = hadamard_core(block)
    if core > CORE_LIMIT or not 1 < power <= _LIBRARY_LIMIT:
        return f"a dense core of order {core} is left of the order {block}"
    return "" if _library() else "the package fast_hadamard_transform is not installed, or does not load"


def online_transform(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """`kronecker_apply` as the model's sites call it: outside of compiled graphs, by the CUDA kernel where it is faster.

    factors: of `kronecker_factors`; x [..., n]. The kernel has no place in a graph, where two dense products fuse with
    the quantiser behind them.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        block = math.prod([len(factor) for factor in factors])
        if (library := faster_library(block, x.dtype, x.device)) is not None:
            return _library_apply(library, x, block, inverse=False)
    return kronecker_apply(x, factors)


def _library_apply(library: Callable[[Tensor, float], Tensor], x: Tensor, block: int, *, inverse: bool) -> Tensor:
    """`hadamard_transform` with library(x, scale) = scale * x @ S over the last dimension."""
    core, power = hadamard_core(block)
    y = library(x.reshape(-1, power), block**-0.5)
    if core > 1:
        signs = _cached_core(core, x.dtype, x.device)
        y = (signs if inverse else signs.mT) @ y.reshape(-1, core, power)
    return y.reshape(x.shape)


@lru_cache(maxsize=1)
def _library() -> Callable[[Tensor, float], Tensor] | None:
    try:
        module = importlib.import_module("fast_hadamard_transform")
    except ImportError:
        return None
    return cast(Callable[[Tensor, float], Tensor], module.hadamard_transform)


@lru_cache(maxsize=64)
def _cached_factors(block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(mode=False):  # autograd refuses to save tensors made in inference mode, and these stay
        return kronecker_factors(block, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _cached_core(core: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return core_matrix(core).to(device, dtype)


def _check_block(n: int, block: int) -> int:
    """The order of the Hadamard matrix that the caller means by `block`."""
    check_order(n)
    if block < 0 or (block and n % block):
        raise ValueError(f"a Hadamard block of {block} does not divide the width {n}")
    return block or n


def _scales(scale: float, left: int) -> tuple[float, float]:
    """Magnitudes (s, t) of the entries of two factors, s * t = scale; s is near 1 / sqrt(left).

    Rounding 1 / sqrt(left) and 1 / sqrt(right) to bfloat16 could change the norm of a rotated vector by 0.4%, the same
    way for every vector. So s is the number of eight significant bits for which t is nearest to one: then both are
    kept by float16 and bfloat16, whenever the factors are cast, and in float64 the product is still exact.
    """

    def rounding(value: float) -> float:
        mantissa = math.frexp(value)[0] * 256
        return abs(mantissa - round(mantissa)) / mantissa

    exponent = math.frexp(left**-0.5)[1]
    s = min((math.ldexp(m, exponent - 8) for m in range(128, 256)), key=lambda s: rounding(scale / s))
    return s, scale / s
