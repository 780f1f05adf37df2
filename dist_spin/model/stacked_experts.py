"""The experts of a layer as three matrices, expert below expert: how rotations are learned through them.

Tokens are sorted by the expert that they chose, so that every shape is known beforehand (one compiled graph serves all layers),
each expert computes its own tokens and no others, and three matrices are sharded and gathered instead of hundreds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


@torch.library.custom_op("dist_spin::chosen_experts", mutates_args=())
def chosen_experts(logits: Tensor, count: int) -> Tensor:
    """The `count` largest of logits [n, experts], int64 [n, count], under a name of its own.

    model/activation_checkpoint.py keeps it: logits that are computed again may differ in their last bit, and a token must not
    change its experts between the forward and the backward pass.
    """
    return logits.topk(count, -1).indices


@chosen_experts.register_fake
def _chosen_shape(logits: Tensor, count: int) -> Tensor:
    return logits.new_empty(len(logits), count, dtype=torch.int64)


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Places in chosen [n, k] in the order of their experts, int64 [n k] (place // k: the token), and where each expert's end."""
    expert, order = chosen.flatten().sort(stable=True)
    return order, expert.bincount(minlength=experts).cumsum(0).tolist()


@torch.library.custom_op("dist_spin::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, stops: Tensor) -> Tensor:
    """Rows x [n, a], sorted by expert, times weight [experts, a, b] of each: [n, b]. Differentiable in x.

    stops: int32 [experts], the row after the last one of each expert.
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and _has_grouped_kernel(x, weight):
        return torch.nn.functional.grouped_mm(x, weight, offs=stops)
    out, start = x.new_empty(len(x), weight.shape[-1]), 0
    for expert, stop in enumerate(stops.tolist()):
        if stop > start:
            torch.mm(x[start:stop], weight[expert], out=out[start:stop])
        start = stop
    return out


def _has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    rows_are_aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0  # to 16 bytes
    return rows_are_aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


@grouped_product.register_fake
def _grouped_product_shape(x: Tensor, weight: Tensor, stops: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[-1])


def _grouped_product_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    weight, stops = ctx.saved_tensors
    return grouped_product(g.contiguous(), weight.mT, stops), None, None  # weights are frozen


grouped_product.register_autograd(
    _grouped_product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:])
)


class _Repeated(torch.autograd.Function):
    """Row order[i] // k of x [n, h] at i: each row k times, in another order, [n k, h].

    The gradient sums each row's copies in a fixed order, where indexing would add them as they come. inverse: of `order`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return g[inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


@dataclass(frozen=True)
class ExpertForm:
    """What an expert computes with its linears.

    activation: of gate_proj's output, as transformers names it. biases: whether its linears have them. limit: where both
    outputs are cut off, which are then joined as gpt-oss does it, with `alpha`; None: they are not.
    """

    activation: str
    biases: bool = False
    limit: float | None = None
    alpha: float = 1.0


class GatedActivation(nn.Module):
    """activation(gate) up; with a limit gate sigmoid(alpha gate) (up + 1), gate at most the limit, up between its two signs."""

    def __init__(self, form: ExpertForm) -> None:
        super().__init__()
        self.limit, self.alpha = form.limit, form.alpha
        if form.limit is None:
            self.act_fn = ACT2FN[form.activation]

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """The outputs of gate_proj and up_proj [..., w] to what down_proj reads, [..., w]."""
        if self.limit is None:
            return self.act_fn(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)


class StackedExperts(nn.Module):
    """Gated MLPs. Expert e has rows [e w, (e + 1) w) of gate_proj and up_proj, [e h, (e + 1) h) of down_proj; biases likewise.

    down_site: what prepares the input of down_proj; it is called with rows [n k, w] and the expert of each row [n k].
    """

    def __init__(self, count: int, hidden: int, width: int, form: ExpertForm) -> None:
        super().__init__()
        self.count = count
        self.gate_proj = nn.Linear(hidden, count * width, bias=form.biases)
        self.up_proj = nn.Linear(hidden, count * width, bias=form.biases)
        self.down_proj = nn.Linear(width, count * hidden, bias=form.biases)
        self.gated = GatedActivation(form)
        self.down_site: nn.Module

    def forward(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """x [n, h], shares [n, k] of the chosen experts, chosen [n, k] int64, to the weighted sums [n, h]."""
        k = chosen.shape[1]
        expert, order = chosen.flatten().sort(stable=True)  # [n k] each
        inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        experts = torch.arange(self.count, device=order.device)
        stops = torch.searchsorted(expert, experts, right=True, out_int32=True)
        rows = _Repeated.apply(x, order, inverse, k)
        gate, up = (self._product(rows, linear, stops) for linear in (self.gate_proj, self.up_proj))
        if self.gate_proj.bias is not None:
            gate, up = gate + self._bias(self.gate_proj, expert), up + self._bias(self.up_proj, expert)
        # A share times the input instead of the output: the gradient of the share then needs no output of down_proj.
        share = shares.flatten()[order, None]
        m = self.down_site(self.gated(gate, up), expert) * share
        y = self._product(m, self.down_proj, stops)
        if self.down_proj.bias is not None:
            y = y + self._bias(self.down_proj, expert) * share
        return _Repeated.apply(y, inverse, order, 1).unflatten(0, (-1, k)).sum(1)

    def _product(self, rows: Tensor, linear: nn.Linear, stops: Tensor) -> Tensor:
        return grouped_product(rows, linear.weight.unflatten(0, (self.count, -1)).mT, stops)

    def _bias(self, linear: nn.Linear, expert: Tensor) -> Tensor:
        """The bias of each row's expert [n k], [n k, out]."""
        return linear.bias.unflatten(0, (self.count, -1))[expert]
