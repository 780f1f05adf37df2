"""LLM-QAT (Liu et al. 2023): all weights trained, as their quantised selves, towards the predictions of the original model.

Quantisers take the whole range, symmetric: weights per output channel (or group), activations per token, keys and values per
token and head, with straight-through gradients. The loss is the divergence from the full-precision model's predictions on text
that this model wrote; AdamW without weight decay, the rate falling along a cosine. What is not quantised is trained as well:
embedding, norms, head. Beside the weights in their own dtype stand four numbers each: a wide copy, its gradient, two moments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_spin.compare.methods.transformed_layer import State, WeightsAndStates
from dist_spin.model import activation_checkpoint as recompute
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.model.layer_inputs import TOKENS_AT_ONCE
from dist_spin.model.layers import LayerRunner
from dist_spin.model.loss import LOGITS_AT_ONCE
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize

# In the state of the ends: [vocab, h], the final norm's gain [h], and [vocab, h] unless it is the embedding.
EMBEDDING, NORM, HEAD = "embedding", "norm", "head"
WIDE_COPIES = 4  # numbers in the masters' dtype for each weight: the master, its gradient, two moments


def symmetric(sites: Sites) -> Sites:
    """The sites with quantisers that are symmetric and clip nothing."""

    def whole(spec: QuantSpec) -> QuantSpec:
        return dataclasses.replace(spec, symmetric=True, clip_ratio=1.0)

    return dataclasses.replace(sites, a=whole(sites.a), o=whole(sites.o), k=whole(sites.k), v=whole(sites.v))


class TrainedWeights(WeightsAndStates):
    """The weights of a trained model: its layers' states, and `shape.layers` is the number of the ends' state."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """As `RotatedWeights.layer`."""
        return {name: w.to(self.device, self.dtype) for name, w in self.states(index).items()}

    def embedding(self) -> Tensor:
        """[vocab, h] in the model's dtype."""
        return self._trained(EMBEDDING)

    def head_weight(self) -> Tensor:
        """lm_head [vocab, h] in the model's dtype."""
        return self._trained(HEAD if HEAD in self.states(self.shape.layers) else EMBEDDING)

    def final_gain(self) -> Tensor:
        """Gain of the final norm [h] in the model's dtype."""
        return self._trained(NORM)

    def _trained(self, name: str) -> Tensor:
        return self.states(self.shape.layers)[name].to(self.device, self.dtype)


def predictions(runner: LayerRunner, weights: RotatedWeights, tokens: Tensor) -> Tensor:
    """What the head of the original model reads for tokens [n, T]: [n, T, h] on the CPU, in the runner's dtype.

    runner: of the full-precision model, unrotated.
    """
    hidden = list(weights.embedding()[tokens.to(runner.device)].split(max(1, TOKENS_AT_ONCE // tokens.shape[1])))
    for index in range(runner.shape.layers):
        layer = runner.build(index, weights.layer(index))
        hidden = [runner.run(layer, index, h) for h in hidden]
    norm = weights.head(runner.config.rms_norm_eps).norm
    with torch.no_grad():
        return torch.cat([norm(h).cpu() for h in hidden])


def divergence(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor) -> Tensor:
    """Mean over tokens of KL(softmax(target target_head^T) || softmax(hidden head^T)), a scalar in max(fp32, dtype).

    hidden, target [batch, T, h]; head, target_head [vocab, h]. Differentiable in hidden and head; the logits of a chunk of
    tokens exist at a time, and are computed again in the backward pass.
    """
    step = max(1, LOGITS_AT_ONCE // len(head))
    students, teachers = hidden.flatten(0, -2).split(step), target.flatten(0, -2).split(step)
    parts: list[Tensor] = [
        checkpoint(_summed, h, head, t, target_head, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(students, teachers, strict=True)
    ]
    return torch.stack(parts).sum() / hidden[..., 0].numel()


def _summed(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor) -> Tensor:
    wide = accumulation_dtype(hidden.dtype)
    log_q = (hidden @ head.T).to(wide).log_softmax(-1)
    with torch.no_grad():
        log_p = (target @ target_head.T).to(wide).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


class Student:
    """A whole model in training. masters: its weights in fp32 (fp64 for an fp64 model), by their names in the states."""

    def __init__(
        self, runner: LayerRunner, weights: RotatedWeights, options: dict[str, GPTQOptions], tied: bool
    ) -> None:
        """runner: of the unrotated model with its quantisers. options: how each linear's weight is rounded; empty: not.

        tied: embedding and head are one tensor.
        """
        self.runner, self.tied = runner, tied
        self.target_head = weights.head_weight()
        self.norm: Any = cast(Any, weights.head(runner.config.rms_norm_eps).norm)
        self.layers = [runner.build(index, weights.layer(index)) for index in range(runner.shape.layers)]
        self.seen: dict[str, nn.Parameter] = {EMBEDDING: nn.Parameter(weights.embedding()), NORM: self.norm.weight}
        if not tied:
            self.seen[HEAD] = nn.Parameter(self.target_head.clone())
        self.grids: dict[str, QuantSpec] = {}
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                name = name.replace(".linear.", ".").replace(".norm.", ".")  # as it is called without the sites
                self.seen[f"{index}.{name}"] = parameter
                role, _, kind = name.rpartition(".")
                if kind == "weight" and role in LAYER_LINEARS and role in options:
                    o = options[role]
                    self.grids[f"{index}.{name}"] = QuantSpec(o.bits, o.symmetric, o.group_size)
        wide = accumulation_dtype(runner.dtype)
        self.masters = {name: p.detach().to(wide, copy=True) for name, p in self.seen.items()}
        for name, parameter in self.seen.items():
            self.masters[name].grad = torch.zeros_like(self.masters[name])
            parameter.requires_grad_().register_post_accumulate_grad_hook(self._collector(name))
        on_gpu = runner.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters.values(), weight_decay=0.0, fused=on_gpu, foreach=False)
        self.round()

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            """Straight-through: the gradient of the rounded weight is the master's; added up in its dtype."""
            gradient = self.masters[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            gradient += parameter.grad
            parameter.grad = None

        return collect

    @torch.no_grad()
    def round(self) -> None:
        """Let the network see the masters as they are now: in its own dtype, linears on their grids."""
        for name, parameter in self.seen.items():
            w = self.masters[name].to(parameter.dtype)
            parameter.copy_(fake_quantize(w, self.grids[name]) if name in self.grids else w)

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Divergence from `predictions` [batch, T, h] on token ids [batch, T], a scalar; differentiable."""
        hidden = torch.nn.functional.embedding(ids, self.seen[EMBEDDING])
        for index, layer in enumerate(self.layers):
            context = {"use_cache": False, **self.runner.context(index, hidden)}
            hidden = recompute.run(layer, "layer", hidden, **context)
        head = self.seen[EMBEDDING if self.tied else HEAD]
        return divergence(self.norm(hidden), head, target, self.target_head)

    def gradients(self) -> list[Tensor]:
        """What has been added up since the last step, one tensor for each master."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def step(self, rate: float) -> None:
        """One step of AdamW against the gradients, which are then zero."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.round()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs beside the number of its steps, by name."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            moments = self.optimizer.state[master]
            out |= {
                f"master.{name}": master,
                f"mean.{name}": moments["exp_avg"],
                f"square.{name}": moments["exp_avg_sq"],
            }
        return out

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Take up what `state` returned after `steps` steps."""
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            self.optimizer.state[master] = {
                "step": torch.tensor(
                    float(steps), device=master.device if self.runner.device.type == "cuda" else "cpu"
                ),
                "exp_avg": state[f"mean.{name}"].to(master),
                "exp_avg_sq": state[f"square.{name}"].to(master),
            }
        self.round()

    def trained(self, index: int) -> State:
        """The state of layer `index` in the network's dtype, not rounded; of the ends after the last layer."""
        if index == len(self.layers):
            names = {name: name for name in (EMBEDDING, NORM, HEAD) if name in self.masters}
        else:
            prefix = f"{index}."
            names = {name.removeprefix(prefix): name for name in self.masters if name.startswith(prefix)}
        return {short: self.masters[name].detach().to(self.runner.dtype) for short, name in names.items()}
