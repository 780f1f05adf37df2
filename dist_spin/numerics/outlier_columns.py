"""Rounding a weight but for a few columns that stay exact (Ashkboos et al. 2023, QUIK).

GPTQ takes the exact columns last, so that they make up for every other column's rounding. That is the same as rounding the others
against the Schur complement of the exact ones in the Hessian, and then moving the exact ones to where the error is least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dist_spin.numerics.gptq import exact_products


class Condensed(NamedTuple):
    """What `condense` makes of a Hessian."""

    hessian: Tensor  # [in, in], the others' Schur complement; rows and columns of exact ones are 0, as of dead inputs
    carry: Tensor  # [in, exact]: what a unit of error in each column adds to the exact ones; 0 in their own rows


def condense(hessian: Tensor, exact: Tensor, percdamp: float) -> Condensed:
    """Take the columns `exact` [n] (distinct indices) out of a Hessian [in, in], fp32 or fp64.

    percdamp: times the mean diagonal, added to the exact columns' part before it is inverted.
    """
    damping = percdamp * hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    inner = hessian[exact][:, exact]
    inner.diagonal().add_(damping)
    with exact_products():
        carry = torch.linalg.solve(inner, hessian[exact]).T.contiguous()  # [in, exact]
        complement = hessian - carry @ hessian[exact]
    complement = (complement + complement.T) / 2
    complement[exact] = 0
    complement[:, exact] = 0
    carry[exact] = 0
    return Condensed(complement, carry)
