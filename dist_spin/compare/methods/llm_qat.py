"""LLM-QAT (Liu et al. 2023): all weights are trained with their quantisers in place, towards the full-precision predictions.

`llm_qat_student` has the model in training and its loss, `llm_qat_training` the loop over steps and ranks.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.compare.methods.base import Method, SaveState, States
from dist_spin.compare.methods.llm_qat_student import EMBEDDING, HEAD, NORM
from dist_spin.compare.methods.llm_qat_training import train
from dist_spin.compare.methods.transformed_layer import WeightsAndStates
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.fingerprints import model_identity
from dist_spin.pipeline.variants import Variant
from dist_spin.runtime.distributed import World
from dist_spin.runtime.signals import StopRequest


class LLMQAT(Method):
    """A state has the trained parameters of a layer by their names; the one after the last layer has embedding, norm and head."""

    label = "LLM-QAT"
    settings_prefix = "qat_"
    sets_weight_ranges = True  # trained with min-max ranges
    trains_whole_model = True

    def train_model(self, world: World, directory: Path, save: SaveState, stop: StopRequest) -> None:
        """See `llm_qat_training.train`."""
        train(self.config, world, self.files, self.sites, self.weight_options, directory, save, stop)

    @property
    def state_count(self) -> int:
        """The layers, and one for embedding, final norm and head."""
        return self.shape.layers + 1

    def identity(self, unrotated: Variant, tokens: Tensor) -> dict[str, Any]:
        """As `Method.identity`; the text is written by the model itself, and decided by its size and seed."""
        q = self.config.quantize
        text = {"text": [q.n_sequences, q.seq_len, q.seed]}
        return model_identity(self.config, self.files, unrotated) | text

    @property
    def sites(self) -> Sites:
        """As configured, but symmetric and without clipping."""
        return symmetric(super().sites)

    def weights(self, states: States) -> RotatedWeights:
        """The trained weights."""
        return TrainedWeights(self.files.weights, self.shape, states, self.device, self.dtype)

    def runner(
        self, model_config: Any, sites: Sites, states: States, device: torch.device, dtype: torch.dtype
    ) -> LayerRunner:
        """Layers of the model as it is: all that was learned is in the weights."""
        return LayerRunner(model_config, sites, device=device, dtype=dtype, rotated=False)


def symmetric(sites: Sites) -> Sites:
    """The sites with quantisers that are symmetric and clip nothing."""

    def whole_range(spec: QuantSpec) -> QuantSpec:
        return dataclasses.replace(spec, symmetric=True, clip_ratio=1.0)

    a, o, k, v = map(whole_range, (sites.a, sites.o, sites.k, sites.v))
    return dataclasses.replace(sites, a=a, o=o, k=k, v=v)


class TrainedWeights(WeightsAndStates):
    """The weights of a trained model: the states of its layers, and the state `shape.layers` of embedding, norm and head."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """As `RotatedWeights.layer`."""
        return {name: w.to(self.device, self.dtype) for name, w in self.states(index).items()}

    def embedding(self) -> Tensor:
        """[vocab, h] in the dtype of the model."""
        return self._trained(EMBEDDING)

    def head_weight(self) -> Tensor:
        """lm_head [vocab, h] in the dtype of the model."""
        return self._trained(HEAD if HEAD in self.states(self.shape.layers) else EMBEDDING)

    def final_gain(self) -> Tensor:
        """Gain of the final norm [h] in the dtype of the model."""
        return self._trained(NORM)

    def _trained(self, name: str) -> Tensor:
        return self.states(self.shape.layers)[name].to(self.device, self.dtype)
