"""A model run one decoder layer at a time, so that no more than a layer of it is ever in memory."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import (
    Shape,
    attention_masks,
    position_embeddings,
    position_kinds,
    rotary,
    skeleton,
)
from dist_spin.model.experts import kept_dtype
from dist_spin.model.sites_config import INPUT_SCALES, Sites, attach, widen_norms


class LayerRunner:
    """Builds any decoder layer of a model with given weights, and runs it on hidden states.

    rotated: whether the weights handed in have their norms folded (and R1, R2, R4 merged); False runs the model as it is.
    """

    def __init__(self, config: Any, sites: Sites, *, device: torch.device, dtype: torch.dtype, rotated: bool) -> None:
        self.base = skeleton(config)
        self.shape, self.config = Shape.of(config), self.base.config
        self.device, self.dtype, self.rotated = device, dtype, rotated
        self.sites = sites.to(device, dtype)
        self.rotary = rotary(self.base, device)

    def build(self, index: int, weights: dict[str, Tensor], sites: Sites | None = None) -> nn.Module:
        """Decoder layer `index` with `weights` (names within the layer, any dtype) and its sites (default: the runner's).

        Among the weights may be INPUT_SCALES, which go to the sites.
        """
        layer: nn.Module = copy.deepcopy(self.base.model.layers[index])
        here = {k: w.to(self.device, kept_dtype(k, self.dtype)) for k, w in weights.items()}
        layer.load_state_dict(here, strict=False, assign=True)
        widen_norms(layer, folded=self.rotated, kind=self.shape.norm)
        missing = [name for name, p in layer.named_parameters() if p.is_meta]
        assert not missing, f"layer {index} was given no {missing[0]}"
        sites = self.sites if sites is None else sites.to(self.device, self.dtype)
        self.attach(layer, index, sites.layer(index).with_tensor_scales(weights.get(INPUT_SCALES)))
        return layer.requires_grad_(requires_grad=False)

    def attach(self, layer: nn.Module, index: int, sites: Sites) -> None:
        """Put the sites into decoder layer `index`, in place."""
        attach(layer, self.shape.layer(index), sites)

    def context(self, index: int, hidden: Tensor) -> dict[str, Any]:
        """What a layer or its attention takes beside hidden states [batch, T, h]: mask and rotary embeddings."""
        return {
            "attention_mask": attention_masks(self.config, hidden)[index],
            "position_embeddings": position_embeddings(self.rotary, position_kinds(self.config)[index], hidden),
        }

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """hidden [batch, T, h] on the runner's device through one layer."""
        return layer(hidden, use_cache=False, **self.context(index, hidden))
