"""A model run one decoder layer at a time, so that no more than a layer of it is ever in memory."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER_LINEARS,
    MLP_NORM,
    Shape,
    attention_masks,
    layer_name,
    rotary,
    skeleton,
)
from dist_spin.model.loading import WeightSource
from dist_spin.model.loss import cross_entropy
from dist_spin.model.rotation import Sites, attach, rotated_end, rotated_layer, widen_norms
from dist_spin.model.sites import WideRMSNorm


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
        """Decoder layer `index` with `weights` (names within the layer, any dtype) and its sites (default: the runner's)."""
        layer: nn.Module = copy.deepcopy(self.base.model.layers[index])
        layer.load_state_dict({k: w.to(self.device, self.dtype) for k, w in weights.items()}, strict=False, assign=True)
        widen_norms(layer, self.rotated)
        missing = [name for name, p in layer.named_parameters() if p.is_meta]
        assert not missing, f"layer {index} was given no {missing[0]}"
        sites = self.sites if sites is None else sites.to(self.device, self.dtype)
        self.attach(layer, index, sites.layer(index))
        return layer.requires_grad_(False)

    def attach(self, layer: nn.Module, index: int, sites: Sites) -> None:
        """Put the sites into decoder layer `index`, in place."""
        attach(layer, self.shape, sites)

    def context(self, index: int, hidden: Tensor) -> dict[str, Any]:
        """What a layer or its attention takes beside hidden states [batch, T, h]: mask and rotary embeddings."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return {
            "attention_mask": attention_masks(self.config, hidden)[index],
            "position_embeddings": self.rotary(hidden, positions),
        }

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """hidden [batch, T, h] on the runner's device through one layer."""
        return layer(hidden, use_cache=False, **self.context(index, hidden))


class RotatedWeights:
    """A model's weights with rotations merged, layer by layer; without rotations, as they are."""

    def __init__(
        self,
        source: WeightSource,
        shape: Shape,
        rotations: tuple[Tensor, Tensor] | None,
        r4: tuple[Tensor, ...],
        device: torch.device,
        dtype: torch.dtype,
        heads: tuple[Tensor, ...] = (),
        scales: dict[str, Tensor] | None = None,
    ) -> None:
        """rotations: R1 [h, h] and R2 [layers, d, d] in fp64, or None. r4, heads: online Hadamards to undo (`Sites`).

        scales: learned ones by name, each [layers, ...].
        """
        self.source, self.shape, self.rotations, self.r4, self.heads = source, shape, rotations, r4, heads
        self.scales = scales or {}
        self.device, self.dtype = device, dtype

    def layer(self, index: int) -> dict[str, Tensor]:
        """Parameters of decoder layer `index` by their names within it, in the model's dtype."""
        if self.rotations is not None:
            r1, r2 = self.rotations
            scales = {name: s[index] for name, s in self.scales.items()}
            merged = rotated_layer(
                self.source, index, self.shape, r1, r2[index], self.r4, self.device, self.heads, scales
            )
            return {name: w.to(self.dtype) for name, w in merged.items()}
        roles = (*LAYER_LINEARS, ATTENTION_NORM, MLP_NORM, "self_attn.q_norm", "self_attn.k_norm")
        names = [f"{role}.{kind}" for role in roles for kind in ("weight", "bias")]
        prefix = layer_name(index)
        found = [name for name in names if self.source.has(f"{prefix}.{name}")]
        return {n: self.source.rows(f"{prefix}.{n}", device=self.device).to(self.dtype) for n in found}

    def embedding(self) -> Tensor:
        """[vocab, h] in the model's dtype."""
        return self._end(EMBEDDING)

    def head_weight(self) -> Tensor:
        """lm_head [vocab, h] in the model's dtype."""
        return self._end(HEAD)

    def head(self, eps: float, weight: Tensor | None = None) -> "Head":
        """Final norm and lm_head, or `weight` [vocab, h] in its place."""
        gain = self.final_gain()
        norm = WideRMSNorm(eps, None if gain is None else nn.Parameter(gain, False))
        return Head(norm, self.head_weight() if weight is None else weight)

    def final_gain(self) -> Tensor | None:
        """Gain of the final norm [h] in the model's dtype; None where it is folded into the head."""
        if self.rotations is not None:
            return None
        return self.source.rows(f"{FINAL_NORM}.weight", device=self.device).to(self.dtype)

    def _end(self, name: str) -> Tensor:
        if self.rotations is None:
            return self.source.rows(f"{name}.weight", device=self.device).to(self.dtype)
        return rotated_end(self.source, name, self.rotations[0], self.device, self.dtype)


class Head:
    """Final norm and lm_head of a model, for measuring."""

    def __init__(self, norm: nn.Module, weight: Tensor) -> None:
        self.norm, self.weight = norm, weight

    @torch.no_grad()
    def loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token cross entropy of each sequence, fp32 [batch]; hidden [batch, T, h], ids [batch, T]."""
        return cross_entropy(self.norm(hidden), self.weight, ids)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, T, vocab]."""
        return self.norm(hidden) @ self.weight.T
