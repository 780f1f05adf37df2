"""The states of a compared method in files, and how the product quantises and runs a model with them.

RUN/methods/NAME/KEY/000.safetensors ...      one state each; KEY begins a hash of all that decides them
RUN/methods/NAME/KEY/rotations.safetensors    in their place, where the method makes rotations of them
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.compare.methods.base import Figures, Method
from dist_spin.compare.methods.registry import METHODS
from dist_spin.compare.methods.transformed_layer import State, clamp
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.fingerprints import EMBEDDING_SETTINGS, flat
from dist_spin.pipeline.variants import build_variant
from dist_spin.runtime.progress import warn
from dist_spin.storage.quantized_layers import layer_path
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import identity_hash, load_if_current, load_tensors, save_tensors


class MethodStates:
    """A method under one configuration, with its states in files; the `VariantMethod` of `pipeline.variants`."""

    def __init__(
        self, config: RunConfig, files: ModelFiles, name: str, device: torch.device, tokens: Tensor | None
    ) -> None:
        """name: of `METHODS`. tokens: the calibration text [n, T]; None for a method that trains on text of its own."""
        self.config, self.files, self.name = config, files, name
        self.method: Method = METHODS[name](config, files, device)
        self.tokens = torch.empty(0) if tokens is None else tokens

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the states."""
        config, method = self.config, self.method
        unrotated = build_variant(config, self.files, "none", torch.device("cpu"))
        identity = {"method": self.name, **method.identity(unrotated, self.tokens)}
        if method.depends_on_bits:
            identity |= {k: v for k, v in flat(config.quant, "quant").items() if k not in EMBEDDING_SETTINGS}
            identity["weights"] = config.quantize.method != "none"
        identity |= {k: v for k, v in vars(config.methods).items() if k.startswith(method.settings_prefix)}
        return identity_hash(identity)

    # Files

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return run_dir(self.config).path / "methods" / self.name / self.fingerprint[:12]

    @property
    def rotations(self) -> Path:
        """The file of rotations, if the method makes them."""
        return self.directory / "rotations.safetensors"

    def path(self, index: int) -> Path:
        """The file of a state."""
        return layer_path(self.directory, index)

    def save(self, index: int, state: State, figures: Figures) -> None:
        """Write one state, atomically."""
        metadata = {"fingerprint": self.fingerprint, "layer": str(index), "figures": json.dumps(figures)}
        save_tensors(self.path(index), state, metadata)

    def save_rotations(self, r1: Tensor, r2: Tensor, figures: Figures) -> None:
        """Write R1 [h, h] and R2 [layers, d, d], atomically, and remove the states that they were made of."""
        metadata = {"fingerprint": self.fingerprint, "figures": json.dumps(figures)}
        save_tensors(self.rotations, {"R1": r1, "R2": r2}, metadata)
        for index in range(self.method.state_count):
            self.path(index).unlink(missing_ok=True)

    def load(self, index: int) -> State | None:
        """One state on the CPU; None if it is not there. A file that cannot be used is set aside, saying so."""
        return self._load_current(self.path(index), "learning the layer again")

    def _load_current(self, path: Path, remedy: str) -> State | None:
        return load_if_current(
            path, load_tensors, lambda metadata: metadata.get("fingerprint") == self.fingerprint, remedy, warn
        )

    def missing(self, indices: range) -> list[int]:
        """Those of the states that are still to be learned; none once there are rotations."""
        return [] if self.rotations_finished() else [index for index in indices if self.load(index) is None]

    def rotations_finished(self) -> bool:
        """Whether the rotations are there and whole. A file that cannot be used is set aside, saying so."""
        return self._load_current(self.rotations, "learning them again") is not None

    def state(self, index: int) -> State:
        """One state on the CPU.

        Raises:
            UserError: it is not there.
        """
        state = self.load(index)
        if state is None:
            raise UserError(f"layer {index} of {self.method.label} is not learned", "start the comparison again")
        return state

    # How a model is quantised and run with them

    @property
    def weights(self) -> RotatedWeights:
        """The weights of the model as the method leaves them."""
        return self.method.weights(self.state)

    def weights_to_quantize(self, index: int) -> dict[str, Tensor]:
        """The parameters of a layer, clamped to the ranges that the method has learned for their codes."""
        return clamp(self.weights.layer(index), self.state(index), symmetric=self.config.quant.w_symmetric)

    def runner(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> LayerRunner:
        """Builds and runs layers with the states in them."""
        return self.method.runner(config, sites, self.state, device, dtype)

    def exact_columns(self, index: int) -> dict[str, Tensor]:
        """Input columns [n] of a layer's linears that stay at 16 bits, by linear."""
        return self.method.exact_columns(self.state(index))

    @property
    def sets_weight_ranges(self) -> bool:
        """See `Method.sets_weight_ranges`."""
        return self.method.sets_weight_ranges

    @property
    def down_bits(self) -> int:
        """See `Method.down_bits`."""
        return self.method.down_bits
