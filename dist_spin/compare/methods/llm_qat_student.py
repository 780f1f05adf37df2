"""The model that LLM-QAT (Liu et al. 2023) trains, and its loss.

Quantisers take the whole range, symmetric: weights per output channel (or group), activations per token, keys and values per
token and head, with straight-through gradients. The loss is the divergence from the predictions of the full-precision model on
text that this model wrote; AdamW without weight decay. What is not quantised is trained as well: embedding, norms, head. For
each weight, in its own dtype, there are four wide numbers: a master copy, its gradient, and two moments.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_spin.compare.methods.transformed_layer import State
from dist_spin.model import activation_checkpoint as recompute
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.model.layer_inputs import TOKENS_AT_ONCE
from dist_spin.model.layers import LayerRunner
from dist_spin.model.loss import LOGITS_AT_ONCE
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize

# Names in the state after the last layer: [vocab, h], the gain of the final norm [h], and [vocab, h] unless tied.
EMBEDDING, NORM, HEAD = "embedding", "norm", "head"
WIDE_COPIES = 4  # numbers in the dtype of the masters for each weight: the master, its gradient, two moments


def predictions(runner: LayerRunner, weights: RotatedWeights, tokens: Tensor) -> Tensor:
    """The input of the head of the original model for tokens [n, T]: [n, T, h] on the CPU, in the dtype of the runner.

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

    hidden, target [batch, T, h]; head, target_head [vocab, h]. Differentiable in hidden and head. The logits of one chunk of
    tokens exist at a time, and are computed again in the backward pass.
    """
    step = max(1, LOGITS_AT_ONCE // len(head))
    students, teachers = hidden.flatten(0, -2).split(step), target.flatten(0, -2).split(step)
    sums: list[Tensor] = [
        checkpoint(_divergence_sum, h, head, t, target_head, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(students, teachers, strict=True)
    ]
    return torch.stack(sums).sum() / hidden[..., 0].numel()


def _divergence_sum(hidden: Tensor, head: Tensor, target: Tensor, target_head: Tensor) -> Tensor:
    wide = accumulation_dtype(hidden.dtype)
    log_q = (hidden @ head.T).to(wide).log_softmax(-1)
    with torch.no_grad():
        log_p = (target @ target_head.T).to(wide).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


class Student:
    """A whole model in training.

    masters: its weights in fp32 (fp64 for an fp64 model). parameters: what the network computes with, in its own dtype and
    quantised. Both by their names in the states, with the index of the layer in front: "3.mlp.up_proj.weight".
    """

    def __init__(
        self, runner: LayerRunner, weights: RotatedWeights, options: dict[str, GPTQOptions], *, tied: bool
    ) -> None:
        """runner: of the unrotated model with its quantisers. tied: embedding and head are one tensor.

        options: how the weight of each linear is quantised; empty where weights stay at 16 bits.
        """
        self.runner, self.tied = runner, tied
        self.target_head = weights.head_weight()
        self.norm: Any = cast(Any, weights.head(runner.config.rms_norm_eps).norm)
        self.layers = [runner.build(index, weights.layer(index)) for index in range(runner.shape.layers)]
        self.parameters: dict[str, nn.Parameter] = {
            EMBEDDING: nn.Parameter(weights.embedding()),
            NORM: self.norm.weight,
        }
        if not tied:
            self.parameters[HEAD] = nn.Parameter(self.target_head.clone())
        self.weight_specs: dict[str, QuantSpec] = {}
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                name = name.replace(".linear.", ".").replace(".norm.", ".")  # its name in a plain layer
                self.parameters[f"{index}.{name}"] = parameter
                role, _, kind = name.rpartition(".")
                if kind == "weight" and role in LAYER_LINEARS and role in options:
                    o = options[role]
                    self.weight_specs[f"{index}.{name}"] = QuantSpec(
                        o.bits, symmetric=o.symmetric, group_size=o.group_size
                    )
        wide = accumulation_dtype(runner.dtype)
        self.masters = {name: p.detach().to(wide, copy=True) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            self.masters[name].grad = torch.zeros_like(self.masters[name])
            parameter.requires_grad_().register_post_accumulate_grad_hook(self._gradient_hook(name))
        on_gpu = runner.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters.values(), weight_decay=0.0, fused=on_gpu, foreach=False)
        self.update_parameters()

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def add_to_master(parameter: Tensor) -> None:
            """Straight-through: the gradient of the quantised weight is that of the master; summed in the wide dtype."""
            gradient = self.masters[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            gradient += parameter.grad
            parameter.grad = None

        return add_to_master

    @torch.no_grad()
    def update_parameters(self) -> None:
        """Copy the masters into the network: in its own dtype, linears quantised."""
        for name, parameter in self.parameters.items():
            w = self.masters[name].to(parameter.dtype)
            parameter.copy_(fake_quantize(w, self.weight_specs[name]) if name in self.weight_specs else w)

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Divergence from `predictions` [batch, T, h] on token ids [batch, T], a scalar; differentiable."""
        hidden = torch.nn.functional.embedding(ids, self.parameters[EMBEDDING])
        for index, layer in enumerate(self.layers):
            context = {"use_cache": False, **self.runner.context(index, hidden)}
            hidden = recompute.run(layer, "layer", hidden, **context)
        head = self.parameters[EMBEDDING if self.tied else HEAD]
        return divergence(self.norm(hidden), head, target, self.target_head)

    def gradients(self) -> list[Tensor]:
        """The gradients summed since the last step, one tensor for each master."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def step(self, lr: float) -> None:
        """One step of AdamW with the gradients, which are zero afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.update_parameters()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs beside the number of its steps, by name."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            moments = self.optimizer.state[master]
            state |= {
                f"master.{name}": master,
                f"mean.{name}": moments["exp_avg"],
                f"square.{name}": moments["exp_avg_sq"],
            }
        return state

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Restore what `state` returned after `steps` steps."""
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            self.optimizer.state[master] = {
                "step": torch.tensor(
                    float(steps), device=master.device if self.runner.device.type == "cuda" else "cpu"
                ),
                "exp_avg": state[f"mean.{name}"].to(master),
                "exp_avg_sq": state[f"square.{name}"].to(master),
            }
        self.update_parameters()

    def layer_state(self, index: int) -> State:
        """The trained weights of layer `index`, not quantised, in the dtype of the network; after the last layer of the rest."""
        if index == len(self.layers):
            names = {name: name for name in (EMBEDDING, NORM, HEAD) if name in self.masters}
        else:
            prefix = f"{index}."
            names = {name.removeprefix(prefix): name for name in self.masters if name.startswith(prefix)}
        return {short: self.masters[name].detach().to(self.runner.dtype) for short, name in names.items()}
