"""A checkpoint's weights with the rotations merged into them, made layer by layer when they are asked for."""

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MLP_NORM,
    Shape,
    layer_name,
)
from dist_spin.model.experts import ROUTERS
from dist_spin.model.loss import cross_entropy
from dist_spin.model.merge import rotated_embedding, rotated_layer
from dist_spin.model.sites import WideRMSNorm
from dist_spin.model.weight_source import WeightSource


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
        roles = (*self.shape.linears, *ROUTERS, ATTENTION_NORM, MLP_NORM, "self_attn.q_norm", "self_attn.k_norm")
        names = [f"{role}.{kind}" for role in roles for kind in ("weight", "bias")]
        prefix = layer_name(index)
        stored = [name for name in names if self.source.has(f"{prefix}.{name}")]
        return {n: self.source.rows(f"{prefix}.{n}", device=self.device).to(self.dtype) for n in stored}

    def embedding(self) -> Tensor:
        """[vocab, h] in the model's dtype."""
        return self._vocab_matrix(EMBEDDING)

    def head_weight(self) -> Tensor:
        """lm_head [vocab, h] in the model's dtype."""
        return self._vocab_matrix(HEAD)

    def head(self, eps: float, weight: Tensor | None = None) -> "Head":
        """Final norm and lm_head, or `weight` [vocab, h] in its place."""
        gain = self.final_gain()
        norm = WideRMSNorm(eps, None if gain is None else nn.Parameter(gain, requires_grad=False))
        return Head(norm, self.head_weight() if weight is None else weight)

    def final_gain(self) -> Tensor | None:
        """Gain of the final norm [h] in the model's dtype; None where it is folded into the head."""
        if self.rotations is not None:
            return None
        return self.source.rows(f"{FINAL_NORM}.weight", device=self.device).to(self.dtype)

    def _vocab_matrix(self, name: str) -> Tensor:
        if self.rotations is None:
            return self.source.rows(f"{name}.weight", device=self.device).to(self.dtype)
        return rotated_embedding(self.source, name, self.rotations[0], self.device, self.dtype)


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
