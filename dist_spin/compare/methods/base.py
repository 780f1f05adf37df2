"""What a compared method is: the one class that a new row of `dist-spin compare` writes.

A method learns something about the full-precision model, layer by layer unless it says otherwise, and leaves one dict of
tensors per layer, its state (`compare.method_states` keeps them in files). The rest of the product then treats the method as
it treats a rotation: it asks for weights, for a runner of layers, and for the input columns that stay exact.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_spin.compare.methods.transformed_layer import State, TransformedRunner, TransformedWeights
from dist_spin.config.run import RunConfig
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.model.layer_inputs import LayerTask
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.pipeline.fingerprints import gptq_options, states_identity
from dist_spin.pipeline.model import model_dtype, wide_dtype
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.variants import Variant
from dist_spin.runtime.distributed import World
from dist_spin.runtime.signals import StopRequest

Figures = dict[str, float]  # what learning tells of itself, such as its first and last loss
States = Callable[[int], State]  # the index of a layer to its state, on the CPU
SaveState = Callable[[int, State, Figures], None]  # writes the state of a layer


class Method:
    """A quantisation method, as one configuration asks for it on one model.

    To add one, write a subclass with `label`, `settings_prefix` and `learn_layer` in a file of its own, and give it a row of
    `methods.registry.METHODS`. Everything else has a default, which fits a method whose states hold what
    `methods.transformed_layer` lists.
    """

    label: ClassVar[str]
    """The name in tables."""
    settings_prefix: ClassVar[str]
    """How the names of those fields of `config.methods` begin that decide the states."""
    depends_on_bits: ClassVar[bool] = True
    """Whether the states depend on the settings of `quant`; False where only full-precision activations are read."""
    sets_weight_ranges: ClassVar[bool] = False
    """Whether the method decides the range of each row of weights, so that no clip is searched for it afterwards."""
    down_bits: ClassVar[int] = 0
    """Weight bits of down_proj; 0 for those of the configuration."""
    trains_whole_model: ClassVar[bool] = False
    """Whether `train_model` trains all layers together, on text of its own, instead of `learn_layer` each by itself."""
    fits_rotations: ClassVar[bool] = False
    """Whether `fit_rotations` makes rotations of all states together, which then replace the states."""

    def __init__(self, config: RunConfig, files: ModelFiles, device: torch.device) -> None:
        """device: where weights and layers are made."""
        self.config, self.files, self.shape, self.device = config, files, files.shape, device
        self.dtype, self.wide_dtype = model_dtype(config), wide_dtype(config)

    # Learning

    def learn_layer(self, task: LayerTask) -> tuple[State, Figures]:
        """The state of one layer, and figures for the log."""
        raise NotImplementedError

    def train_model(self, world: World, directory: Path, save: SaveState, stop: StopRequest) -> None:
        """Train the whole model on all ranks together and `save` every state on rank 0; may keep its progress in `directory`.

        Raises:
            Interrupted: a signal came.
            UserError: the model is too large for the method.
        """
        raise NotImplementedError

    def fit_rotations(self, states: States, *, show_progress: bool) -> tuple[Tensor, Tensor, Figures]:
        """R1 [h, h] and R2 [layers, d, d] from the states of all layers; every rank computes the same."""
        raise NotImplementedError

    @property
    def state_count(self) -> int:
        """How many states there are: one for each layer, and what a method adds after them."""
        return self.shape.layers

    def identity(self, unrotated: Variant, tokens: Tensor) -> dict[str, Any]:
        """What decides the states beside the settings of the method and the bits: model and text, as plain values.

        unrotated: the model without rotations. tokens: the calibration text [n, T].
        """
        return states_identity(self.config, self.files, unrotated, tokens)

    # What is quantised

    @property
    def sites(self) -> Sites:
        """What is quantised at run time."""
        return sites_for(self.config, self.shape, rotated=False)

    @property
    def weight_options(self) -> dict[str, GPTQOptions]:
        """How the weight of each linear is quantised; empty where weights stay at 16 bits."""
        if self.config.quant.w_bits == 16 or self.config.quantize.method == "none":
            return {}
        options = gptq_options(self.config)
        down = dataclasses.replace(options, bits=self.config.quant.down_bits or options.bits)
        return {role: down if role == "mlp.down_proj" else options for role in LAYER_LINEARS}

    # What the states make of the model

    def weights(self, states: States) -> RotatedWeights:
        """The weights of the model with the states merged into them."""
        return TransformedWeights(self.files.weights, self.shape, states, self.device, self.dtype)

    def runner(
        self, model_config: Any, sites: Sites, states: States, device: torch.device, dtype: torch.dtype
    ) -> LayerRunner:
        """Builds and runs layers with the states in them. model_config: of transformers."""
        return TransformedRunner(model_config, sites, states, device=device, dtype=dtype)

    def exact_columns(self, state: State) -> dict[str, Tensor]:
        """Input columns [n] int64 of a layer's linears that stay at 16 bits, by linear."""
        return {}
