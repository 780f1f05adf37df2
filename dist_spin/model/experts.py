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
from dist_spin.model.stacked_experts import StackedExperts, by_expert, chosen_experts
from dist_spin.numerics.dtypes import accumulation_dtype

EXPERT_FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")
SHARED = "mlp.shared_expert"  # which every token computes, times a share of its own (Qwen2-MoE)
ROUTERS = ("mlp.gate", f"{SHARED}_gate")  # never rounded; where there is no shared expert, the first alone
MIXTRAL_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # as its checkpoints name them


def expert_count(config: Any) -> int:
    """Experts per layer of a transformers config; 0 for a dense model."""
    if config.model_type not in EXPERT_FAMILIES:
        return 0
    return config.num_local_experts if config.model_type == "mixtral" else config.num_experts


def expert_width(config: Any) -> int:
    """Intermediate size of one expert."""
    return config.intermediate_size if config.model_type in ("mixtral", "olmoe") else config.moe_intermediate_size


def shared_width(config: Any) -> int:
    """Intermediate size of the shared expert, a multiple of `expert_width`; 0 where there is none."""
    return config.shared_expert_intermediate_size if config.model_type == "qwen2_moe" else 0


def expert_linears(experts: int, shared: int) -> tuple[str, ...]:
    """The experts' linears by their names within a layer, expert by expert; routers, which are never rounded, are not among them.

    shared: width of the shared expert, which comes last, 0 for none.
    """
    owners = [*(f"mlp.experts.{e}" for e in range(experts)), *([SHARED] if shared else [])]
    return tuple(f"{owner}.{linear}" for owner in owners for linear in ("gate_proj", "up_proj", "down_proj"))


def check_experts(config: Any) -> None:
    """Refuse a mixture of experts some of whose layers are dense, or whose parts no rotation goes through.

    Raises:
        UserError: names the setting of config.json.
    """
    if config.model_type in ("qwen3_moe", "qwen2_moe") and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        which = "mlp_only_layers" if config.mlp_only_layers else "decoder_sparse_step"
        problem = f"{which} of config.json gives some layers a dense MLP, which is not supported beside experts"
        raise UserError(problem, "use a model with experts in every layer")
    if config.model_type == "olmoe" and config.clip_qkv is not None:
        problem = "clip_qkv of config.json clips values one by one, which does not commute with R2"
        raise UserError(problem, "use a model without it")
    if expert_count(config) and shared_width(config) % expert_width(config):
        problem = f"the shared expert is {shared_width(config)} wide, no multiple of an expert's {expert_width(config)}"
        raise UserError(problem, "use another model")


def name_here(stored: str) -> str:
    """The name within our modules of a tensor as a Mixtral checkpoint stores it; other names as they are."""
    name = stored.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(\.experts\.\d+)\.(w[123])\.", lambda m: f"{m[1]}.{MIXTRAL_LINEARS[m[2]]}.", name)


def expert_parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """The weights that a stack of all experts holds, as newer checkpoints have it: name to first row and number of rows.

    Args:
        name: of the stored tensor, `...mlp.experts.gate_up_proj` [experts, 2 w, h] or `...mlp.experts.down_proj` [experts, h, w].
        shape: its shape; rows are those of the stack with its first two dimensions joined.

    Returns:
        Nothing for any other tensor.
    """
    layer, _, linear = name.rpartition(".mlp.experts.")
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(linear, ())
    if not layer or len(shape) != 3 or not names:
        return {}
    rows = shape[1] // len(names)
    return {
        f"{layer}.mlp.experts.{e}.{one}.weight": (e * shape[1] + i * rows, rows)
        for e in range(shape[0])
        for i, one in enumerate(names)
    }


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
        experts = chosen_experts(logits.detach(), self.chosen)
        shares = logits.to(accumulation_dtype(x.dtype)).softmax(-1).gather(-1, experts)
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


class ExpertList(nn.ModuleList):
    """The experts of a layer as modules; each computes the tokens that chose it, and no others."""

    def forward(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """x [n, h], shares [n, k] of the chosen experts, chosen [n, k] int64, to the weighted sums [n, h]."""
        out, start = torch.zeros_like(x), 0
        order, stops = by_expert(chosen, len(self))
        tokens, shares = order // chosen.shape[1], shares.flatten()[order, None]
        for expert, stop in zip(self, stops, strict=True):
            if stop > start:  # an expert has a token once, so that no order of sums is left to chance
                own = tokens[start:stop]
                out = out.index_add(0, own, expert(x[own]) * shares[start:stop])
            start = stop
        return out


class MixtureOfExperts(nn.Module):
    """Router and experts.

    The router reads its input unquantised, as serving engines run it; the experts read it through `input_site`.
    """

    def __init__(self, config: Any, *, stacked: bool = False) -> None:
        """stacked: the experts as three matrices, for learning (model/stacked_experts.py), instead of a list of modules.

        The shared expert is a module by itself either way.
        """
        super().__init__()
        normalised = config.model_type == "mixtral" or config.norm_topk_prob
        count, hidden, width = expert_count(config), config.hidden_size, expert_width(config)
        self.gate = Router(hidden, count, config.num_experts_per_tok, normalised=normalised)
        self.input_site: nn.Module = nn.Identity()
        self.experts: Any
        if stacked:
            self.experts = StackedExperts(count, hidden, width, config.hidden_act)
        else:
            self.experts = ExpertList([Expert(hidden, width, config.hidden_act) for _ in range(count)])
        self.has_shared = shared_width(config) > 0
        if self.has_shared:
            self.shared_expert = Expert(hidden, shared_width(config), config.hidden_act)
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, T, h] to the same."""
        tokens = x.flatten(0, -2)
        shares, chosen = self.gate(tokens)
        inputs = self.input_site(tokens)
        out = self.experts(inputs, shares, chosen)
        if self.has_shared:
            out = out + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(inputs)
        return out.view_as(x)
