"""The rotations of a model: made, attached to its sites for learning, and merged into its weights.

Row-vector convention, weights [out, in], d = head size, h = hidden size (Liu et al. 2024, SpinQuant):
R1 [h, h] turns the residual stream, R2 [d, d] of each layer its values, R3 and R4 are fixed Hadamards on q, k and on the
input of down_proj; QuaRot (Ashkboos et al. 2024) adds one across the heads that o_proj reads. All weight arithmetic here
is fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_spin.model.architecture import Shape
from dist_spin.model.rotate_quantize import RotationParam
from dist_spin.numerics.block_rotation import all_blocks, left_out
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.hadamard import largest_block
from dist_spin.numerics.hadamard_transform import hadamard_transform
from dist_spin.numerics.random_rotations import random_hadamard, random_orthogonal


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of R1 and R2, 0 for whole matrices; shared: one block stands in every place.

    An r1 of 1 leaves R1 out: its blocks are ones.
    """

    r1: int = 0
    r2: int = 0
    shared: bool = False

    @property
    def label(self) -> str:
        """What tables add to the name of a rotation: "", ", in R2 alone", ", in blocks of 32" or ", in one block of 32"."""
        if self.r1 == 1:
            return ", in R2 alone"
        return f", in {'one block' if self.shared else 'blocks'} of {self.r1}" if self.r1 else ""


WHOLE = Blocks()


def initial(kind: str, shape: Shape, seed: int, blocks: Blocks = WHOLE) -> tuple[Tensor, Tensor]:
    """Seeded starting rotations R1 [h, h] and R2 [layers, d, d], fp64 on the CPU, drawn R1 first, then layer by layer.

    In blocks they are [h / b, b, b] and [layers, d / b, b, b], each block drawn by itself; shared ones [b, b] and [layers, b, b].

    Args:
        kind: "hadamard" (random signs times a Hadamard), "orthogonal" (Haar), "identity", or "quarot": R1 as "hadamard"
            has it and R2 the Hadamard itself, the same in every layer (Ashkboos et al. 2024).
    """
    generator = torch.Generator().manual_seed(seed)
    no_r1 = torch.ones(shape.hidden, 1, 1, dtype=torch.float64)
    if kind == "quarot":
        r1, d = no_r1 if blocks.r1 == 1 else random_hadamard(shape.hidden, generator), shape.head_dim
        r2 = hadamard_transform(torch.eye(d, dtype=torch.float64), largest_block(d))
        return r1, r2.expand(shape.layers, d, d).clone()
    make: dict[str, Callable[[int], Tensor]] = {
        "hadamard": lambda n: random_hadamard(n, generator),
        "orthogonal": lambda n: random_orthogonal(n, generator),
        "identity": lambda n: torch.eye(n, dtype=torch.float64),
    }

    def draw(size: int, block: int) -> Tensor:
        if not block or blocks.shared:
            return make[kind](block or size)
        return torch.stack([make[kind](block) for _ in range(size // block)])

    r1 = no_r1 if blocks.r1 == 1 else draw(shape.hidden, blocks.r1)
    return r1, torch.stack([draw(shape.head_dim, blocks.r2) for _ in range(shape.layers)])


def stored_rotations(r1: Tensor, r2: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """R1 and R2 as files have them: whole, or every block in its place, [h / b, b, b] and [layers, d / b, b, b]."""
    if r1.shape[-1] < shape.hidden:
        r1 = all_blocks(r1, shape.hidden)
    if r2.shape[-1] < shape.head_dim:
        r2 = torch.stack([all_blocks(r, shape.head_dim) for r in r2])
    return r1, r2


class Rotations:
    """The master copies of R1 and R2 on one device, what the sites see of them, and one packed gradient buffer.

    r1 [h, h], r2 [layers, d, d]: fp32 masters (fp64 when compute is fp64), or their blocks (`initial`). r1_param, r2_params:
        what the sites hold. turns_r1: whether R1 is not left out.
    gradient: packed, [h*h + layers*d*d] of whole ones, in the masters' dtype; backward accumulates straight into it: the
        gradients of the lie_grads (see `RotationParam`), or with `euclidean` those of R1 and R2 as plain matrices until
        `to_lie_grad` is called.
    """

    def __init__(
        self,
        r1: Tensor,
        r2: Tensor,
        device: torch.device,
        compute: torch.dtype,
        *,
        learn: bool = False,
        euclidean: bool = False,
    ) -> None:
        self.euclidean = euclidean
        master = accumulation_dtype(compute)
        self.r1, self.r2 = (r.to(device, master, copy=True) for r in (r1, r2))
        self._compute_r1, self._compute_r2 = (r.to(compute, copy=True) for r in (self.r1, self.r2))
        lie_grads: list[Tensor | None] = [None] * (1 + len(r2))
        self.gradient = torch.zeros(0, dtype=master, device=device)
        if learn:
            self.gradient = torch.zeros(self.r1.numel() + self.r2.numel(), dtype=master, device=device)
            grads = [self.lie_grad1, *self.lie_grad2]
            for i, grad in enumerate(grads):
                leaf = torch.zeros_like(grad).requires_grad_()
                leaf.grad = grad  # a view: packed as it accumulates
                lie_grads[i] = leaf
        self.turns_r1 = not left_out(r1)
        self.r1_param = RotationParam(self._compute_r1, lie_grads[0])
        self.r2_params = [
            RotationParam(r2, lie_grad) for r2, lie_grad in zip(self._compute_r2, lie_grads[1:], strict=True)
        ]

    @property
    def lie_grad1(self) -> Tensor:
        """R1's part of the gradient buffer, in its shape."""
        return self.gradient[: self.r1.numel()].view_as(self.r1)

    @property
    def lie_grad2(self) -> Tensor:
        """R2's part of the gradient buffer, in its shape."""
        return self.gradient[self.r1.numel() :].view_as(self.r2)

    def to_lie_grad(self) -> None:
        """Turn gradients of R into those of the lie_grad, in place: R(Omega) = (I + Omega) R, so dOmega = dR R^T."""
        if self.euclidean:
            self.lie_grad1.copy_(self.lie_grad1 @ self.r1.mT)
            self.lie_grad2.copy_(self.lie_grad2 @ self.r2.mT)

    def refresh(self) -> None:
        """Copy the masters, as they are now, into what the sites hold."""
        self._compute_r1.copy_(self.r1)
        self._compute_r2.copy_(self.r2)
