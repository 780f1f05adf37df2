"""The fake-quantised network that rotations are learned on: transformers' own layers, embedding to loss, weights frozen."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_spin.model import activation_checkpoint as recompute
from dist_spin.model.architecture import Shape, attention_masks, rotary, skeleton
from dist_spin.model.loss import Targets, cross_entropy, distillation, most_probable, sparse_distillation
from dist_spin.model.rotation import Rotations
from dist_spin.model.scales_and_clips import ScalesAndClips
from dist_spin.model.sites import WideRMSNorm, plain_sites
from dist_spin.model.sites_config import Sites, attach, widen_norms
from dist_spin.model.weight_quant import LINEAR_ROLES, FakeQuantLinear, WeightQuantizer, attach_fake_quant, rotate


class FakeQuantLayer(nn.Module):
    """One decoder layer with its sites. level: what it keeps for the backward pass (`activation_checkpoint.LEVELS`)."""

    def __init__(self, layer: nn.Module, *, compile: bool) -> None:
        super().__init__()
        self.layer, self.level = layer, "layer"
        self._run = torch.compile(self._forward) if compile else self._forward

    def _forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        call: dict[str, Any] = {"attention_mask": mask, "position_embeddings": (cos, sin), "use_cache": False}
        return recompute.run(self.layer, self.level, hidden, **call)

    def forward(
        self, hidden: Tensor | None, teacher: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """hidden [batch, T, h] to the same, and the teacher's likewise: one gather of the weights serves both.

        The teacher alone runs as it is written: it passes once, which would not pay for compiling it.
        """
        if teacher is not None:
            with torch.no_grad(), plain_sites():
                teacher = (self._forward if hidden is None else self._run)(teacher, cos, sin, mask)
        return None if hidden is None else self._run(hidden, cos, sin, mask), teacher


class LossHead(nn.Module):
    """Final norm (its gain folded into the head), lm_head and the loss.

    teacher_share: of the KL divergence from the teacher; the rest is cross entropy.
    """

    def __init__(self, eps: float, lm_head: nn.Linear, teacher_share: float) -> None:
        super().__init__()
        self.norm, self.lm_head, self.teacher_share = WideRMSNorm(eps), lm_head, teacher_share

    def forward(
        self, hidden: Tensor | None, teacher: Tensor | Targets | None, ids: Tensor, top_k: int = 0
    ) -> Tensor | Targets:
        """hidden and teacher [batch, T, h], ids [batch, T] to the mean loss per token of each sequence [batch], fp32.

        Without `hidden`: the `top_k` most probable tokens that the teacher predicts, to be handed in later in its place.
        """
        weight = self.lm_head.weight
        if hidden is None:
            assert isinstance(teacher, Tensor)
            return most_probable(self.norm(teacher), weight, top_k)
        normed = self.norm(hidden)
        if isinstance(teacher, Targets):
            return sparse_distillation(normed, teacher, weight, ids, self.teacher_share)
        if teacher is None:
            return cross_entropy(normed, weight, ids)
        with torch.no_grad():
            teacher_normed: Tensor = self.norm(teacher)
        return distillation(normed, teacher_normed, weight, ids, self.teacher_share)


class FakeQuantModel(nn.Module):
    """Embedding, layers and loss of a model on the meta device; an engine shards it and gives it weights.

    Weights are expected folded (norm gains, R4) but not rotated: see `merge.folded_rows` for what `parameter_source`
    names. `rotations` and `transforms` stay outside of the module tree, so that no engine touches them. With scales, R4 must
    not be folded. The teacher (`teacher_share` above 0) is the same network with its sites off, run along in one pass, unless
    what it predicts is handed in. With
    `weight_quantizer`, linears run on the rounded merged weights (model/weight_quant.py), which an engine rounds anew after
    every step; neither transforms nor a teacher go with it.
    """

    def __init__(
        self,
        config: Any,
        rotations: Rotations,
        sites: Sites,
        *,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool = False,
        transforms: ScalesAndClips | None = None,
        teacher_share: float = 0.0,
        weight_quantizer: WeightQuantizer | None = None,
    ) -> None:
        super().__init__()
        # R1 where the residual stream is kept in the rotated basis, None where it is in its own.
        self.rotated = None if weight_quantizer is None else rotations.r1_param
        base = skeleton(config, stacked_experts=True).to(dtype)
        self.config, self.device = base.config, device
        shape = Shape.of(config)
        sites = sites.to(device, dtype)
        for i, layer in enumerate(base.model.layers):
            widen_norms(layer, folded=True)
            if weight_quantizer is None:
                learned = None if transforms is None else transforms.layer(i)
                unfold = transforms is not None and transforms.scales
                attach(layer, shape, sites, rotations.r1_param, rotations.r2_params[i], learned, unfold=unfold)
            else:
                attach_fake_quant(layer, shape, sites, weight_quantizer, rotations.r1_param, rotations.r2_params[i])
        self.embed = base.model.embed_tokens
        self.layers = nn.ModuleList([FakeQuantLayer(layer, compile=compile) for layer in base.model.layers])
        self.head = LossHead(base.config.rms_norm_eps, base.lm_head, teacher_share)
        # In a tuple, because rotary frequencies are no parameters and must not be sharded or cast.
        self._rotary = (rotary(base, device),)
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, ids: Tensor, targets: Targets | None = None, top_k: int = 0) -> Tensor | Targets:
        """Token ids [batch, T] to the mean loss per token of each sequence, fp32 [batch].

        targets: what the teacher predicts, where it was stored. top_k: above 0, the teacher alone runs, and its `top_k` most
        probable tokens of each position are returned in place of a loss.
        """
        hidden = self.embed(ids)
        cos, sin = self._position_embeddings(hidden)
        masks = attention_masks(self.config, hidden)
        if top_k:
            for layer, mask in zip(self.layers, masks, strict=True):
                _, hidden = layer(None, hidden, cos, sin, mask)
            return cast(Targets, self.head(None, hidden, ids, top_k))
        teacher = hidden.detach() if self.head.teacher_share and targets is None else None
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # as every later layer's input does, so that all layers share one compiled graph
        if self.rotated is not None:
            hidden = rotate(hidden, self.rotated)
        for layer, mask in zip(self.layers, masks, strict=True):
            hidden, teacher = layer(hidden, teacher, cos, sin, mask)
        if self.rotated is not None:
            hidden = rotate(hidden, self.rotated, back=True)  # here, where the norm commutes with it
        return self.head(hidden, teacher if targets is None else targets, ids)

    def fake_quant_linears(self) -> Iterator[tuple[int, str, FakeQuantLinear]]:
        """Layer index, role (such as q_proj) and module of every fake-quantised linear."""
        for i, layer in enumerate(self.layers):
            for name, module in layer.named_modules():
                if isinstance(module, FakeQuantLinear):
                    yield i, LINEAR_ROLES[name.removeprefix("layer.")], module

    def set_levels(self, levels: list[str]) -> None:
        """What each layer keeps for the backward pass (`activation_checkpoint.LEVELS`)."""
        for layer, level in zip(self.layers, levels, strict=True):
            cast(FakeQuantLayer, layer).level = level

    def _position_embeddings(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        T = hidden.shape[1]
        if T not in self._positions:
            self._positions[T] = self._rotary[0](hidden, torch.arange(T, device=hidden.device)[None])
        return self._positions[T]


def parameter_source(name: str) -> str | None:
    """The checkpoint name of a `FakeQuantModel` parameter; None for codes and scales, which are fitted, not read."""
    if name.endswith((".codes", ".scale", ".zero")):
        return None
    name = name.replace(".linear.", ".")
    if name.startswith("embed."):
        return name.replace("embed.", "model.embed_tokens.", 1)
    if name.startswith("head."):
        return name.removeprefix("head.")
    _, index, _, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    rest = f"{LINEAR_ROLES.get(module, module)}.{kind}"
    return f"model.layers.{index}.{rest}"
