"""The chunked loss is the plain one, value and gradient, whatever the chunk."""

import pytest
import torch

from dist_spin.model import loss


@pytest.mark.parametrize("at_once", [1, 97 * 5, 1 << 26])
def test_chunked_cross_entropy_equals_plain_autograd(at_once, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=g, dtype=torch.float64)
    weight = torch.randn(97, 16, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 97, (3, 11), generator=g)
    weights = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)
    chunked, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours = loss.cross_entropy(chunked, weight, ids)
    (ours * weights).sum().backward()
    logits = plain @ weight.T
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    theirs = each.view(3, -1).mean(-1)
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-10, atol=1e-14)
    assert not chunked.grad[2].any()


def two_models():
    """Final states of a student and a teacher [3, 11, 16], lm_head [97, 16], tokens [3, 11], a factor for each sequence [3]."""
    g = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 3, 11, 16, generator=g, dtype=torch.float64)
    weight = torch.randn(97, 16, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 97, (3, 11), generator=g)
    weights = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)
    return hidden, teacher, weight, ids, weights


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("at_once", [1, 97 * 5, 1 << 26])
def test_chunked_distillation_equals_plain_autograd(at_once, share, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    hidden, teacher, weight, ids, weights = two_models()
    chunked, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours = loss.distillation(chunked, teacher, weight, ids, share)
    (ours * weights).sum().backward()
    log_q, log_p = ((x @ weight.T)[:, :-1].log_softmax(-1) for x in (plain, teacher))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    entropy = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
    theirs = (share * divergence + (1 - share) * entropy).mean(-1)
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("k", "share"), [(97, 1.0), (97, 0.3), (5, 1.0), (5, 0.3)])
@pytest.mark.parametrize("at_once", [97 * 5, 1 << 26])
def test_distillation_from_the_most_probable_tokens_equals_plain_autograd(at_once, k, share, monkeypatch):
    """Over k tokens and all others as one; where k is the vocabulary, over the vocabulary."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    hidden, teacher, weight, ids, weights = two_models()
    chunked, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    targets = loss.most_probable(teacher, weight, k)
    ours = loss.sparse_distillation(chunked, targets, weight, ids, share)
    (ours * weights).sum().backward()
    q, p = ((x @ weight.T)[:, :-1].softmax(-1) for x in (plain, teacher))
    index = p.topk(k).indices
    entropy = -q.gather(-1, ids[:, 1:, None])[..., 0].log()
    divergence = (p * (p / q).log()).gather(-1, index).sum(-1)
    if k < 97:
        others = [x.scatter(-1, index, 0.0).sum(-1) for x in (p, q)]
        divergence = divergence + others[0] * (others[0] / others[1]).log()
    theirs = (share * divergence + (1 - share) * entropy).mean(-1)
    (theirs * weights).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-10, atol=1e-14)
    whole = loss.distillation(hidden, teacher, weight, ids, share)
    assert bool((ours <= whole + 1e-12).all())
    assert torch.allclose(ours, whole, rtol=1e-12) == (k == 97)


def test_stored_predictions_of_a_16_bit_teacher_cost_nothing_that_its_logits_do_not():
    g = torch.Generator().manual_seed(1)
    hidden, teacher = (x.bfloat16() for x in torch.randn(2, 2, 9, 16, generator=g))
    weight, ids = torch.randn(97, 16, generator=g).bfloat16(), torch.randint(0, 97, (2, 9), generator=g)
    targets = loss.most_probable(teacher, weight, 97)
    assert (targets.log_p.dtype, targets.index.dtype) == (torch.float16, torch.int32)
    stored = loss.sparse_distillation(hidden, targets, weight, ids)
    torch.testing.assert_close(stored, loss.distillation(hidden, teacher, weight, ids), rtol=1e-3, atol=0)


def test_measuring_builds_no_gradient():
    hidden = torch.randn(1, 5, 8)
    assert not loss.cross_entropy(hidden, torch.randn(20, 8), torch.tensor([[1, 2, 3, 4, 5]])).requires_grad
