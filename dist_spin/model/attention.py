"""Our attention function in transformers' registries: its SDPA attention, behind the layer's quantiser of keys."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dist_spin"


def select_attention(config: Any) -> None:
    """Let models made from `config`, a transformers config, call our attention function; the config is changed."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # too, or padding and sliding windows are silently lost
    config._attn_implementation = NAME


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' SDPA attention with the layer's `key_site` applied to q and k (post-RoPE, before repeat_kv)."""
    site = getattr(module, "key_site", None)
    if site is not None:
        query, key = site(query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
