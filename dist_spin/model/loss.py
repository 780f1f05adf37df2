"""The loss at the end of the network, without ever holding the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 26  # fp32 logits that exist at a time (256 MiB); all of [T, vocab] never does


def cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross entropy of each sequence, computed in max(fp32, dtype).

    Args:
        hidden: final hidden states [batch, T, h]; differentiable. weight: frozen lm_head [vocab, h]. ids: [batch, T].

    Returns:
        [batch], fp32 (fp64 for fp64 input).
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, ids, hidden.requires_grad and torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean next-token cross entropy per sequence, in fp32, a chunk of tokens at a time.

    The head is frozen, so the gradient of the hidden states is formed in the forward pass from logits that are at hand
    anyway: neither logits nor head weight are needed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, needs_grad: bool) -> Tensor:
        batch, T, h = hidden.shape
        wide = torch.promote_types(hidden.dtype, torch.float32)
        flat, labels = hidden[:, :-1].reshape(-1, h), ids[:, 1:].reshape(-1)  # [tokens, h], [tokens]
        losses = torch.empty(len(flat), dtype=wide, device=hidden.device)
        d_flat = torch.empty_like(flat) if needs_grad else None
        step = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for lo in range(0, len(flat), step):
            part, label = flat[lo : lo + step], labels[lo : lo + step, None]
            logits = (part @ weight.T).to(wide)  # [chunk, vocab]
            log_z = logits.logsumexp(-1, keepdim=True)
            losses[lo : lo + step] = (log_z - logits.gather(-1, label))[:, 0]
            if d_flat is not None:
                d_logits = logits.sub_(log_z).exp_()  # softmax, in place
                d_logits.scatter_add_(-1, label, torch.full_like(label, -1, dtype=wide))
                d_flat[lo : lo + step] = d_logits.to(weight.dtype) @ weight
        if d_flat is not None:
            ctx.save_for_backward(d_flat)
        ctx.shape = hidden.shape
        return losses.view(batch, T - 1).mean(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (d_flat,) = ctx.saved_tensors
        batch, T, h = ctx.shape
        d_hidden = d_flat.new_zeros(batch, T, h)
        d_hidden[:, :-1] = d_flat.view(batch, T - 1, h) * (g / (T - 1)).to(d_flat.dtype)[:, None, None]
        return d_hidden, None, None, None
