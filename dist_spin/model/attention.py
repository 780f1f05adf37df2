"""Our attention function in transformers' registries: its SDPA attention, behind the layer's quantiser of keys."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_spin.numerics.dtypes import accumulation_dtype

NAME = "dist_spin"
SINKS = (
    "self_attn.sinks"  # name within a layer of the logits [heads] that take their share of attention without a value
)


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
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if cap or sinks is not None:
        return _by_scores(query, key, value, attention_mask, kwargs["scaling"], cap, sinks), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what SDPA has not: scores cap tanh(scores / cap), as in Gemma 2, or sinks, as in gpt-oss.

    query [batch, heads, T, d], key and value [batch, kv_heads, S, d], mask [batch or 1, 1, T, S], bool or added to the scores,
    None for causal. sinks [heads]: the score of one more key, whose value is zero. Returns [batch, T, heads, d].
    """
    groups, (T, S) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT).to(accumulation_dtype(query.dtype)) * scaling
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    shares = scores.softmax(-1)[..., :S]
    return (shares.to(value.dtype) @ value).transpose(1, 2).contiguous()
