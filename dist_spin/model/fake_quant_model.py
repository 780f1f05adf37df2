"""The fake-quantised network that rotations are learned on: transformers' own layers, embedding to loss, weights frozen."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_spin.model import activation_checkpoint as recompute
from dist_spin.model.architecture import (
    FINAL_NORM,
    Shape,
    attention_masks,
    norm_eps,
    position_embeddings,
    position_kinds,
    rotary,
    skeleton,
)
from dist_spin.model.experts import kept_dtype
from dist_spin.model.loss import Targets, cross_entropy, distillation, most_probable, sparse_distillation
from dist_spin.model.rotation import Rotations
from dist_spin.model.scales_and_clips import ScalesAndClips
from dist_spin.model.scaling import Scaling
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
    """Final norm (its gain folded into the head, unless R1 is left out), lm_head and the loss.

    teacher_share: of the KL divergence from the teacher; the rest is cross entropy.
    """

    def __init__(self, norm: WideRMSNorm, lm_head: nn.Linear, scaling: Scaling, teacher_share: float) -> None:
        super().__init__()
        self.norm, self.lm_head, self.scaling, self.teacher_share = norm, lm_head, scaling, teacher_share

    def forward(
        self, hidden: Tensor | None, teacher: Tensor | Targets | None, ids: Tensor, top_k: int = 0
    ) -> Tensor | Targets:
        """hidden and teacher [batch, T, h], ids [batch, T] to the mean loss per token of each sequence [batch], fp32.

        Without `hidden`: the `top_k` most probable tokens that the teacher predicts, to be handed in later in its place.
        """
        weight, scaling = self.lm_head.weight, self.scaling
        if hidden is None:
            assert isinstance(teacher, Tensor)
            return most_probable(self._normed(teacher), weight, top_k, scaling)
        normed = self._normed(hidden)
        if isinstance(teacher, Targets):
            return sparse_distillation(normed, teacher, weight, ids, self.teacher_share, scaling)
        if teacher is None:
            return cross_entropy(normed, weight, ids, scaling)
        with torch.no_grad():
            teacher_normed = self._normed(teacher)
        return distillation(normed, teacher_normed, weight, ids, self.teacher_share, scaling)

    def _normed(self, hidden: Tensor) -> Tensor:
        if self.norm.weight is None:
            plain: Tensor = self.norm(hidden)
            return plain
        # A copy of the gain: engines gather the head's parameters in the forward pass alone, and the backward pass reads it.
        normed: Tensor = torch.func.functional_call(self.norm, {"weight": self.norm.weight.clone()}, (hidden,))
        return normed


class FakeQuantModel(nn.Module):
    """Embedding, layers and loss of a model on the meta device; an engine shards it and gives it weights.

    Weights are expected folded (norm gains, R4) but not rotated: see `merge.folded_rows` for what `parameter_source` names;
    where R1 is left out, norms are not folded (`folded`). `rotations` and `transforms` stay outside of the module tree, so
    that no engine touches them. With scales, R4 must not be folded. The teacher (`teacher_share` above 0) is the same network
    with its sites off, run along in one pass, unless what it predicts is handed in. With `weight_quantizer`, linears run on
    the rounded merged weights (model/weight_quant.py), which an engine rounds anew after every step; neither transforms nor a
    teacher go with it.
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
        for name, parameter in base.named_parameters():
            parameter.data = parameter.data.to(kept_dtype(name, dtype))
        self.config, self.device = base.config, device
        shape = Shape.of(config)
        self.folded, self.scaling = rotations.turns_r1, shape.scaling
        r1 = rotations.r1_param if rotations.turns_r1 else None
        sites = sites.to(device, dtype)
        for i, layer in enumerate(base.model.layers):
            widen_norms(layer, folded=self.folded, kind=shape.norm)
            if weight_quantizer is None:
                learned = None if transforms is None else transforms.layer(i)
                unfold = transforms is not None and transforms.scales
                attach(layer, shape.layer(i), sites, r1, rotations.r2_params[i], learned, unfold=unfold)
            else:
                assert rotations.turns_r1, "weights are rounded in the basis of R1"
                attach_fake_quant(layer, shape, sites, weight_quantizer, rotations.r1_param, rotations.r2_params[i])
        self.embed = nn.Embedding(shape.vocab, shape.hidden, _weight=base.model.embed_tokens.weight, _freeze=True)
        self.layers = nn.ModuleList([FakeQuantLayer(layer, compile=compile) for layer in base.model.layers])
        gain = None if self.folded else base.model.norm.weight
        final_norm = WideRMSNorm(norm_eps(base.config), gain, shape.norm)
        self.head = LossHead(final_norm, base.lm_head, shape.scaling, teacher_share)
        # In a tuple, because rotary frequencies are no parameters and must not be sharded or cast.
        self._rotary = (rotary(base, device),)
        self._positions: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def forward(self, ids: Tensor, targets: Targets | None = None, top_k: int = 0) -> Tensor | Targets:
        """Token ids [batch, T] to the mean loss per token of each sequence, fp32 [batch].

        targets: what the teacher predicts, where it was stored. top_k: above 0, the teacher alone runs, and its `top_k` most
        probable tokens of each position are returned in place of a loss.
        """
        hidden = self.scaling.embedded(self.embed(ids))
        contexts = [
            (*self._position_embeddings(hidden, kind), mask)
            for kind, mask in zip(position_kinds(self.config), attention_masks(self.config, hidden), strict=True)
        ]
        if top_k:
            for layer, context in zip(self.layers, contexts, strict=True):
                _, hidden = layer(None, hidden, *context)
            return cast(Targets, self.head(None, hidden, ids, top_k))
        teacher = hidden.detach() if self.head.teacher_share and targets is None else None
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # as every later layer's input does, so that all layers share one compiled graph
        if self.rotated is not None:
            hidden = rotate(hidden, self.rotated)
        for layer, context in zip(self.layers, contexts, strict=True):
            hidden, teacher = layer(hidden, teacher, *context)
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

    def _position_embeddings(self, hidden: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        T = hidden.shape[1]
        if (T, kind) not in self._positions:
            self._positions[T, kind] = position_embeddings(self._rotary[0], kind, hidden)
        return self._positions[T, kind]


def parameter_source(name: str) -> str | None:
    """The checkpoint name of a `FakeQuantModel` parameter; None for codes and scales, which are fitted, not read."""
    if name.endswith((".codes", ".scale", ".zero")):
        return None
    name = name.replace(".linear.", ".")
    if name.startswith("embed."):
        return name.replace("embed.", "model.embed_tokens.", 1)
    if name.startswith("head."):
        return name.removeprefix("head.") if name.startswith("head.lm_head") else f"{FINAL_NORM}.weight"
    _, index, _, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    rest = f"{LINEAR_ROLES.get(module, module.removesuffix('.norm'))}.{kind}"
    return f"model.layers.{index}.{rest}"
