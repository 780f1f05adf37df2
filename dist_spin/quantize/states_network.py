"""Which 16-bit network the stored hidden states belong to, and how a job gets from them to what enters its own layers.

RMSNorm commutes with R1 and every other rotation, online Hadamard and learned scale cancels inside a layer, so the rotated
network without quantisers holds, up to rounding, the hidden states of the original one times R1. The original layers are run
as they lie on disk, nothing merged, and a job multiplies what it starts from by R1. States of the original network serve every
rotation, so the variants of a run share them.

Where something is quantised inside the network, or a compared method changes its layers, the variant's own layers are run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.data import tokens_fingerprint
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.block_rotation import apply_rotation, left_out
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.fingerprints import network_settings, states_identity
from dist_spin.pipeline.model import model_dtype
from dist_spin.pipeline.variants import Variant

SCHEME = 1  # of what is stored; counted up where the same settings come to give other states


@dataclass(frozen=True)
class StatesNetwork:
    """A 16-bit network that is run layer by layer to store hidden states.

    rotation: R1 [h, h] (or its blocks), which turns its states into those of the variant; None where they are the variant's own.
    """

    runner: LayerRunner
    weights: RotatedWeights
    rotation: Tensor | None = None

    def rotated(self, hidden: Tensor) -> Tensor:
        """Stored states [..., h] as the variant has them: multiplied by R1 in fp32 (fp64 for an fp64 model)."""
        if self.rotation is None:
            return hidden
        wide = accumulation_dtype(hidden.dtype)
        return apply_rotation(hidden.to(wide), self.rotation.to(hidden.device, wide)).to(hidden.dtype)


def own_network_reason(config: RunConfig, variant: Variant) -> str:
    """Why the stored states must come from the variant's own layers; "" where the original network's do."""
    if variant.method is not None:
        return f"{variant.name} changes more than rotations"
    if config.quantize.quantize_activations:
        return "quantize.quantize_activations quantises inside it"
    if dtype_name(config) == "float16":
        return "in float16 states may fit after R1 alone"
    return ""


def stored_states_identity(config: RunConfig, files: ModelFiles, variant: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the stored hidden states: without rotations where they are those of the original network."""
    common = {"scheme": SCHEME, "config": network_settings(files)}
    if own_network_reason(config, variant):
        return {**states_identity(config, files, variant, tokens), **common}
    return {
        **common,
        "network": "original",
        "model": files.weights.fingerprint(),
        "dtype": dtype_name(config),
        "calibration": tokens_fingerprint(tokens),
    }


def original_network(config: RunConfig, files: ModelFiles, variant: Variant, device: torch.device) -> StatesNetwork:
    """The network as it lies on disk, and the variant's R1."""
    dtype = model_dtype(config)
    rotation = None
    if variant.rotations is not None and not left_out(
        variant.rotations[0]
    ):  # copied to the device once, not for every sequence
        rotation = variant.rotations[0].to(device, accumulation_dtype(dtype))
    return StatesNetwork(
        LayerRunner(files.config, Sites(), device=device, dtype=dtype, rotated=False),
        RotatedWeights(files.weights, files.shape, None, (), device, dtype),
        rotation,
    )
