"""A start for R1 from activations alone: a rotation under which a token's range is as small as it can be made.

A quantiser that spans each token's smallest and largest value has a step proportional to their distance, and uniform rounding
an error of step^2 / 12; rotations keep a token's length. So the mean square range of rotated activations is, but for a constant,
the expected relative rounding error. It is descended by Adam in the Lie algebra from a random Hadamard. (DartQuant's whip loss,
Shao et al. 2025, starts from the same captured activations, but weights all channels, where only the two extremes matter.)
"""

import math

import torch
from torch import Tensor

from dist_spin.methods.inputs import LayerTask, observe
from dist_spin.numerics.adam import adam_moments
from dist_spin.numerics.cayley import newton_schulz, retract_rows, tangent

R1_SITES = ("before attention", "before mlp")
ROWS = 1024  # activations of one step
STEPS = 300
ANGLE = 0.1  # radians by which the first step turns a channel (root mean square); falls to 0 along a cosine
REPROJECT_EVERY = 20


def square_range(x: Tensor) -> Tensor:
    """Mean over tokens of (max - min)^2, a scalar; x [..., n]."""
    return (x.amax(-1) - x.amin(-1)).square().mean()  # aminmax has no derivative in torch 2.11


def mean_square_range(rows: Tensor, rotation: Tensor) -> float:
    """`square_range` of rows [tokens, n], on any device in any dtype, in the basis of a rotation [n, n]."""
    parts = rows.split(ROWS)
    return sum(float(square_range(x.to(rotation) @ rotation)) * len(x) for x in parts) / len(rows)


def narrowed(start: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, float, float]:
    """A rotation near `start` under which rows have smaller ranges; and the mean square range before and after.

    start [n, n] in the dtype to compute in, on the device to compute on; rows [tokens, n], anywhere, in any dtype. Returns
    `start` itself where nothing was gained.
    """
    turned = start.mT.clone()  # R^T: a step on it turns the channels that the quantiser sees
    mean, square = torch.zeros_like(turned), torch.zeros_like(turned)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, STEPS + 1):
        x = rows[torch.randint(len(rows), (ROWS,), generator=generator).to(rows.device)].to(turned)
        y = (x @ turned.mT).requires_grad_()
        (gradient,) = torch.autograd.grad(square_range(y), y)
        m, root = adam_moments(mean, square, tangent(gradient.mT @ y.detach()), step)
        angle = ANGLE * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        turned = retract_rows(turned, m / root, angle / math.sqrt(len(turned)))
        if step % REPROJECT_EVERY == 0:
            turned = newton_schulz(turned)
    found = newton_schulz(turned.mT.double(), 3).to(start)  # from rounding to rounding of fp64
    before, after = (mean_square_range(rows, r) for r in (start, found))
    return (found, before, after) if after < before else (start, before, before)


def sample_rows(task: LayerTask, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """What R1 turns before a layer's quantisers, of `tokens` tokens, and the layer's outputs [n, T, h].

    The former is [2 tokens, h] on the CPU in the layer's dtype: the residual stream in front of both norms, of mean square 1,
    as the norms without their gains make it.
    """
    n, length = task.hidden.shape[:2]
    chosen = torch.randperm(n * length, generator=torch.Generator().manual_seed(seed))[:tokens].sort().values
    found: list[Tensor] = []
    seen = dict.fromkeys(R1_SITES, 0)  # tokens that came by

    def see(site: str, x: Tensor) -> None:
        if site in seen:
            flat, first = x.flatten(0, -2), seen[site]
            seen[site] = first + len(flat)
            mine = flat[(chosen[(chosen >= first) & (chosen < seen[site])] - first).to(flat.device)].float()
            found.append((mine / mine.square().mean(-1, keepdim=True).sqrt()).to(x.dtype).cpu())

    outputs = observe(task, see)
    return torch.cat(found), outputs
