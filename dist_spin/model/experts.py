"""Mixtures of experts: one router and a gated MLP per expert, in place of transformers' fused expert parameters.

Transformers holds the experts of a layer as two three-dimensional parameters. Here each expert is a module of three linears
under the names that published checkpoints store (`mlp.experts.3.gate_proj`), so that merging, GPTQ and exports see linears.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.errors import UserError
from dist_spin.model.stacked_experts import ExpertForm, GatedActivation, StackedExperts, by_expert, chosen_experts
from dist_spin.numerics.dtypes import accumulation_dtype

# Shared experts that count in full, the first layers may be dense, and names of entries of config.json as DeepSeek-V3 has them.
GLM_LIKE = ("glm4_moe", "solar_open", "dots1")
SIGMOID_FAMILIES = (*GLM_LIKE, "minimax_m2")  # routers of sigmoids with a correction
EXPERT_FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "gpt_oss", *SIGMOID_FAMILIES)
SHARED = "mlp.shared_expert"  # which every token computes, in Qwen2-MoE times a share of its own
ROUTERS = ("mlp.gate", f"{SHARED}_gate")  # never rounded; the second where a shared expert has a share of its own
CORRECTION = "mlp.gate.e_score_correction_bias"  # added to scores to choose experts by; in fp32 or wider
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of gpt-oss, where config.json does not say


def expert_count(config: Any) -> int:
    """Experts per layer of a transformers config; 0 for a dense model."""
    if config.model_type not in EXPERT_FAMILIES:
        return 0
    if config.model_type in GLM_LIKE:
        return config.n_routed_experts or 0
    name = "num_local_experts" if config.model_type in ("mixtral", "gpt_oss", "minimax_m2") else "num_experts"
    return int(getattr(config, name))


def dense_layers(config: Any) -> int:
    """How many layers, the first ones, have a dense MLP in place of experts."""
    return getattr(config, "first_k_dense_replace", 0) if config.model_type in GLM_LIKE else 0


def expert_width(config: Any) -> int:
    """Intermediate size of one expert."""
    of_all = config.model_type in ("mixtral", "olmoe", "gpt_oss", "minimax_m2")
    return config.intermediate_size if of_all else config.moe_intermediate_size


def shared_width(config: Any) -> int:
    """Intermediate size of the shared expert, a multiple of `expert_width`; 0 where there is none."""
    if config.model_type in GLM_LIKE:
        return int((config.n_shared_experts or 0) * config.moe_intermediate_size)
    return config.shared_expert_intermediate_size if config.model_type == "qwen2_moe" else 0


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a layer's tensor is kept in where the model is in `dtype`: in 16 bits CORRECTION would choose other experts."""
    return accumulation_dtype(dtype) if name.endswith(CORRECTION) else dtype


def expert_form(config: Any) -> ExpertForm:
    """What an expert of a transformers config computes."""
    if config.model_type != "gpt_oss":
        return ExpertForm(config.hidden_act)
    alpha, limit = getattr(config, "swiglu_alpha", SWIGLU_ALPHA), getattr(config, "swiglu_limit", SWIGLU_LIMIT)
    return ExpertForm("", biases=True, limit=limit, alpha=alpha)


def expert_linears(experts: int, shared: int) -> tuple[str, ...]:
    """The experts' linears by their names within a layer, expert by expert; routers, which are never rounded, are not among them.

    shared: width of the shared expert, which comes last, 0 for none.
    """
    owners = [*(f"mlp.experts.{e}" for e in range(experts)), *([SHARED] if shared else [])]
    return tuple(f"{owner}.{linear}" for owner in owners for linear in ("gate_proj", "up_proj", "down_proj"))


def check_experts(config: Any) -> None:
    """Refuse a mixture of experts some of whose layers are dense, whose router cannot choose, or that no rotation goes through.

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
    if config.model_type not in EXPERT_FAMILIES:
        return
    least_values = {"num_experts_per_tok": 1}
    if config.model_type in GLM_LIKE:
        least_values |= {"n_routed_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    for name, least in least_values.items():
        value = getattr(config, name, least)
        if not isinstance(value, int) or value < least:  # null, for example
            problem = f"{name}={value} of config.json is no number from {least}"
            raise UserError(problem, "use another model")
    experts = expert_count(config)
    if config.num_experts_per_tok > experts:
        problem = f"num_experts_per_tok={config.num_experts_per_tok} of config.json is more than its {experts} experts"
        raise UserError(problem, "use another model")
    if dense_layers(config) >= config.num_hidden_layers:
        problem = f"first_k_dense_replace={dense_layers(config)} of config.json leaves no layer with experts"
        raise UserError(problem, "use another model")
    if config.model_type in GLM_LIKE:
        groups, each = config.n_group, experts // config.n_group
        if groups * each != experts or each < 2 or not config.num_experts_per_tok <= config.topk_group * each:
            problem = f"n_group={groups} and topk_group={config.topk_group} of config.json do not fit its experts"
            raise UserError(problem, "use another model")
    if shared_width(config) % expert_width(config):
        problem = f"the shared expert is {shared_width(config)} wide, no multiple of an expert's {expert_width(config)}"
        raise UserError(problem, "use another model")


class Router(nn.Module):
    """The linear that scores experts. Softmax in max(fp32, input dtype); its weight is never rounded."""

    bias: nn.Parameter | None

    def __init__(self, hidden: int, experts: int, chosen: int, *, normalised: bool, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_parameter("bias", nn.Parameter(torch.empty(experts)) if bias else None)
        self.chosen, self.normalised = chosen, normalised

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, h] to the shares of the chosen experts [n, chosen], in x's dtype, and which they are, int64."""
        logits = x @ self.weight.T if self.bias is None else torch.addmm(self.bias, x, self.weight.T)
        experts = chosen_experts(logits.detach(), self.chosen)
        shares = logits.to(accumulation_dtype(x.dtype)).softmax(-1).gather(-1, experts)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), experts


class SigmoidRouter(nn.Module):
    """Scores sigmoid(logits), as in GLM-4.5 and DeepSeek-V3 (2024, arXiv 2412.19437, eq. 16), in max(fp32, input dtype).

    Experts are chosen by score and correction, within the `kept` of `groups` whose best two have the largest sums; their
    shares are scores, without the correction, times `factor`.
    """

    def __init__(
        self, hidden: int, experts: int, chosen: int, *, normalised: bool, groups: int, kept: int, factor: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.e_score_correction_bias = nn.Parameter(torch.empty(experts))
        self.chosen, self.normalised, self.groups, self.kept, self.factor = chosen, normalised, groups, kept, factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, h] to the shares of the chosen experts [n, chosen], in x's dtype, and which they are, int64."""
        wide = accumulation_dtype(x.dtype)
        scores = (x.to(wide) @ self.weight.to(wide).T).sigmoid()
        ranks = (scores.detach() + self.e_score_correction_bias.to(wide)).unflatten(-1, (self.groups, -1))
        if self.kept < self.groups:
            best = ranks.topk(2, -1).values.sum(-1)  # [n, groups]
            others = torch.ones_like(best, dtype=torch.bool).scatter(-1, best.topk(self.kept, -1).indices, value=False)
            ranks = ranks.masked_fill(others.unsqueeze(-1), -torch.inf)
        experts = chosen_experts(ranks.flatten(-2), self.chosen)
        shares = scores.gather(-1, experts)
        if self.normalised:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return (shares * self.factor).to(x.dtype), experts


class Expert(nn.Module):
    """One gated MLP."""

    def __init__(self, hidden: int, width: int, form: ExpertForm) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=form.biases)
        self.up_proj = nn.Linear(hidden, width, bias=form.biases)
        self.down_proj: nn.Module = nn.Linear(width, hidden, bias=form.biases)
        self.gated = GatedActivation(form)

    def inner(self, x: Tensor) -> Tensor:
        """x [n, h] to what the site in front of down_proj reads, [n, width]."""
        inner: Tensor = self.gated(self.gate_proj(x), self.up_proj(x))
        return inner

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
        # gpt-oss takes the softmax of the chosen logits alone, which is the same.
        normalised = config.model_type in ("mixtral", "gpt_oss", "minimax_m2") or config.norm_topk_prob
        count, hidden, width, form = expert_count(config), config.hidden_size, expert_width(config), expert_form(config)
        self.gate: nn.Module
        if config.model_type in SIGMOID_FAMILIES:
            how: dict[str, Any] = {"groups": 1, "kept": 1, "factor": 1.0}
            if config.model_type in GLM_LIKE:
                how = {"groups": config.n_group, "kept": config.topk_group, "factor": config.routed_scaling_factor}
            self.gate = SigmoidRouter(hidden, count, config.num_experts_per_tok, normalised=normalised, **how)
        else:
            self.gate = Router(hidden, count, config.num_experts_per_tok, normalised=normalised, bias=form.biases)
        self.input_site: nn.Module = nn.Identity()
        self.experts: Any
        if stacked:
            self.experts = StackedExperts(count, hidden, width, form)
        else:
            self.experts = ExpertList([Expert(hidden, width, form) for _ in range(count)])
        self.has_shared, self.has_share = shared_width(config) > 0, config.model_type == "qwen2_moe"
        if self.has_shared:
            self.shared_expert = Expert(hidden, shared_width(config), form)
        if self.has_shared and self.has_share:
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, T, h] to the same."""
        tokens = x.flatten(0, -2)
        shares, chosen = self.gate(tokens)
        inputs = self.input_site(tokens)
        out = self.experts(inputs, shares, chosen)
        if self.has_shared:
            shared = self.shared_expert(inputs)
            out = out + (self.shared_expert_gate(tokens).sigmoid() * shared if self.has_share else shared)
        return out.view_as(x)
