"""The loss at the end of the network, without ever holding the logits of all tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_spin.model.scaling import NOT_SCALED, Scaling
from dist_spin.numerics.dtypes import accumulation_dtype

LOGITS_AT_ONCE = 1 << 26  # fp32 logits that exist at a time (256 MiB); all of [T, vocab] never does


def cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, scaling: Scaling = NOT_SCALED) -> Tensor:
    """Mean next-token cross entropy of each sequence, computed in max(fp32, dtype).

    Args:
        hidden: final hidden states [batch, T, h]; differentiable. weight: frozen lm_head [vocab, h]. ids: [batch, T].
        scaling: of the logits.

    Returns:
        [batch], fp32 (fp64 for fp64 input).
    """
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden, weight, ids, None, 0.0, needs_grad, scaling)


@dataclass(frozen=True)
class Targets:
    """What a teacher predicts at every position but the last: its k most probable next tokens, and all others together.

    log_p: natural log-probabilities [batch, T - 1, k], floating point. index: their tokens, int32 [batch, T - 1, k]. rest: the
    probability of all other tokens together, fp32 or fp64 [batch, T - 1].
    """

    log_p: Tensor
    index: Tensor
    rest: Tensor

    def chunk(self, here: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """log p [n, k] and the others' p [n] in `wide`, which sum to 1, and tokens int64 [n, k], of flattened positions."""
        log_p, rest = self.log_p.flatten(0, 1)[here].to(wide), self.rest.flatten()[here].to(wide)
        known = torch.log1p(-rest.clamp(max=1 - 1e-6))[:, None]  # of all k together, whatever rounding took from each
        log_p = log_p.log_softmax(-1) + known
        return log_p, rest, self.index.flatten(0, 1)[here].long()


@torch.no_grad()
def most_probable(hidden: Tensor, weight: Tensor, k: int, scaling: Scaling = NOT_SCALED) -> Targets:
    """The targets that a teacher gives, of final hidden states [batch, T, h] and lm_head [vocab, h].

    k: of tokens, at most vocab. scaling: of the logits. Log-probabilities come in fp16 where hidden states have 16 bits (their
    error is below that of the logits then), and else in max(fp32, dtype).
    """
    batch, T, h = hidden.shape
    wide = accumulation_dtype(hidden.dtype)
    flat = hidden[:, :-1].reshape(-1, h)
    parts = []
    for part in flat.split(max(1, LOGITS_AT_ONCE // weight.shape[0])):
        log_p = log_softmax(part, weight, wide, scaling)
        top, index = log_p.topk(k, -1)
        rest = log_p.exp_().scatter_(-1, index, 0.0).sum(-1)  # not 1 minus the others, which would be rounding alone
        parts.append((top.to(torch.float16 if hidden.dtype.itemsize == 2 else wide), index.int(), rest))
    top, index, rest = (torch.cat(column).unflatten(0, (batch, T - 1)) for column in zip(*parts, strict=True))
    return Targets(top, index, rest)


def sparse_distillation(
    hidden: Tensor, targets: Targets, weight: Tensor, ids: Tensor, share: float = 1.0, scaling: Scaling = NOT_SCALED
) -> Tensor:
    """As `distillation`, with a teacher of whom only the most probable tokens are known: no product with its head is needed.

    KL(teacher || student) over k + 1 outcomes, the k tokens and "another one", whose probabilities are the sums of all others.
    It is at most the divergence over the whole vocabulary, and that where k is the vocabulary.

    Args:
        hidden: final hidden states [batch, T, h], differentiable. weight: frozen lm_head [vocab, h]. ids: [batch, T].
        share: from above 0 to 1. scaling: of the logits.

    Returns:
        [batch], fp32 (fp64 for fp64 input).
    """
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden, weight, ids, targets, share, needs_grad, scaling)


def distillation(
    hidden: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor, share: float = 1.0, scaling: Scaling = NOT_SCALED
) -> Tensor:
    """share * KL(teacher || student) + (1 - share) * cross entropy of each sequence, means over tokens.

    Over the logits of the whole vocabulary (Hinton et al. 2015, at temperature 1); the teacher's head is the student's own.

    Args:
        hidden, teacher: final hidden states [batch, T, h], the student's differentiable. weight: frozen lm_head
            [vocab, h]. ids: [batch, T]. share: from above 0 to 1. scaling: of the logits.

    Returns:
        [batch], fp32 (fp64 for fp64 input).
    """
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden, weight, ids, teacher, share, needs_grad, scaling)


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
        teacher: Tensor | Targets | None,
        share: float,
        needs_grad: bool,  # noqa: FBT001 (autograd hands arguments on by position)
        scaling: Scaling,
    ) -> Tensor:
        batch, T, h = hidden.shape
        wide = accumulation_dtype(hidden.dtype)
        flat, labels = hidden[:, :-1].reshape(-1, h), ids[:, 1:].reshape(-1)  # [tokens, h], [tokens]
        whole = teacher[:, :-1].reshape(-1, h) if isinstance(teacher, Tensor) else None
        losses = torch.zeros(len(flat), dtype=wide, device=hidden.device)
        d_flat = torch.empty_like(flat) if needs_grad else None
        step = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for lo in range(0, len(flat), step):
            part, label = flat[lo : lo + step], labels[lo : lo + step, None]
            logits = scaling.logits_of((part @ weight.T).to(wide))  # [chunk, vocab]
            slope = scaling.slope(logits) if needs_grad else 1.0
            log_q = _normalised(logits)  # in place
            if share < 1:
                losses[lo : lo + step] -= (1 - share) * log_q.gather(-1, label)[:, 0]
            if isinstance(teacher, Targets):
                log_p, rest, index = teacher.chunk(slice(lo, lo + step), wide)
                found, d_logits = _sparse_divergence(log_q, log_p, rest, index, share)
                losses[lo : lo + step] += share * found
                if d_flat is not None:
                    if share < 1:
                        d_logits.scatter_add_(-1, label, torch.full_like(label, share - 1, dtype=wide))
                    if scaling != NOT_SCALED:
                        d_logits.mul_(slope)
                    d_flat[lo : lo + step] = d_logits.to(weight.dtype) @ weight
                continue
            p = None
            if whole is not None:
                log_p = log_softmax(whole[lo : lo + step], weight, wide, scaling)
                p = log_p.exp()
                losses[lo : lo + step] += share * torch.linalg.vecdot(p, log_p.sub_(log_q))
                del log_p
            if d_flat is not None:
                d_logits = log_q.exp_()  # in place
                if p is not None:
                    d_logits.sub_(p, alpha=share)
                if share < 1:
                    d_logits.scatter_add_(-1, label, torch.full_like(label, share - 1, dtype=wide))
                if scaling != NOT_SCALED:
                    d_logits.mul_(slope)
                d_flat[lo : lo + step] = d_logits.to(weight.dtype) @ weight
        if d_flat is not None:
            ctx.save_for_backward(d_flat)
        ctx.shape = hidden.shape
        return losses.view(batch, T - 1).mean(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (d_flat,) = ctx.saved_tensors
        batch, T, h = ctx.shape
        d_hidden = d_flat.new_zeros(batch, T, h)
        d_hidden[:, :-1] = d_flat.view(batch, T - 1, h) * (g / (T - 1)).to(d_flat.dtype)[:, None, None]
        return d_hidden, None, None, None, None, None, None


LEAST = 1e-30  # of a probability that is divided by


def _sparse_divergence(
    log_q: Tensor, log_p: Tensor, rest: Tensor, index: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """KL(p || q) [n] over tokens `index` [n, k] and all others together, and share * (its gradient) + (1 - share) * q.

    log_q: of the student [n, vocab], overwritten by the second result, the gradient with regard to its logits. log_p [n, k],
    rest [n]: of the teacher.
    """
    log_q_top, p = log_q.gather(-1, index), log_p.exp()
    q = log_q.exp_()  # in place
    q_top = q.gather(-1, index)
    q_rest = q.scatter_(-1, index, 0.0).sum(-1).clamp(min=LEAST)
    divergence = (p * (log_p - log_q_top)).sum(-1) + torch.xlogy(rest, rest / q_rest)
    # d/d logit_j: q_j - p_j for a known token; for another one q_j - rest * q_j / q_rest.
    q.mul_((1 - share * rest / q_rest)[:, None])
    return divergence, q.scatter_(-1, index, q_top - share * p)


def log_softmax(hidden: Tensor, weight: Tensor, wide: torch.dtype, scaling: Scaling = NOT_SCALED) -> Tensor:
    """log softmax of the logits of hidden W^T [tokens, vocab] in `wide`, in a buffer that may be overwritten."""
    return _normalised(scaling.logits_of((hidden @ weight.T).to(wide)))


def _normalised(logits: Tensor) -> Tensor:
    """log softmax, in place."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
