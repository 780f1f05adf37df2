"""The loss at the end of the network, without ever holding the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor

from dist_spin.numerics.dtypes import accumulation_dtype

LOGITS_AT_ONCE = 1 << 26  # fp32 logits that exist at a time (256 MiB); all of [T, vocab] never does


def cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross entropy of each sequence, computed in max(fp32, dtype).

    Args:
        hidden: final hidden states [batch, T, h]; differentiable. weight: frozen lm_head [vocab, h]. ids: [batch, T].

    Returns:
        [batch], fp32 (fp64 for fp64 input).
    """
    return _ChunkedLoss.apply(hidden, weight, ids, None, 0.0, hidden.requires_grad and torch.is_grad_enabled())


def distillation(hidden: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor, share: float = 1.0) -> Tensor:
    """share * KL(teacher || student) + (1 - share) * cross entropy of each sequence, means over tokens.

    Over the logits of the whole vocabulary (Hinton et al. 2015, at temperature 1): the teacher's head is the student's own
    and has to be applied in any case, so that keeping its k largest logits alone would save nothing but a softmax.

    Args:
        hidden, teacher: final hidden states [batch, T, h], the student's differentiable. weight: frozen lm_head
            [vocab, h]. ids: [batch, T]. share: from above 0 to 1.

    Returns:
        [batch], fp32 (fp64 for fp64 input).
    """
    return _ChunkedLoss.apply(hidden, weight, ids, teacher, share, hidden.requires_grad and torch.is_grad_enabled())


class _ChunkedLoss(torch.autograd.Function):
    """Cross entropy, KL divergence from a teacher or a mixture, per sequence, in fp32, a chunk of tokens at a time.

    The head is frozen, so the gradient of the hidden states is formed in the forward pass from logits that are at hand
    anyway: neither logits nor head weight are needed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        teacher: Tensor | None,
        share: float,
        needs_grad: bool,  # noqa: FBT001 (autograd hands arguments on by position)
    ) -> Tensor:
        batch, T, h = hidden.shape
        wide = accumulation_dtype(hidden.dtype)
        flat, labels = hidden[:, :-1].reshape(-1, h), ids[:, 1:].reshape(-1)  # [tokens, h], [tokens]
        target = None if teacher is None else teacher[:, :-1].reshape(-1, h)
        losses = torch.zeros(len(flat), dtype=wide, device=hidden.device)
        d_flat = torch.empty_like(flat) if needs_grad else None
        step = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for lo in range(0, len(flat), step):
            part, label = flat[lo : lo + step], labels[lo : lo + step, None]
            log_q = log_softmax(part, weight, wide)  # [chunk, vocab]
            if share < 1:
                losses[lo : lo + step] -= (1 - share) * log_q.gather(-1, label)[:, 0]
            p = None
            if target is not None:
                log_p = log_softmax(target[lo : lo + step], weight, wide)
                p = log_p.exp()
                losses[lo : lo + step] += share * torch.linalg.vecdot(p, log_p.sub_(log_q))
                del log_p
            if d_flat is not None:
                d_logits = log_q.exp_()  # in place
                if p is not None:
                    d_logits.sub_(p, alpha=share)
                if share < 1:
                    d_logits.scatter_add_(-1, label, torch.full_like(label, share - 1, dtype=wide))
                d_flat[lo : lo + step] = d_logits.to(weight.dtype) @ weight
        if d_flat is not None:
            ctx.save_for_backward(d_flat)
        ctx.shape = hidden.shape
        return losses.view(batch, T - 1).mean(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (d_flat,) = ctx.saved_tensors
        batch, T, h = ctx.shape
        d_hidden = d_flat.new_zeros(batch, T, h)
        d_hidden[:, :-1] = d_flat.view(batch, T - 1, h) * (g / (T - 1)).to(d_flat.dtype)[:, None, None]
        return d_hidden, None, None, None, None, None


def log_softmax(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """log softmax(hidden W^T) [tokens, vocab] in `wide`, in a buffer that may be overwritten."""
    logits = (hidden @ weight.T).to(wide)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
