"""Tune a decoder layer after its weights were rounded: which way they round, and the scales of their rows.

GPTQ minimises each linear's own error. Here the whole fake-quantised layer learns to give what the full-precision network
gives at this depth, from the inputs that it meets in the quantised network, so that it also makes up for the layers before it
(block-wise training of all parameters, Chen et al. 2024, EfficientQAT; reconstruction of blocks, Li et al. 2021, BRECQ).
Nothing is added at run time: codes and scales stay codes and scales.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.data import batch_indices
from dist_spin.errors import NumericsError
from dist_spin.methods.training import Stepper
from dist_spin.model.layers import LayerRunner
from dist_spin.numerics.gptq import Solution
from dist_spin.numerics.quantizer import code_range

BATCH = 4  # sequences of a step
SCALE_RATE = 0.1  # of the rate of weights: a scale moves all weights of its row


@dataclass(frozen=True)
class Tuning:
    """How long and how fast.

    rate: of weights in steps of their grid, falling to 0 along a cosine. sequences: of the rank that has most, so that
    all make the same number of steps.
    """

    epochs: int
    rate: float
    seed: int
    sequences: int


class _Round(torch.autograd.Function):
    """(clamp(round(v / t) + zero) - zero) * (t * step) for weights v in grid steps, and rows' factors t of their scales.

    Rounding is straight-through; t's gradient is that of a learned step size (Esser et al. 2020, LSQ, eq. 3).
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, t: Tensor, step: Tensor, zero: Tensor, bounds: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(v, t, step, zero)
        ctx.bounds = bounds
        return ((torch.round(v / t) + zero).clamp_(*bounds).sub_(zero) * (t * step)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        v, t, step, zero = ctx.saved_tensors
        g = grad_outputs[0].to(v.dtype) * step
        rounded = torch.round(v / t)
        codes = rounded + zero
        inside = (codes >= ctx.bounds[0]) & (codes <= ctx.bounds[1])
        per_step = torch.where(inside, rounded - v / t, codes.clamp(*ctx.bounds) - zero)
        return g * inside, (g * per_step).sum(-1, keepdim=True), None, None, None, None


class RoundedWeights(nn.Module):
    """Weights in steps of their grids (v [out, groups, group]) and the factors of their scales (t [out, groups, 1])."""

    def __init__(self, solutions: dict[str, Solution], bits: dict[str, int], symmetric: bool) -> None:
        """Weights begin in the middle of the cells that `solutions`, by linear, chose."""
        super().__init__()
        self.roles, self.bounds = list(solutions), {role: code_range(bits[role], symmetric) for role in solutions}
        self.solutions = solutions
        self.v, self.t = nn.ParameterList(), nn.ParameterList()
        for codes, scale, zero in solutions.values():
            middle = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype) - zero.unsqueeze(-1)
            self.v.append(nn.Parameter(middle))
            self.t.append(nn.Parameter(torch.ones_like(scale.unsqueeze(-1))))

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The rounded weights [out, in] as a function of the parameters."""
        out = {}
        for role, v, t in zip(self.roles, self.v, self.t, strict=True):
            _, scale, zero = self.solutions[role]
            q = _Round.apply(v, t, scale.unsqueeze(-1), zero.unsqueeze(-1), self.bounds[role], dtype)
            out[role] = q.flatten(1)
        return out

    @torch.no_grad()
    def solution(self, role: str) -> Solution:
        """Codes and scales of one linear as they are now."""
        i = self.roles.index(role)
        codes, scale, zero = self.solutions[role]
        found = (torch.round(self.v[i] / self.t[i]) + zero.unsqueeze(-1)).clamp_(*self.bounds[role])
        return Solution(found.flatten(1).to(codes.dtype), scale * self.t[i].squeeze(-1), zero)


def tune(
    runner: LayerRunner,
    index: int,
    others: dict[str, Tensor],
    rounded: RoundedWeights,
    hidden: list[Tensor],
    targets: list[Tensor],
    tuning: Tuning,
    reduce: Callable[[list[Tensor]], None] | None = None,
) -> dict[str, float]:
    """Fit `rounded` so that layer `index` gives `targets`; returns the error of the first and last epoch.

    others: the layer's parameters that are not rounded. hidden, targets: sequences [1, T, h] that enter the layer and that
    leave it in the full-precision network. reduce: makes a mean over ranks of gradients (and of the errors) in place.
    The error is half the squared one relative to the target per token, since what reads a token normalises it, and half that
    of all tokens together, which the few with huge activations decide: all others attend to them.

    Raises:
        NumericsError: the error is not finite.
    """
    start = {f"{role}.weight": w.detach() for role, w in rounded.weights(runner.dtype).items()}
    layer = runner.build(index, {**others, **start})
    names = {role: _parameter_name(layer, role) for role in rounded.roles}
    batch = min(BATCH, tuning.sequences)
    context = {"use_cache": False, **runner.context(index, hidden[0].expand(batch, -1, -1))}

    def error(x: Tensor, y: Tensor) -> Tensor:
        weights = {names[role]: w for role, w in rounded.weights(runner.dtype).items()}
        z, y = torch.func.functional_call(layer, weights, (x,), context).float(), y.float()
        off, power = (z - y).square().sum(-1), y.square().sum(-1)
        return ((off / power).mean() + off.sum() / power.sum()) / 2

    stepper = Stepper(error, [(list(rounded.v), 1.0), (list(rounded.t), SCALE_RATE)], runner.device, reduce)
    per_epoch = -(-tuning.sequences // batch)
    steps = tuning.epochs * per_epoch
    errors = torch.zeros(tuning.epochs, device=runner.device)
    for step in range(steps):
        chosen = batch_indices(step, batch, len(hidden), tuning.seed)
        x, y = (torch.cat([tensors[i] for i in chosen]) for tensors in (hidden, targets))
        rate = tuning.rate * (1 + math.cos(math.pi * step / steps)) / 2
        errors[step // per_epoch] += stepper.step(x, y, rate) / per_epoch
    if reduce is not None:
        reduce([errors])
    first, last = float(errors[0]), float(errors[-1])
    if not math.isfinite(last):
        raise NumericsError(f"layer {index}: the error is {last} while it is tuned", "lower quantize.tune_lr")
    return {"first_epoch": first, "last_epoch": last}


def _parameter_name(layer: nn.Module, role: str) -> str:
    fronted = hasattr(layer.get_submodule(role), "linear")
    return f"{role}.linear.weight" if fronted else f"{role}.weight"
