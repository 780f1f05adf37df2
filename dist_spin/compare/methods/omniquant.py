"""OmniQuant (Shao et al. 2024) and AffineQuant (Ma et al. 2024) as special cases of transformed layers.

OmniQuant learns the clipping of weights, a scale and a shift per channel where a norm feeds linears, and a scale per channel from
v_proj to o_proj. AffineQuant puts a whole matrix there instead of the scale, kept strictly diagonally dominant and therefore
invertible, whose band grows from the diagonal outwards. Scales and matrices merge into weights; the shift stays at run time.
"""

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.layer_training import Schedule, WeightClips, learn
from dist_spin.compare.methods.smoothquant import smoothing
from dist_spin.compare.methods.transformed_layer import INVERSE, State
from dist_spin.model.layer_inputs import READERS, LayerTask, maxima, weight_maxima
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import GPTQOptions

START_ALPHA = 0.5  # strength of the smoothing that scales start from
DOMINANCE = 0.9  # what a row's other entries may add up to, as a share of its diagonal entry


class OmniParameters(nn.Module):
    """A layer's scales, shifts and weight clips; with `affine`, a matrix for values."""

    def __init__(
        self,
        scales: dict[str, Tensor],
        head_dim: int,
        weights: dict[str, Tensor],
        options: dict[str, GPTQOptions],
        affine: bool,
    ) -> None:
        """scales: starting channel scales of attention and mlp. weights: the layer's, as stored."""
        super().__init__()
        like = scales["attention"]
        self.log_scales = nn.ParameterDict({site: nn.Parameter(scale.log()) for site, scale in scales.items()})
        self.shifts = nn.ParameterDict({site: nn.Parameter(torch.zeros_like(scale)) for site, scale in scales.items()})
        self.log_values = nn.Parameter(like.new_zeros(head_dim))
        self.beside = nn.Parameter(like.new_zeros(head_dim, head_dim)) if affine else None
        position = torch.arange(head_dim, device=like.device)
        self.distance = (position[:, None] - position[None, :]).abs()  # from the diagonal
        self.band = torch.zeros((), dtype=torch.long, device=like.device)  # in place, so that a recorded step sees it
        self.weight_clips = WeightClips(weights, options, like)

    def state(self) -> State:
        """See `methods.training.Parameters`."""
        out: State = {f"{site}.scale": log.exp() for site, log in self.log_scales.items()}
        out |= {f"{site}.shift": shift + 0 for site, shift in self.shifts.items()}
        values = self.log_values.exp()
        if self.beside is None:
            out["value.left"], out["value.left" + INVERSE] = torch.diag(values), torch.diag(1 / values)
        else:
            off = torch.where((self.distance > 0) & (self.distance <= self.band), self.beside, 0)
            off = DOMINANCE * off / off.abs().sum(-1, keepdim=True).clamp(min=1)
            matrix = values[:, None] * (torch.eye(len(values), dtype=off.dtype, device=off.device) + off)
            out["value.left"], out["value.left" + INVERSE] = matrix, torch.linalg.inv_ex(matrix)[0].mT
        return out | self.weight_clips.state()

    def transforms(self) -> list[nn.Parameter]:
        """See `methods.training.Parameters`."""
        beside = [] if self.beside is None else [self.beside]
        return [*self.log_scales.values(), *self.shifts.values(), self.log_values, *beside]

    def clips(self) -> list[nn.Parameter]:
        """See `methods.training.Parameters`."""
        return list(self.weight_clips.logits)

    def advance(self, share: float) -> None:
        """The band reaches every entry in the last epoch but one."""
        self.band.fill_(round(len(self.distance) * min(1.0, share + 0.1)))


def learn_layer(
    task: LayerTask,
    sites: Sites,
    options: dict[str, GPTQOptions],
    products: torch.dtype,
    schedule: Schedule,
    affine: bool,
) -> tuple[State, dict[str, float]]:
    """The layer's state and its loss in the first and last epoch. Arguments as `methods.training.learn`."""
    largest, outputs = maxima(task)
    scales = {}
    for site in ("attention", "mlp"):
        w_max = weight_maxima(task.weights, READERS[site]).to(outputs)
        scales[site] = 1 / smoothing(largest[site], w_max, START_ALPHA)
    parameters = OmniParameters(scales, task.runner.shape.head_dim, task.weights, options, affine)
    figures = learn(task, outputs, parameters, sites, options, products, schedule)
    return {n: t.detach().clone() for n, t in parameters.state().items() if not n.endswith(INVERSE)}, figures
