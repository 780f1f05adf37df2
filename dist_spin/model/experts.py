"""Mixtures of experts: one router and a gated MLP per expert, in place of transformers' fused expert parameters.

Transformers holds the experts of a layer as two three-dimensional parameters. Here each expert is a module of three linears
under the names that published checkpoints store (`mlp.experts.3.gate_proj`), so that merging, GPTQ and exports see linears.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dist_spin.errors import UserError
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize

EXPERT_FAMILIES = ("qwen3_moe", "mixtral")
ROUTER = "mlp.gate"
MIXTRAL_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # as its checkpoints name them


def expert_count(config: Any) -> int:
    """Experts per layer of a transformers config; 0 for a dense model."""
    if config.model_type not in EXPERT_FAMILIES:
        return 0
    return config.num_local_experts if config.model_type == "mixtral" else config.num_experts


def expert_width(config: Any) -> int:
    """Intermediate size of one expert."""
    return config.intermediate_size if config.model_type == "mixtral" else config.moe_intermediate_size


def expert_linears(experts: int) -> tuple[str, ...]:
    """The experts' linears by their names within a layer, expert by expert; the router, which is never rounded, is not one."""
    return tuple(
        f"mlp.experts.{e}.{linear}" for e in range(experts) for linear in ("gate_proj", "up_proj", "down_proj")
    )


def check_experts(config: Any) -> None:
    """Refuse a mixture of experts some of whose layers are dense.

    Raises:
        UserError: names the setting of config.json.
    """
    if config.model_type == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        which = "mlp_only_layers" if config.mlp_only_layers else "decoder_sparse_step"
        problem = f"{which} of config.json gives some layers a dense MLP, which is not supported beside experts"
        raise UserError(problem, "use a model with experts in every layer")


def name_here(stored: str) -> str:
    """The name within our modules of a tensor as a Mixtral checkpoint stores it; other names as they are."""
    name = stored.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(\.experts\.\d+)\.(w[123])\.", lambda m: f"{m[1]}.{MIXTRAL_LINEARS[m[2]]}.", name)


def name_in_checkpoints(model_type: str, name: str) -> str:
    """The reverse of `name_here`, for a name within a layer."""
    if model_type != "mixtral" or not name.startswith("mlp."):
        return name
    stored = {linear: w for w, linear in MIXTRAL_LINEARS.items()}
    name = re.sub(r"(experts\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{stored[m[2]]}.", name)
    return name.replace("mlp.", "block_sparse_moe.", 1)


class Router(nn.Module):
    """The linear that scores experts. Softmax in max(fp32, input dtype); its weight is never rounded."""

    def __init__(self, hidden: int, experts: int, chosen: int, *, normalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.chosen, self.normalised = chosen, normalised

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, h] to the shares of the chosen experts [n, chosen], in x's dtype, and which they are, int64."""
        logits = x @ self.weight.T
        shares, experts = logits.to(accumulation_dtype(x.dtype)).softmax(-1).topk(self.chosen, -1)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), experts


class Expert(nn.Module):
    """One gated MLP without biases."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj: nn.Module = nn.Linear(width, hidden, bias=False)
        self.act_fn = ACT2FN[activation]

    def inner(self, x: Tensor) -> Tensor:
        """x [n, h] to what the site in front of down_proj reads, [n, width]."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, h] to the same."""
        return self.down_proj(self.inner(x))


class MixtureOfExperts(nn.Module):
    """Router and experts; each expert computes the tokens that chose it, and no others.

    The router reads its input unquantised, as serving engines run it; the experts read it through `input_spec`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        normalised = config.model_type == "mixtral" or config.norm_topk_prob
        count, hidden, width = expert_count(config), config.hidden_size, expert_width(config)
        self.gate = Router(hidden, count, config.num_experts_per_tok, normalised=normalised)
        self.experts = nn.ModuleList([Expert(hidden, width, config.hidden_act) for _ in range(count)])
        self.input_spec = QuantSpec()

    def quantised(self, x: Tensor) -> Tensor:
        """What the experts read of x [..., h]."""
        return fake_quantize(x, self.input_spec) if self.input_spec.enabled else x

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, T, h] to the same."""
        tokens = x.flatten(0, -2)
        shares, chosen = self.gate(tokens)
        inputs, out = self.quantised(tokens), torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            token, place = (chosen == index).nonzero(as_tuple=True)
            out.index_add_(0, token, self.experts[index](inputs[token]) * shares[token, place, None])
        return out.view_as(x)
