"""The optimiser of the rotations: gradients reduced over ranks, then one step on the orthogonal group, split over ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from dist_spin.model.rotation import Rotations
from dist_spin.numerics.cayley import (
    adam_moments,
    capped_step,
    column_sums,
    newton_schulz,
    orthogonality_error,
    retract_rows,
    step_size,
    tangent,
)
from dist_spin.optimize.adam_optimizer import AdamOptimizer
from dist_spin.runtime.distributed import World, gather_parts, sum_over_ranks_


class CayleyOptimizer:
    """Steps R1 and all R2 from the packed gradient.

    kind "cayley_sgd": the published step, length min(lr, 1/||W||_1), momentum on the Riemannian gradient.
    kind "cayley_adam": Adam in the Lie algebra; lr is the angle, in radians, that one step turns a row (root mean square),
        so that it means the same at every size.
    adam: steps the scales and clips that are learned together with the rotations.
    """

    def __init__(
        self,
        rotations: Rotations,
        world: World,
        *,
        kind: str,
        momentum: float,
        max_grad_norm: float,
        reproject_every: int,
        adam: AdamOptimizer | None = None,
    ) -> None:
        self.adam = adam
        self.rotations, self.world, self.kind = rotations, world, kind
        self.momentum, self.max_grad_norm, self.reproject_every = momentum, max_grad_norm, reproject_every
        self.step_count = 0
        moments = {"cayley_sgd": ("momentum",) if momentum else (), "cayley_adam": ("mean", "square")}[kind]
        masters = {"1": rotations.r1, "2": rotations.r2}
        self.moments = {f"{m}{r}": torch.zeros_like(x) for m in moments for r, x in masters.items()}

    def reduce_gradients(self) -> float:
        """Sum the packed gradients over ranks and keep their tangent part, in place; returns its joint norm before clipping.

        This is the one place where rotation gradients meet: no engine reduces them, since no engine owns the rotations.
        The norm is of the rotations alone, but NaN where the gradient of scales or clips is not finite.
        """
        sum_over_ranks_(self.rotations.gradient)
        self.rotations.to_lie_grad()
        for part in (self.rotations.lie_grad1, self.rotations.lie_grad2):
            part.copy_(tangent(part))
        other = 0.0 if self.adam is None else self.adam.reduce_gradients()
        return float(self.rotations.gradient.norm()) if math.isfinite(other) else math.nan

    def step(self, lr: float, norm: float, factor: float = 1.0) -> dict[str, float]:
        """Move against the reduced gradient and clear it.

        Args:
            lr: this step's learning rate (see the class). norm: joint gradient norm, as `reduce_gradients` returned it.
            factor: of the learning rates of scales and clips at this step.

        Returns:
            metrics to log: step lengths, angle by which a row turned (root mean square, radians), orthogonality error.
        """
        self.step_count += 1
        clip = min(1.0, self.max_grad_norm / norm) if self.max_grad_norm and norm > 0 else 1.0
        metrics: dict[str, float] = {}
        for name, x, gradient in (
            ("1", self.rotations.r1, self.rotations.lie_grad1),
            ("2", self.rotations.r2, self.rotations.lie_grad2),
        ):
            direction = self._direction(name, gradient * clip)
            if self.kind == "cayley_adam":
                alpha: Tensor | float = lr / math.sqrt(x.shape[-1])
            else:
                alpha = shared_step_size(x, direction, lr, self.world)
                metrics[f"alpha_r{name}"] = float(alpha.mean())
            metrics[f"angle_r{name}"] = float((direction * alpha).norm()) / math.sqrt(x.numel() / x.shape[-1])
            updated = gather_rows(x, direction, alpha, self.world)
            if self.step_count % self.reproject_every == 0:  # measured where it is about to be removed: at its largest
                metrics[f"orthogonality_r{name}"] = float(orthogonality_error(updated))
                updated = newton_schulz(updated)
            x.copy_(updated)
        self.rotations.gradient.zero_()
        self.rotations.refresh()
        return metrics if self.adam is None else metrics | self.adam.step(factor)

    def reset(self, step_count: int) -> None:
        """Clear gradients and momenta and take up masters that were changed from outside, as after `step_count` steps."""
        self.step_count = step_count
        self.rotations.gradient.zero_()
        self.rotations.refresh()
        for moment in self.moments.values():
            moment.zero_()
        if self.adam is not None:
            self.adam.reset(step_count)

    def masters(self) -> dict[str, Tensor]:
        """What is learned, by name."""
        learned = {"R1": self.rotations.r1, "R2": self.rotations.r2}
        return learned if self.adam is None else {**learned, "transforms": self.adam.transforms.parameters}

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        if self.kind == "cayley_adam":
            mean, square = self.moments[f"mean{name}"], self.moments[f"square{name}"]
            m, root = adam_moments(mean, square, gradient, self.step_count)
            return m / root  # elementwise, so still skew
        if self.momentum:
            return self.moments[f"momentum{name}"].mul_(self.momentum).add_(gradient)
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name, on the rotations' device."""
        adam = {} if self.adam is None else self.adam.state()
        return {"R1": self.rotations.r1, "R2": self.rotations.r2, **self.moments, **adam}

    def load(self, state: dict[str, Tensor], step_count: int) -> None:
        """Take up a saved state.

        Raises:
            KeyError: a tensor is missing, so the state is of another optimiser.
        """
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.step_count = step_count
        if self.adam is not None:
            self.adam.step_count = step_count
        self.rotations.refresh()


def shared_step_size(x: Tensor, direction: Tensor, lr: float, world: World) -> Tensor:
    """`step_size`, the columns of a single matrix shared out over ranks; a stack of small ones is computed everywhere."""
    if x.dim() > 2 or world.size == 1:
        return step_size(x, direction, lr)
    sums = column_sums(x, direction, slice(*world.own_range(len(x))))
    largest = torch.zeros(1, dtype=x.dtype, device=x.device) if not sums.numel() else sums.amax(-1)[None]
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return capped_step(largest[0], lr)


def gather_rows(x: Tensor, direction: Tensor, alpha: Tensor | float, world: World) -> Tensor:
    """The next rotation: each rank retracts its own share and all shares are gathered, so every rank holds the same bits.

    A single matrix [n, n] is split by rows, a stack [layers, d, d] by layers, R1 in blocks [k, b, b] by blocks.
    """
    count = len(x)
    start, stop = world.own_range(count)
    if x.dim() == 2:
        own_rows = retract_rows(x, direction, alpha, start, stop)
    else:
        length = alpha[start:stop] if isinstance(alpha, Tensor) else alpha
        own_rows = retract_rows(x[start:stop], direction[start:stop], length)
    if world.size == 1:
        return own_rows
    padded = x.new_zeros(-(-count // world.size), *x.shape[1:])
    padded[: len(own_rows)] = own_rows
    return torch.cat(gather_parts(padded))[:count]
