"""Random rotations: Hadamard with random signs, and Haar-distributed orthogonal matrices."""

import torch
from torch import Tensor

from dist_spin.numerics.hadamard import check_order, hadamard_matrix, largest_block


def random_hadamard(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """diag(signs) @ (I (x) H_b / sqrt(b)) [n, n] on the CPU, b = largest_block(n), signs +1 or -1 drawn at random.

    The randomised Hadamard rotation of QuaRot and SpinQuant. Computed in float64, then cast; `generator` is a CPU one.
    """
    block = largest_block(n)
    signs = torch.randint(0, 2, (n, 1), generator=generator, device="cpu") * 2 - 1
    copies = torch.eye(n // block, dtype=torch.int8, device="cpu")
    rotation = torch.kron(copies, hadamard_matrix(block)).to(torch.float64)
    rotation *= signs.to(torch.float64) * block**-0.5  # an integer tensor times a float would be float32
    return rotation.to(dtype)


def random_orthogonal(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthogonal [n, n] on the CPU from the Haar measure: Q of a Gaussian matrix, with the diagonal of R positive.

    Without that sign fix Q depends on the QR routine (Mezzadri 2007, Notices of the AMS 54, section 5). Computed in
    float64, then cast; `generator` is a CPU one.
    """
    check_order(n)
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).to(dtype)
