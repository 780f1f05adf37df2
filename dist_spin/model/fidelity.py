"""How far a model's predictions are from another's, token by token, without ever holding the logits of all tokens."""

import torch
from torch import Tensor

from dist_spin.model import loss
from dist_spin.model.rotated_weights import Head
from dist_spin.numerics.dtypes import accumulation_dtype


@torch.no_grad()
def compare_predictions(
    head: Head, hidden: Tensor, teacher_head: Head, teacher: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of a model, and how its next-token distribution q differs from the distribution p of a teacher.

    Over the tokens that the cross entropy counts: the last position of a sequence predicts nothing of it. Logits come in the
    dtype of the hidden states, everything after them in max(fp32, dtype), `loss.LOGITS_AT_ONCE` at a time.

    Args:
        head, teacher_head: final norm and lm_head of both models, over one vocabulary.
        hidden, teacher: what enters these, [batch, T, h] each. ids: the tokens [batch, T].

    Returns:
        Mean cross entropy of each sequence [batch], the same bits as `Head.loss`; KL(p || q) = sum p (log p - log q) in nats
        [batch, T - 1]; whether both models find the same token most probable, bool [batch, T - 1].
    """
    batch, T, _ = hidden.shape
    wide = accumulation_dtype(hidden.dtype)
    q_in, p_in = (own.norm(x)[:, :-1].flatten(0, 1) for own, x in ((head, hidden), (teacher_head, teacher)))
    labels = ids[:, 1:].reshape(-1, 1)
    losses = torch.zeros(len(q_in), dtype=wide, device=hidden.device)
    kl, same = torch.zeros_like(losses), torch.zeros_like(losses, dtype=torch.bool)
    step = max(1, loss.LOGITS_AT_ONCE // len(head.weight))
    for lo in range(0, len(q_in), step):
        here = slice(lo, lo + step)
        log_q = loss.log_softmax(q_in[here], head.weight, wide, head.scaling)  # [chunk, vocab]
        log_p = loss.log_softmax(p_in[here], teacher_head.weight, wide, teacher_head.scaling)
        losses[here] -= log_q.gather(-1, labels[here])[:, 0]
        same[here] = log_p.argmax(-1) == log_q.argmax(-1)
        kl[here] = torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_q))
    return losses.view(batch, T - 1).mean(-1), kl.view(batch, T - 1), same.view(batch, T - 1)
