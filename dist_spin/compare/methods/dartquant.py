"""DartQuant (Shao et al. 2025): rotations that make activations uniform, learned from captured activations alone.

R1 and R2 minimise the whip loss, the mean over tokens of sum_i exp(-|x_i|), of rotated activations: it pushes the many small
values away from 0, which on the sphere takes from the few large ones. R is the orthogonal factor of QR(Z), and Z follows plain
gradient descent. R1 sees what all attention and MLP norms make of the residual stream (gains are folded into weights),
R2 of a layer what its o_proj reads, head by head.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dist_spin.compare.methods.base import Figures, Method, States
from dist_spin.compare.methods.transformed_layer import State
from dist_spin.model.layer_inputs import LayerTask, observe
from dist_spin.model.rotation import initial
from dist_spin.runtime.progress import Progress

R1_SITES = ("before attention", "before mlp")


class DartQuant(Method):
    """A state has R2 [d, d] of the layer, and SITE [n, tokens, h] of `R1_SITES`: the activations that R1 is learned from."""

    label = "DartQuant"
    settings_prefix = "dart_"
    depends_on_bits = False
    fits_rotations = True

    def learn_layer(self, task: LayerTask) -> tuple[State, Figures]:
        """Figures: the whip loss of R2 in the first and last epoch. Every sequence gives the same share of its tokens."""
        m, seed, eps = self.config.methods, self.config.quantize.seed, task.runner.config.rms_norm_eps
        n, length = task.hidden.shape[:2]
        start = initial("hadamard", self.shape, seed)[1][task.index]  # [d, d]
        generator = torch.Generator().manual_seed(seed)
        token_count = max(1, round(m.dart_share * length))
        tokens = torch.randperm(length, generator=generator)[:token_count].to(task.hidden.device)
        captured: dict[str, list[Tensor]] = {}

        def capture(site: str, x: Tensor) -> None:
            if site in R1_SITES:
                x = x / x.square().mean(-1, keepdim=True).add(eps).sqrt()
            if site in (*R1_SITES, "o"):
                captured.setdefault(site, []).append(x[:, tokens])

        observe(task, capture)
        heads = torch.cat(captured.pop("o")).unflatten(-1, (-1, len(start)))  # [n, tokens, heads, d]
        # The loss depends on the scale, which norms fix for R1 but nothing fixes for values: their mean square becomes 1.
        heads = heads / heads.square().mean().sqrt()

        def batches(epoch: int) -> Iterable[Tensor]:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
            return (heads[indices.to(heads.device)] for indices in order.split(m.dart_batch_size))

        r2, losses = fit(start.to(task.hidden), batches, m.dart_epochs, m.dart_lr)
        state = {site: torch.cat(parts).to(self.dtype) for site, parts in captured.items()}
        return state | {"R2": r2}, whip_figures(losses)

    def fit_rotations(self, states: States, *, show_progress: bool) -> tuple[Tensor, Tensor, Figures]:
        """R1 by the activations that all layers have captured, and the R2 of every layer."""
        m, seed = self.config.methods, self.config.quantize.seed
        start = initial("hadamard", self.shape, seed)[0].to(self.device, self.wide_dtype)
        progress = Progress(f"{self.label}: R1, epoch", m.dart_epochs, show=show_progress)

        def batches(epoch: int) -> Iterator[Tensor]:
            order = np.random.default_rng((seed, epoch)).permutation(self.shape.layers)
            for index in order.tolist():
                state = states(index)
                for site in R1_SITES:
                    yield from state[site].to(self.device).split(m.dart_batch_size)
            progress.advance()

        r1, losses = fit(start, batches, m.dart_epochs, m.dart_lr)
        r2 = torch.stack([states(index)["R2"] for index in range(self.shape.layers)])
        return r1, r2, whip_figures(losses)


def whip_figures(losses: list[float]) -> Figures:
    """The first and last of the mean whip losses of all epochs."""
    return {"first_whip": losses[0], "last_whip": losses[-1]}


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
    """Descend from the rotation `start` [n, n]; the rotation, in the dtype of `start`, and the mean loss of each epoch.

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
