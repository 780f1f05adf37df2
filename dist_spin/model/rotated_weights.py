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
from dist_spin.model.attention import SINKS
from dist_spin.model.experts import CORRECTION, ROUTERS, kept_dtype
from dist_spin.model.loss import cross_entropy
from dist_spin.model.merge import rotated_embedding, rotated_layer
from dist_spin.model.output_norms import OUTPUT_NORMS
from dist_spin.model.scaling import NOT_SCALED, Scaling
from dist_spin.model.sites import WideRMSNorm
from dist_spin.model.weight_source import WeightSource
from dist_spin.numerics.block_rotation import left_out


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
        """rotations: R1 [h, h] and R2 [layers, d, d] in fp64, or their blocks, or None.

        r4, heads: online Hadamards to undo (`Sites`). scales: learned ones by name, each [layers, ...].
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
            return {name: w.to(kept_dtype(name, self.dtype)) for name, w in merged.items()}
        norms = (ATTENTION_NORM, MLP_NORM, *OUTPUT_NORMS, "self_attn.q_norm", "self_attn.k_norm")
        roles = (*self.shape.layer(index).linears, *ROUTERS, *norms)
        names = [*(f"{role}.{kind}" for role in roles for kind in ("weight", "bias")), SINKS, CORRECTION]
        prefix = layer_name(index)
        stored = [name for name in names if self.source.has(f"{prefix}.{name}")]
        rows = {n: self.source.rows(f"{prefix}.{n}", device=self.device) for n in stored}
        return {n: w.to(kept_dtype(n, self.dtype)) for n, w in rows.items()}

    def embedding(self) -> Tensor:
        """[vocab, h] in the model's dtype, without the family's factor."""
        return self._vocab_matrix(EMBEDDING)

    def embedded(self, ids: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Token ids [...] as the first layer reads them, [..., h], by `embedding` [vocab, h] or that of the model."""
        matrix = self.embedding() if embedding is None else embedding
        return self.shape.scaling.embedded(matrix[ids.to(matrix.device)])

    def head_weight(self) -> Tensor:
        """lm_head [vocab, h] in the model's dtype."""
        return self._vocab_matrix(HEAD)

    def head(self, eps: float, weight: Tensor | None = None) -> "Head":
        """Final norm and lm_head, or `weight` [vocab, h] in its place."""
        gain = self.final_gain()
        parameter = None if gain is None else nn.Parameter(gain, requires_grad=False)
        norm = WideRMSNorm(eps, parameter, self.shape.norm)
        return Head(norm, self.head_weight() if weight is None else weight, self.shape.scaling)

    def final_gain(self) -> Tensor | None:
        """Gain of the final norm [h] in the model's dtype; None where it is folded into the head."""
        if self.folds:
            return None
        return self.source.rows(f"{FINAL_NORM}.weight", device=self.device).to(self.dtype)

    @property
    def folds(self) -> bool:
        """Whether gains of norms are folded into the linears behind them, as R1 needs it."""
        return self.rotations is not None and not left_out(self.rotations[0])

    def _vocab_matrix(self, name: str) -> Tensor:
        if self.rotations is None or not self.folds:
            return self.source.rows(f"{name}.weight", device=self.device).to(self.dtype)
        return rotated_embedding(self.source, name, self.rotations[0], self.device, self.dtype)


class Head:
    """Final norm and lm_head of a model, for measuring."""

    def __init__(self, norm: nn.Module, weight: Tensor, scaling: Scaling = NOT_SCALED) -> None:
        self.norm, self.weight, self.scaling = norm, weight, scaling

    @torch.no_grad()
    def loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token cross entropy of each sequence, fp32 [batch]; hidden [batch, T, h], ids [batch, T]."""
        return cross_entropy(self.norm(hidden), self.weight, ids, self.scaling)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, T, vocab]."""
        return self.scaling.logits_of(self.norm(hidden) @ self.weight.T)
