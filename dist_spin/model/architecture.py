"""Which module of a transformers model plays which role.

Every family in `families` shares Llama's module names; what differs (biases, q/k norms, sliding windows, an explicit head
size) is read from the modules and the config where it is needed.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dist_spin.model.attention import select_attention
from dist_spin.model.experts import SHARED, MixtureOfExperts, expert_count, expert_linears, expert_width, shared_width
from dist_spin.model.families import FAMILIES

LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class Shape:
    """The sizes that rotations and quantisers need, all in elements; experts: per layer, each `intermediate` wide, 0 for none.

    experts_per_token: how many of them compute a token. shared: width of the expert that all tokens compute, 0 for none.
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

    @staticmethod
    def of(config: Any) -> "Shape":
        """Read from a transformers config; an explicit `head_dim` wins over hidden / heads (Qwen3, Mistral-Nemo)."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
        )

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
            for layer in model.model.layers:
                layer.mlp = MixtureOfExperts(config, stacked=stacked_experts)
    return model.requires_grad_(requires_grad=False).eval()


def rotary(model: Any, device: torch.device) -> nn.Module:
    """The model's rotary embedding with its frequencies, which no checkpoint stores, computed on `device`."""
    with torch.device(device):
        return type(model.model.rotary_emb)(config=model.config)


def attention_masks(config: Any, hidden: torch.Tensor) -> list[torch.Tensor | None]:
    """The mask of each decoder layer for `hidden` [batch, T, h] without padding; None where plain causal attention holds.

    Sliding windows differ per family (`families.Family.windows`).
    """
    windows, window = FAMILIES[config.model_type].windows, getattr(config, "sliding_window", None)
    if windows == "by layer":
        kinds = config.layer_types
    else:  # whatever else the config says: transformers does not read it
        kinds = ["sliding_attention" if windows == "all" else "full_attention"] * config.num_hidden_layers
    sliding = None
    if window and hidden.shape[1] > window and "sliding_attention" in kinds:
        T = hidden.shape[1]
        distance = torch.arange(T, device=hidden.device)[:, None] - torch.arange(T, device=hidden.device)[None, :]
        sliding = ((distance >= 0) & (distance < window))[None, None]  # [1, 1, T, T]
    return [sliding if kind == "sliding_attention" else None for kind in kinds]
