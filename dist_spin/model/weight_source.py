"""What every source of weights answers: files of a model, random numbers, or another family read as Llama."""

from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """Read access to a model's parameters under their checkpoint names."""

    def rows(self, name: str, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Rows [start, stop) of parameter `name` in the dtype it is stored in."""

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of this name (biases and q/k norms are optional)."""

    def row_count(self, name: str) -> int:
        """How many rows parameter `name` has."""

    def fingerprint(self) -> str:
        """A hash that changes when the weights do, without reading them all."""
