"""How hard activations are to quantise: per-token peak over RMS and kurtosis, and magnitudes pooled to a bounded size."""

import torch
from torch import Tensor

from dist_spin.numerics.dtypes import accumulation_dtype

SUMMARY = ("mean", "median", "p99", "max")  # what `summary` keeps of a distribution over tokens


def peak_over_rms(x: Tensor) -> Tensor:
    """max |x| / RMS of each token of x [..., n]: 1 for a flat token, sqrt(n) for a single spike; 0 for zeros. [...], fp32."""
    wide = x.to(accumulation_dtype(x.dtype))
    rms = wide.square().mean(-1).sqrt()
    return torch.where(rms > 0, wide.abs().amax(-1) / rms, 0.0).float()


def kurtosis(x: Tensor) -> Tensor:
    """Fourth standardised moment over the channels of each token of x [..., n]: 3 for a Gaussian, n for a single spike.

    Not the excess. 0 for a constant token. [...], fp32.
    """
    wide = x.double()  # fourth powers of massive activations
    squares = (wide - wide.mean(-1, keepdim=True)).square_()
    variance = squares.mean(-1)
    return torch.where(variance > 0, squares.square_().mean(-1) / variance.square(), 0.0).float()


def summary(figures: Tensor) -> Tensor:
    """Mean, median, 99th percentile and maximum of figures [n], fp32 [4] (`SUMMARY`)."""
    ordered = figures.flatten().sort().values  # torch.quantile refuses large inputs
    quantiles = [ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.99)]
    return torch.stack([ordered.double().mean().float(), *quantiles, ordered[-1]]).float()


def pooled(x: Tensor, rows: int, columns: int) -> Tensor:
    """|x| [T, n] reduced to at most rows x columns cells by the maximum in each, fp32: spikes stay visible at any size."""
    size = (min(rows, x.shape[0]), min(columns, x.shape[1]))
    return torch.nn.functional.adaptive_max_pool2d(x.abs().float()[None], size)[0]
