"""DartQuant (Shao et al. 2025): rotations that make activations uniform, learned from captured activations alone.

R1 and R2 minimise the whip loss, the mean over tokens of sum_i exp(-|x_i|), of rotated activations: it pushes the many small
values away from 0, which on the sphere takes from the few large ones. R is the orthogonal factor of QR(Z) and Z follows plain
gradient descent. R1 sees what all attention and MLP norms make of the residual stream (gains are folded into weights),
R2 of a layer what its o_proj reads, head by head.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dist_spin.compare.methods.transformed_layer import State
from dist_spin.model.layer_inputs import LayerTask, observe

R1_SITES = ("before attention", "before mlp")


def whip(x: Tensor) -> Tensor:
    """Mean over tokens of sum_i exp(-|x_i|), a scalar; x [..., n]."""
    return torch.exp(-x.abs()).sum(-1).mean()


def orthogonal_factor(z: Tensor) -> Tensor:
    """Q of QR(z) with the diagonal of R positive, so that an orthogonal z is its own; differentiable. z [n, n]."""
    q, r = torch.linalg.qr(z)
    return q * torch.sign(r.diagonal())


def fit(
    start: Tensor, batches: Callable[[int], Iterable[Tensor]], epochs: int, rate: float
) -> tuple[Tensor, list[float]]:
    """Descend from the rotation `start` [n, n]; the rotation, in start's dtype, and the mean loss of each epoch.

    batches: of each epoch, activations [..., n], in any dtype and on any device.
    """
    z = start.clone().requires_grad_()
    means = []
    for epoch in range(epochs):
        losses = []
        for x in batches(epoch):
            loss = whip(x.to(z.device, z.dtype) @ orthogonal_factor(z))
            (gradient,) = torch.autograd.grad(loss, z)
            with torch.no_grad():
                z -= rate * gradient
            losses.append(loss.detach())
        means.append(float(torch.stack(losses).mean()))
    return orthogonal_factor(z).detach(), means


def learn_layer(
    task: LayerTask, start: Tensor, share: float, batch: int, epochs: int, rate: float, seed: int, stored: torch.dtype
) -> tuple[State, dict[str, float]]:
    """R2 of a layer, and the sampled activations that R1 will be learned from.

    start: R2 to begin with [d, d]. share: of each sequence's tokens that are kept. batch: sequences per step. stored: dtype of
    what is kept. Returns R2 [d, d] and SITE [n, tokens, h] of `R1_SITES`, with the whip loss of the first and last epoch.
    """
    n, length = task.hidden.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(length, generator=generator)[: max(1, round(share * length))].to(task.hidden.device)
    kept: dict[str, list[Tensor]] = {}

    def see(site: str, x: Tensor) -> None:
        if site in R1_SITES:
            x = x / x.square().mean(-1, keepdim=True).add(task.runner.config.rms_norm_eps).sqrt()
        if site in (*R1_SITES, "o"):
            kept.setdefault(site, []).append(x[:, some])

    observe(task, see)
    heads = torch.cat(kept.pop("o")).unflatten(-1, (-1, len(start)))  # [n, tokens, heads, d]
    # The loss knows a scale, which norms set for R1 but nothing for values: their mean square becomes 1.
    heads = heads / heads.square().mean().sqrt()

    def batches(epoch: int) -> Iterable[Tensor]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
        return (heads[chosen.to(heads.device)] for chosen in order.split(batch))

    r2, means = fit(start.to(task.hidden), batches, epochs, rate)
    state = {site: torch.cat(parts).to(stored) for site, parts in kept.items()}
    return state | {"R2": r2}, {"first_whip": means[0], "last_whip": means[-1]}
