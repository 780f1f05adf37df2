"""Our attention function in transformers' registries: its SDPA attention, behind the layer's quantiser of keys."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_spin.numerics.dtypes import accumulation_dtype

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
    if cap := kwargs.get("softcap"):
        return _capped(query, key, value, attention_mask, kwargs["scaling"], cap), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, cap: float) -> Tensor:
    """Attention whose scores are cap tanh(scores / cap), as Gemma 2 has it and SDPA has not.

    query [batch, heads, T, d], key and value [batch, kv_heads, S, d], mask [batch or 1, 1, T, S], bool or added to the scores,
    None for causal. Returns [batch, T, heads, d].
    """
    groups, (T, S) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT).to(accumulation_dtype(query.dtype)) * scaling
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).contiguous()
