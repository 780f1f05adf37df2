"""The moments of Adam (Kingma & Ba 2015), for whoever steps along them."""

from torch import Tensor

BETAS, EPS = (0.9, 0.95), 1e-12


def adam_moments(mean: Tensor, square: Tensor, gradient: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Take a gradient into the running moments, in place; their corrected values m and sqrt(v) + EPS, whose ratio is the step.

    Args:
        mean, square: running moments in the gradient's shape, zero before the first step. step: from 1.
    """
    mean.lerp_(gradient, 1 - BETAS[0])
    square.lerp_(gradient.square(), 1 - BETAS[1])
    return mean / (1 - BETAS[0] ** step), (square / (1 - BETAS[1] ** step)).sqrt() + EPS
