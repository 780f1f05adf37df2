"""One online Hadamard on the ways there are to compute it, side by side: R3 (head size) and R4 (intermediate size).

copy                    x read and written once: no transform can be faster
kronecker               two dense products, `numerics.hadamard_transform.kronecker_apply`, what the product's sites use
compiled kronecker      the same behind torch.compile
compiled butterfly      log2 stages of sums and differences, a compiled kernel each (as one, they take minutes to compile),
                        and the core as a dense product
fast-hadamard-transform the CUDA kernel of that package, and the core as a dense product
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_spin.numerics.hadamard import hadamard_core, hadamard_matrix
from dist_spin.numerics.hadamard_transform import kronecker_apply, kronecker_factors, library_gap, library_transform

Transform = Callable[[Tensor], Tensor]
LIBRARY = "fast-hadamard-transform"


def halves(y: Tensor) -> Tensor:
    """One stage: y [..., 2, stride] to its sums and differences."""
    left, right = y.unbind(-2)
    return torch.stack((left + right, left - right), -2)


def butterfly(x: Tensor, core: Tensor, power: int, scale: float, stage: Transform = halves) -> Tensor:
    """scale * x @ (H_K (x) S_power) for x [..., K * power], core H_K [K, K] in x's dtype: the fast transform in plain torch.

    stage: `halves`, or the same compiled.
    """
    K = len(core)
    y = x.reshape(-1, K, power)
    stride = 1
    while stride < power:
        y = stage(y.view(-1, power // (2 * stride) * K, 2, stride)).view(-1, K, power)
        stride *= 2
    y = y * scale
    return (y if K == 1 else core.T @ y).reshape(x.shape)


def routes(
    width: int, dtype: torch.dtype, device: torch.device, fuse: Callable[[Any], Any] | None
) -> tuple[dict[str, Transform], dict[str, str]]:
    """The ways to apply H_width / sqrt(width) to [..., width], and why the others are missing here.

    fuse: torch.compile, or None to leave the compiled routes out.
    """
    factors = kronecker_factors(width, dtype=dtype, device=device)
    core, power = hadamard_core(width)
    signs = hadamard_matrix(core).to(device, dtype) if core > 1 else torch.ones(1, 1, dtype=dtype, device=device)

    def kronecker(x: Tensor) -> Tensor:
        return kronecker_apply(x, factors)

    transforms: dict[str, Transform] = {"copy": torch.clone, "kronecker": kronecker}
    missing = {}
    if fuse is not None:
        stage = fuse(halves)
        transforms["compiled kronecker"] = fuse(kronecker)
        transforms["compiled butterfly"] = lambda x: butterfly(x, signs, power, width**-0.5, stage)
    else:
        missing["compiled"] = "torch.compile is off"
    if gap := library_gap(width, dtype, device):
        missing[LIBRARY] = gap
    else:
        transforms[LIBRARY] = library_transform
    return transforms, missing
