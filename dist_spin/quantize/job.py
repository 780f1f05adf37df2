"""One variant to quantise: its layers on disk, and the pieces that quantise them."""

import dataclasses
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.layers import LayerRunner
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.embeddings import embeddings_of
from dist_spin.pipeline.fingerprints import gptq_options, keeps_input_scales, layer_fingerprint
from dist_spin.pipeline.model import model_dtype, wide_dtype
from dist_spin.pipeline.variants import Variant, unquantized
from dist_spin.quantize.calibration_states import CalibrationStates
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.quantize.states_network import (
    StatesNetwork,
    original_network,
    own_network_reason,
    stored_states_identity,
)
from dist_spin.runtime.distributed import World, on_rank0
from dist_spin.runtime.progress import warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.hidden_states import HiddenStateFiles
from dist_spin.storage.quantized_layers import QuantizedLayer, finished_layer, layer_path
from dist_spin.storage.run_directory import LEARNED, RunDir, run_dir
from dist_spin.storage.tensor_file import identity_hash


def layer_ranges_of(layers: int, per_job: int) -> list[tuple[int, int]]:
    """(start, stop) of the ranges that `layers` decoder layers are cut into; per_job 0 makes one."""
    step = per_job or layers
    return [(start, min(start + step, layers)) for start in range(0, layers, step)]


def ranges_within(layer_ranges: list[tuple[int, int]], wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """The ranges of `layer_ranges` that make up layers [start, stop).

    Raises:
        UserError: `wanted` cuts through a range, or is empty.
    """
    start, stop = wanted
    selected = [layer_range for layer_range in layer_ranges if start <= layer_range[0] and layer_range[1] <= stop]
    if not selected or selected[0][0] != start or selected[-1][1] != stop:
        bounds = ", ".join(f"{a}:{b}" for a, b in layer_ranges[:4]) + (", ..." if len(layer_ranges) > 4 else "")
        raise UserError(f"--layers {start}:{stop} is not made of whole jobs ({bounds})", "see quantize.layers_per_job")
    return selected


@dataclass
class QuantizeJob:
    """One variant to quantise, and the pieces that are made when they are first needed."""

    config: RunConfig
    world: World
    files: ModelFiles
    variant: Variant
    tokens: Tensor  # [n, T]
    stop: StopRequest
    # What enters a layer, all sequences [b, T, h]: handed to this rank when it was made, so that it need not be read.
    handed: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return run_dir(self.config)

    @property
    def layer_ranges(self) -> list[tuple[int, int]]:
        """(start, stop) of every range of layers."""
        return layer_ranges_of(self.files.shape.layers, self.config.quantize.layers_per_job)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the variant's layer files."""
        return layer_fingerprint(self.config, self.files, self.variant, self.tokens)

    def path(self, index: int) -> Path:
        """Where layer `index` is kept."""
        return layer_path(self.run.layers(self.variant.name), index)

    def load(self, index: int, device: torch.device | str = "cpu") -> QuantizedLayer | None:
        """Layer `index` if it is finished, on `device`; a file that cannot be used is set aside."""
        return finished_layer(self.path(index), self.fingerprint, self.warn, device)

    def finished(self, start: int, stop: int) -> list[bool]:
        """Which layers of [start, stop) are there and whole, read by rank 0."""
        return on_rank0(lambda: [self.load(index) is not None for index in range(start, stop)])

    def warn(self, text: str) -> None:
        """Say it, and note it in the run's events."""
        warn(text)
        self.run.event("set_aside", variant=self.variant.name, problem=text)

    def make_embeddings(self) -> None:
        """Quantise the embedding and lm_head where that is asked for and not done yet."""
        if embeddings_of(self.config, self.files, self.variant).make(self.warn):
            self.run.event("ends", variant=self.variant.name)

    @cached_property
    def runner(self) -> LayerRunner:
        """Builds and runs the variant's layers, with the sites that calibration sees."""
        sites = self.variant.sites
        seen = sites if self.config.quantize.quantize_activations else unquantized(sites)
        return self.variant.runner(self.files.config, seen, self.world.device, model_dtype(self.config))

    @cached_property
    def stored(self) -> HiddenStateFiles:
        """The hidden states that its ranges start from; shared by all variants where they are the original network's."""
        sequences, length = self.tokens.shape
        return HiddenStateFiles(
            self.run.hidden_states(self.variant.name if self.own_network_reason else LEARNED),
            identity_hash(stored_states_identity(self.config, self.files, self.variant, self.tokens)),
            sequences,
            length,
            self.files.shape.hidden,
            model_dtype(self.config),
        )

    def remove_states(self) -> None:
        """Delete the stored hidden states, those too that an older version kept for each baseline."""
        self.stored.remove()
        shutil.rmtree(self.run.hidden_states(self.variant.name), ignore_errors=True)

    @cached_property
    def hidden_states(self) -> CalibrationStates:
        """The variant's hidden states at any layer."""

        def note(layer: int) -> None:
            self.run.event("boundary", variant=self.variant.name, layer=layer)

        if self.own_network_reason:
            network = StatesNetwork(self.runner, self.variant.weights)
        else:
            network = original_network(self.config, self.files, self.variant, self.world.device)
        return CalibrationStates(
            self.stored, network, self.variant.weights, self.tokens, self.world, self.stop, note, self.handed
        )

    @property
    def own_network_reason(self) -> str:
        """See `states_network.own_network_reason`."""
        return own_network_reason(self.config, self.variant)

    @cached_property
    def quantizer(self) -> LayerQuantizer:
        """The solver under the configuration's options."""
        q, options, method = self.config.quantize, gptq_options(self.config), self.variant.method
        down_bits: int = self.config.quant.down_bits
        exact: dict[str, Any] = {}
        if method is not None:
            options = dataclasses.replace(options, mse_clip=options.mse_clip and not method.sets_weight_ranges)
            down_bits, exact = method.down_bits or down_bits, {"exact_columns": method.exact_columns}
        dtype = wide_dtype(self.config)
        return LayerQuantizer(
            self.runner,
            self.world,
            q.method,
            options,
            dtype,
            down_bits=down_bits,
            cd_passes=q.cd_passes,
            **exact,
            input_scales=keeps_input_scales(self.config, self.variant),
            expert_tokens=q.expert_tokens,
        )
