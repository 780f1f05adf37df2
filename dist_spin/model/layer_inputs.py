"""One full-precision decoder layer on calibration text: what its linears read, and what it makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM
from dist_spin.model.layers import LayerRunner

TOKENS_AT_ONCE = 8192  # that go through a layer together


@dataclass
class LayerTask:
    """What a method is given of decoder layer `index`.

    runner: of the full-precision model, unrotated, in fp32 (fp64 for an fp64 model). weights: the layer's parameters by
    their names within it, as stored. hidden [n, T, h]: the calibration text as it enters the layer, in the runner's dtype.
    """

    index: int
    runner: LayerRunner
    weights: dict[str, Tensor]
    hidden: Tensor


def observe(task: LayerTask, on_input: Callable[[str, Tensor], None] | None = None) -> Tensor:
    """The layer's outputs [n, T, h]; `on_input` is called with what each site reads, a batch at a time.

    Sites and shapes: "attention", "mlp" [batch, T, h], "o" [batch, T, heads * d], and "down" [batch, T, intermediate] where the
    MLP has no experts; "before attention", "before mlp" [batch, T, h], the residual stream in front of their norms.
    """
    layer: Any = task.runner.build(task.index, task.weights)
    if on_input is not None:
        sites = {
            "attention": getattr(layer, ATTENTION_NORM),
            "mlp": getattr(layer, MLP_NORM),
            "o": layer.self_attn.o_proj.input_quant,
        }
        if not task.runner.shape.experts:
            sites["down"] = layer.mlp.down_proj.input_quant
        for site, module in sites.items():
            _watch(module, site, on_input)
        for site, norm in (("before attention", ATTENTION_NORM), ("before mlp", MLP_NORM)):
            _watch_input(getattr(layer, norm), site, on_input)
    batch = max(1, TOKENS_AT_ONCE // task.hidden.shape[1])
    return torch.cat([task.runner.run(layer, task.index, part) for part in task.hidden.split(batch)])


def _watch(module: nn.Module, site: str, on_input: Callable[[str, Tensor], None]) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: on_input(site, output))


def _watch_input(module: nn.Module, site: str, on_input: Callable[[str, Tensor], None]) -> None:
    module.register_forward_pre_hook(lambda _module, inputs: on_input(site, inputs[0]))


def maxima(task: LayerTask) -> tuple[dict[str, Tensor], Tensor]:
    """Largest |x| of each channel at each site, and the layer's outputs [n, T, h]."""
    largest: dict[str, Tensor] = {}

    def update(site: str, x: Tensor) -> None:
        of_batch = x.abs().flatten(0, -2).amax(0)
        largest[site] = torch.maximum(largest[site], of_batch) if site in largest else of_batch

    outputs = observe(task, update)
    return largest, outputs


def weight_maxima(weights: dict[str, Tensor], roles: list[str]) -> Tensor:
    """Largest |w| of each input channel [in] over the linears that share their input."""
    return torch.stack([weights[f"{role}.weight"].abs().amax(0) for role in roles]).amax(0)


READERS = {
    "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj"],
    "o": ["self_attn.o_proj"],
    "down": ["mlp.down_proj"],
}
