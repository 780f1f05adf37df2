"""Tune layers as they are rounded, beside the full-precision network that shows what each of them should give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_spin.distributed import World, any_rank, sum_over_ranks_
from dist_spin.errors import UserError
from dist_spin.layer_files import QuantizedLayer
from dist_spin.methods.tuning import RoundedWeights, Tuning, tune
from dist_spin.model.layers import LayerRunner, RotatedWeights
from dist_spin.settings import QuantizeConfig


class Tuner:
    """Tunes one layer after another of a job. Every method is called by all ranks together."""

    def __init__(
        self,
        runner: LayerRunner,
        unquantized: LayerRunner,
        weights: RotatedWeights,
        world: World,
        settings: QuantizeConfig,
        hidden: list[Tensor],
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        """runner, unquantized: of layers with their sites on and off. hidden: this rank's sequences, each [1, T, h], as they
        enter the first layer of the job. note: told of every layer's figures by rank 0.

        Raises:
            UserError: a rank has no sequence.
        """
        if any_rank(not hidden):
            raise UserError(
                f"{settings.n_sequences} calibration sequences leave one of {world.size} ranks without any to tune on",
                "raise quantize.n_sequences or start fewer ranks",
            )
        self.runner, self.unquantized, self.weights, self.world, self.note = runner, unquantized, weights, world, note
        self.exact = list(hidden)
        most = -(-settings.n_sequences // world.size)
        self.tuning = Tuning(settings.tune_epochs, settings.tune_lr, settings.seed, most)

    def follow(self, index: int) -> None:
        """Move the full-precision states through layer `index`."""
        module = self.unquantized.build(index, self.weights.layer(index))
        for i, h in enumerate(self.exact):
            self.exact[i] = self.unquantized.run(module, index, h)

    def tune(self, index: int, layer: QuantizedLayer, entered: list[Tensor]) -> list[Tensor]:
        """Tune `layer` in place; returns the states that leave it in the quantised network. entered: those that enter it."""
        self.follow(index)
        rounded = RoundedWeights(layer.solutions, layer.bits, layer.symmetric)
        mean = None if self.world.size == 1 else self._mean
        figures = tune(self.runner, index, layer.others, rounded, entered, self.exact, self.tuning, mean)
        layer.solutions = {role: rounded.solution(role) for role in layer.solutions}
        if self.world.leads:
            self.note({"layer": index, **figures})
        module = self.runner.build(index, layer.weights(self.runner.dtype, self.runner.device))
        return [self.runner.run(module, index, h) for h in entered]

    def _mean(self, tensors: list[Tensor]) -> None:
        """Over ranks, in place."""
        packed = torch.cat([tensor.flatten() for tensor in tensors])
        sum_over_ranks_(packed).div_(self.world.size)
        for tensor, mean in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))
