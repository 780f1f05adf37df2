"""Learning never ends worse than it started: the best state on held-out text is kept, and returned to after a loss spike."""

import math

import torch
from torch import Tensor

SPIKE_RATIO = 1.05  # held-out loss, as a multiple of the best one, that counts as a loss spike
LR_DECAY_AFTER_SPIKE = 0.5  # of the learning rates, after each spike


class BestState:
    """Keeps the best masters by held-out loss. Equal on all ranks, because the losses that it is told are.

    masters: what is learned, by name; overwritten by a return to the best state.
    """

    def __init__(self, masters: dict[str, Tensor]) -> None:
        self._masters = masters
        self._best = {name: tensor.clone() for name, tensor in masters.items()}
        # Best loss, factor of the learning rates, and whether a step was taken since the masters were the best ones.
        self._figures = torch.tensor([math.inf, 1.0, 0.0], dtype=torch.float64)

    @property
    def best_loss(self) -> float:
        """The smallest held-out loss so far; inf before the first."""
        return float(self._figures[0])

    @property
    def factor(self) -> float:
        """What learning rates are multiplied by: halved after each loss spike."""
        return float(self._figures[1])

    @property
    def at_best(self) -> bool:
        """Whether the masters are the best ones."""
        return not self._figures[2]

    def moved(self) -> None:
        """Note that a step was taken; to be called after every step."""
        self._figures[2] = 1.0

    def update(self, loss: float) -> bool:
        """Take in a held-out loss; True after a loss spike, when the masters are the best ones again."""
        if loss < self.best_loss:
            for name, tensor in self._masters.items():
                self._best[name].copy_(tensor)
            self._figures[0], self._figures[2] = loss, 0.0
        elif not loss <= self.best_loss + (SPIKE_RATIO - 1) * abs(self.best_loss):  # NaN is a spike
            self.rollback()
            return True
        return False

    def rollback(self) -> None:
        """Return to the best state at a lower learning rate."""
        self.restore()
        self._figures[1] *= LR_DECAY_AFTER_SPIKE

    def restore(self) -> None:
        """Return to the best state."""
        for name, tensor in self._masters.items():
            tensor.copy_(self._best[name])
        self._figures[2] = 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        return {"guard": self._figures, **{f"best.{name}": tensor for name, tensor in self._best.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state.

        Raises:
            KeyError: it is of a run that measured no held-out loss.
        """
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
