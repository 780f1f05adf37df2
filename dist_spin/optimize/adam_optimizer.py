"""Adam for scales and clips, replicated: gradients are reduced over ranks, then every rank takes the same step."""

import torch
from torch import Tensor

from dist_spin.model.scales_and_clips import Packed
from dist_spin.numerics.cayley import adam_moments
from dist_spin.runtime.distributed import sum_over_ranks_


class AdamOptimizer:
    """Steps all learned scales and clips at once (Kingma & Ba 2015), each kind with its own learning rate."""

    def __init__(self, transforms: Packed, rates: dict[str, float]) -> None:
        """rates: learning rate of each kind, by name."""
        self.transforms = transforms
        self.step_count = 0
        self._rates = torch.empty_like(transforms.parameters)
        for name, part in transforms.named(self._rates).items():
            part.fill_(rates[name])
        self.moments = {name: torch.zeros_like(transforms.parameters) for name in ("mean", "square")}

    def reduce_gradients(self) -> float:
        """Sum the packed gradients over ranks, in place; returns their norm."""
        return float(sum_over_ranks_(self.transforms.gradient).norm())

    def step(self, factor: float) -> dict[str, float]:
        """Move against the reduced gradient and clear it.

        Args:
            factor: of both learning rates at this step.

        Returns:
            metrics to log: root mean square of each kind's log-scale, mean clip ratio.
        """
        self.step_count += 1
        gradient = self.transforms.gradient
        m, root = adam_moments(self.moments["mean"], self.moments["square"], gradient, self.step_count)
        self.transforms.parameters -= factor * self._rates * m / root
        gradient.zero_()
        named = self.transforms.named(self.transforms.parameters)
        metrics = {name: float(x.square().mean().sqrt()) for name, x in named.items() if name != "clip"}
        return metrics | {name: float(x.sigmoid().mean()) for name, x in named.items() if name == "clip"}

    def reset(self, step_count: int) -> None:
        """Clear gradient and momenta, as after `step_count` steps."""
        self.step_count = step_count
        for tensor in (self.transforms.gradient, *self.moments.values()):
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name, on the transforms' device."""
        moments = {f"{name}_transforms": moment for name, moment in self.moments.items()}
        return {"transforms": self.transforms.parameters, **moments}
