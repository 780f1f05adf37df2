"""Which module of a transformers model plays which role, as data: one entry per family, and an error for the rest.

Every family listed shares Llama's module names; what differs (biases, q/k norms, sliding windows, an explicit head size)
is read from the modules and the config where it is needed, so that a family is added here or nowhere.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dist_spin.errors import UserError

# Families checked to be pre-norm RMSNorm decoders with Llama's roles and a gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

# Why a family that people ask for is refused; anything else is simply unknown.
_EXPERTS = "mixture-of-experts routing, whose experts have no roles here"
_OUTPUT_NORMS = "norms on the outputs of attention and MLP, which a rotation of the residual stream does not pass"
_LAYER_NORM = "LayerNorm, whose mean does not pass a rotation of the residual stream"
_FUSED = "q, k, v and gate, up fused into one projection each, which have no roles here"
_WRAPPER = "a vision or audio model around its language model; only the language model alone is read"
REFUSED = {
    "gemma": "norm gains stored as 1 + w and a scaled embedding, which folding does not know",
    "gemma2": _OUTPUT_NORMS,
    "gemma3": _WRAPPER,
    "gemma3_text": _OUTPUT_NORMS,
    "olmo2": _OUTPUT_NORMS,
    "olmo3": _OUTPUT_NORMS,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "llama4": _EXPERTS,
    "phi3": _FUSED,
    "gpt2": _LAYER_NORM,
    "gpt_neox": _LAYER_NORM,
    "falcon": _LAYER_NORM,
    "cohere": _LAYER_NORM,
    "granite": "multipliers on the embedding, residual and logits, which folding does not know",
    "mistral3": _WRAPPER,
    "mllama": _WRAPPER,
    "qwen2_5_vl": _WRAPPER,
}

LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ATTENTION = "dist_spin"  # the name of our attention function in transformers' registry (model/sites.py registers it)
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class Shape:
    """The sizes that rotations and quantisers need, all in elements."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    @staticmethod
    def of(config: Any) -> "Shape":
        """Read from a transformers config; an explicit `head_dim` wins over hidden / heads (Qwen3, Mistral-Nemo)."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Shape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
        )


def check_supported(config: Any) -> None:
    """Refuse a family whose function rotations would change.

    Raises:
        UserError: names the architecture and what is missing for it.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        why = REFUSED.get(kind, "no entry says which of its modules are the norms, projections and residual writes")
        raise UserError(f"architecture '{kind}' is not supported: {why}", f"use one of {', '.join(FAMILIES)}")


def layer_name(index: int) -> str:
    """Checkpoint name of decoder layer `index`."""
    return f"model.layers.{index}"


def skeleton(config: Any) -> Any:
    """The family's own causal language model on the meta device, untied, with our attention function selected.

    An nn.Module, typed as Any because its attributes are the family's own.
    Weights, norms and buffers hold no numbers yet; `config` is copied, not changed.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False  # rotation folds the final norm into lm_head alone
    config.use_cache = False
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False).eval()


def rotary(model: Any, device: torch.device) -> nn.Module:
    """The model's rotary embedding with its frequencies, which no checkpoint stores, computed on `device`."""
    with torch.device(device):
        return type(model.model.rotary_emb)(config=model.config)


def attention_masks(config: Any, hidden: torch.Tensor) -> list[torch.Tensor | None]:
    """The mask of each decoder layer for `hidden` [batch, T, h] without padding; None where plain causal attention holds.

    Sliding windows differ per family: Mistral has one setting for all layers, the Qwen families and SmolLM3 a type per layer.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    sliding = None
    if window and hidden.shape[1] > window and "sliding_attention" in kinds:
        T = hidden.shape[1]
        distance = torch.arange(T, device=hidden.device)[:, None] - torch.arange(T, device=hidden.device)[None, :]
        sliding = ((distance >= 0) & (distance < window))[None, None]  # [1, 1, T, T]
    return [sliding if kind == "sliding_attention" else None for kind in kinds]
