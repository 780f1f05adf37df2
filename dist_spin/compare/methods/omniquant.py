"""OmniQuant (Shao et al. 2024): learned clipping of weights and learned equivalent transforms, layer by layer.

Learned are the clip ratios of weights, a scale and a shift per channel where a norm feeds linears, and a scale per channel from
v_proj to o_proj. Scales merge into weights; the shift stays at run time.
"""

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.layer_training import LayerParameters, TrainedLayerMethod, WeightClips
from dist_spin.compare.methods.smoothquant import smoothing
from dist_spin.compare.methods.transformed_layer import INVERSE, State
from dist_spin.model.layer_inputs import READERS, LayerTask, weight_maxima
from dist_spin.numerics.gptq import GPTQOptions

START_ALPHA = 0.5  # strength of the smoothing that scales start from


class OmniParameters(nn.Module):
    """Scales, shifts and weight clips of a layer."""

    def __init__(
        self, scales: dict[str, Tensor], head_dim: int, weights: dict[str, Tensor], options: dict[str, GPTQOptions]
    ) -> None:
        """scales: of the channels [h] of attention and mlp, at their start. weights: of the layer, as stored."""
        super().__init__()
        like = scales["attention"]
        self.log_scales = nn.ParameterDict({site: nn.Parameter(scale.log()) for site, scale in scales.items()})
        self.shifts = nn.ParameterDict({site: nn.Parameter(torch.zeros_like(scale)) for site, scale in scales.items()})
        self.log_values = nn.Parameter(like.new_zeros(head_dim))
        self.weight_clips = WeightClips(weights, options, like)

    def value_matrix(self) -> tuple[Tensor, Tensor]:
        """The matrix [d, d] from v_proj to o_proj, and its inverse transpose."""
        values = self.log_values.exp()
        return torch.diag(values), torch.diag(1 / values)

    def state(self) -> State:
        """See `LayerParameters`."""
        state: State = {f"{site}.scale": log.exp() for site, log in self.log_scales.items()}
        state |= {f"{site}.shift": shift + 0 for site, shift in self.shifts.items()}
        state["value.left"], state["value.left" + INVERSE] = self.value_matrix()
        return state | self.weight_clips.state()

    def transforms(self) -> list[nn.Parameter]:
        """See `LayerParameters`."""
        return [*self.log_scales.values(), *self.shifts.values(), self.log_values]

    def clips(self) -> list[nn.Parameter]:
        """See `LayerParameters`."""
        return list(self.weight_clips.logits)

    def start_epoch(self, progress: float) -> None:
        """Nothing changes with time."""


class OmniQuant(TrainedLayerMethod):
    """A state has scale and shift of attention and mlp, value.left, and ROLE.shrink of every quantised weight."""

    label = "OmniQuant"
    parameters_class: type[OmniParameters] = OmniParameters

    def parameters(self, task: LayerTask, largest: dict[str, Tensor]) -> LayerParameters:
        """As `TrainedLayerMethod.parameters`; scales start from those of SmoothQuant."""
        scales = {}
        for site in ("attention", "mlp"):
            w_max = weight_maxima(task.weights, READERS[site]).to(largest[site])
            scales[site] = 1 / smoothing(largest[site], w_max, START_ALPHA)
        return self.parameters_class(scales, self.shape.head_dim, task.weights, self.weight_options)
