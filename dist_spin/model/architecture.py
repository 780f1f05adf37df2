"""Which module of a transformers model plays which role.

Every family in `families` shares Llama's module names; what differs (biases, q/k norms, sliding windows, an explicit head
size) is read from the modules and the config where it is needed.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dist_spin.model.attention import select_attention
from dist_spin.model.experts import (
    SHARED,
    MixtureOfExperts,
    dense_layers,
    expert_count,
    expert_linears,
    expert_width,
    shared_width,
)
from dist_spin.model.families import FAMILIES, Family
from dist_spin.model.output_norms import ATTENTION_NORM as ATTENTION_NORM
from dist_spin.model.output_norms import MLP_NORM as MLP_NORM
from dist_spin.model.output_norms import OutputNormLayer
from dist_spin.model.scaling import NOT_SCALED, Scaling

LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class Shape:
    """The sizes that rotations and quantisers need, all in elements; experts: per layer, each `intermediate` wide, 0 for none.

    experts_per_token: how many of them compute a token. shared: width of the expert that all tokens compute, 0 for none.
    dense: how many layers, the first ones, have in place of experts an MLP `dense_width` wide; what is said of a layer
    otherwise is said of the others (see `layer`). scaling: of embeddings and logits. norm: kind of the norms
    (`families.Family`). unscaled: names of `scales_and_clips.scale_shapes` that cannot be merged: "up" where a limit stands
    between up_proj and down_proj (gpt-oss), or where the layers differ, and "key" where half of a head is turned.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    shared: int = 0
    scaling: Scaling = NOT_SCALED
    norm: str = "rms"
    dense: int = 0
    dense_width: int = 0
    unscaled: tuple[str, ...] = ()

    @staticmethod
    def of(config: Any) -> "Shape":
        """Read from a transformers config; an explicit `head_dim` wins over hidden / heads (Qwen3, Mistral-Nemo)."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        family = FAMILIES.get(config.model_type, Family(""))
        return Shape(
            hidden=config.hidden_size,
            intermediate=expert_width(config) if expert_count(config) else config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
            experts=expert_count(config),
            experts_per_token=config.num_experts_per_tok if expert_count(config) else 0,
            shared=shared_width(config),
            scaling=Scaling.of(config),
            norm=family.norm,
            dense=dense_layers(config),
            dense_width=config.intermediate_size if dense_layers(config) else 0,
            unscaled=family.unscaled,
        )

    def layer(self, index: int) -> "Shape":
        """The sizes of decoder layer `index`, which differ where the first layers have no experts."""
        if index >= self.dense:
            return self
        wide = self.dense_width
        return dataclasses.replace(
            self, intermediate=wide, experts=0, experts_per_token=0, shared=0, dense=0, dense_width=0
        )

    def mean(self, of: Callable[["Shape"], float]) -> float:
        """The mean over all decoder layers of what `of` says of the sizes of one."""
        dense = min(self.dense, self.layers)
        return (dense * of(self.layer(0)) + (self.layers - dense) * of(self)) / self.layers if dense else of(self)

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a decoder layer whose weights are quantised, by their names within it."""
        return (*LAYER_LINEARS[:4], *expert_linears(self.experts, self.shared)) if self.experts else LAYER_LINEARS

    def of_mlp(self, linear: str) -> list[str]:
        """Where in a decoder layer a linear of the MLP stands ("down_proj"): once, or in every expert, the shared one last."""
        if not self.experts:
            return [f"mlp.{linear}"]
        shared = [f"{SHARED}.{linear}"] if self.shared else []
        return [*(f"mlp.experts.{e}.{linear}" for e in range(self.experts)), *shared]

    @property
    def weights(self) -> int:
        """Weights of the linears of a layer that are quantised."""
        return sum(inputs * outputs * count for inputs, outputs, count, _ in self.products)

    @property
    def active_weights(self) -> float:
        """Those of them that a token meets."""
        return sum(inputs * outputs * count * share for inputs, outputs, count, share in self.products)

    @property
    def mlp_width(self) -> int:
        """Channels between up_proj and down_proj that a token computes in a layer."""
        return self.intermediate * max(1, self.experts_per_token) + self.shared

    @property
    def products(self) -> list[tuple[int, int, int, float]]:
        """Products of a layer: inputs, outputs, how many there are of that size, the share of tokens that each of them reads."""
        h, q, kv, i = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        count, share = max(1, self.experts), self.experts_per_token / self.experts if self.experts else 1.0
        found = [(h, q + 2 * kv, 1, 1.0), (q, h, 1, 1.0), (h, 2 * i, count, share), (i, h, count, share)]
        return found + ([(h, 2 * self.shared, 1, 1.0), (self.shared, h, 1, 1.0)] if self.shared else [])

    @property
    def up_scales(self) -> tuple[int, ...]:
        """The shape of the learned scales of up_proj's rows; those of a shared expert stand as those of further experts."""
        if not self.experts:
            return (self.intermediate,)
        return self.experts + self.shared // self.intermediate, self.intermediate


def norm_eps(config: Any) -> float:
    """What the norms of a model add to the mean square, by either of the names that families give it."""
    return float(config.layer_norm_eps if FAMILIES[config.model_type].norm == "layer" else config.rms_norm_eps)


def layer_name(index: int) -> str:
    """Checkpoint name of decoder layer `index`."""
    return f"model.layers.{index}"


def skeleton(config: Any, *, stacked_experts: bool = False) -> Any:
    """The family's own causal language model on the meta device, untied, with our attention function selected.

    An nn.Module, typed as Any because its attributes are the family's own.
    Weights, norms and buffers hold no numbers yet; `config` is copied, not changed. stacked_experts: see `MixtureOfExperts`.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False  # rotation folds the final norm into lm_head alone
    config.use_cache = False
    select_attention(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if expert_count(config):
            for layer in model.model.layers[dense_layers(config) :]:
                layer.mlp = MixtureOfExperts(config, stacked=stacked_experts)
        # gpt-oss's layers expect an MLP that also returns the shares of its experts.
        if (norms := FAMILIES[config.model_type].norms) != "before" or config.model_type == "gpt_oss":
            model.model.layers = nn.ModuleList([OutputNormLayer(layer, norms) for layer in model.model.layers])
    return model.requires_grad_(requires_grad=False).eval()


def rotary(model: Any, device: torch.device) -> nn.Module:
    """The model's rotary embedding with its frequencies, which no checkpoint stores, computed on `device`."""
    with torch.device(device):
        return type(model.model.rotary_emb)(config=model.config)


def position_kinds(config: Any) -> list[str]:
    """The kind of each decoder layer whose position embedding it has; "" where one is for all layers."""
    by_kind = any(isinstance(values, dict) for values in (config.rope_parameters or {}).values())
    return list(config.layer_types) if by_kind else [""] * config.num_hidden_layers


def position_embeddings(rotary: nn.Module, kind: str, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, d] for hidden states [batch, T, h], of layers of one of `position_kinds`."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    embeddings: tuple[torch.Tensor, torch.Tensor] = rotary(hidden, positions, *((kind,) if kind else ()))
    return embeddings


def layer_kinds(config: Any) -> list[str]:
    """What each decoder layer attends to: "sliding_attention" or "full_attention" (`families.Family.windows`)."""
    windows = FAMILIES[config.model_type].windows
    if windows == "by layer":
        return list(config.layer_types)
    # whatever else the config says: transformers does not read it
    return ["sliding_attention" if windows == "all" else "full_attention"] * config.num_hidden_layers


def attention_masks(config: Any, hidden: torch.Tensor) -> list[torch.Tensor | None]:
    """The mask of each decoder layer for `hidden` [batch, T, h] without padding; None where plain causal attention holds.

    Sliding windows differ per family: see `layer_kinds`.
    """
    window, kinds = getattr(config, "sliding_window", None), layer_kinds(config)
    sliding = None
    if window and hidden.shape[1] > window and "sliding_attention" in kinds:
        T = hidden.shape[1]
        distance = torch.arange(T, device=hidden.device)[:, None] - torch.arange(T, device=hidden.device)[None, :]
        sliding = ((distance >= 0) & (distance < window))[None, None]  # [1, 1, T, T]
    return [sliding if kind == "sliding_attention" else None for kind in kinds]
