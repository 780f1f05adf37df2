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


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("at_once", [1, 97 * 5, 1 << 26])
def test_chunked_distillation_equals_plain_autograd(at_once, share, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 3, 11, 16, generator=g, dtype=torch.float64)
    weight = torch.randn(97, 16, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 97, (3, 11), generator=g)
    weights = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64)
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


def test_measuring_builds_no_gradient():
    hidden = torch.randn(1, 5, 8)
    assert not loss.cross_entropy(hidden, torch.randn(20, 8), torch.tensor([[1, 2, 3, 4, 5]])).requires_grad
