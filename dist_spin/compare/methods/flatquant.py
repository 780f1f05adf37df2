"""FlatQuant (Sun et al. 2024): learned invertible transforms that flatten weights and activations, layer by layer.

Kronecker pairs at the inputs of attention, MLP and down_proj, a matrix across heads at the input of o_proj, one for keys, one for
values; each factor is U diag(s) V^T with orthogonal U and V, so that its inverse needs no inversion. A scale per channel, and
clips of activations, keys, values and weights, are learned beside them.
"""

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.layer_training import Schedule, WeightClips, clip_logits, learn
from dist_spin.compare.methods.transformed_layer import INVERSE, State
from dist_spin.model.architecture import Shape
from dist_spin.model.layer_inputs import READERS, LayerTask, maxima, weight_maxima
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.hadamard import largest_block
from dist_spin.numerics.kronecker import kronecker_sizes, orthogonal
from dist_spin.numerics.random_rotations import random_hadamard, random_orthogonal

SCALE_ALPHA = 0.3  # strength of the starting scale, w_max^(1-a) / x_max^a
LEAST = 1e-5  # of a maximum, so that a channel that is never used gets a finite scale
CLIPPED = ("attention", "mlp", "down", "o", "key", "value")


def factor_sizes(shape: Shape) -> dict[str, int]:
    """Name of each learned factor (as in a state) to its size."""
    sizes = {}
    for site, n in (("attention", shape.hidden), ("mlp", shape.hidden), ("down", shape.intermediate)):
        sizes[f"{site}.left"], sizes[f"{site}.right"] = kronecker_sizes(n)
    return sizes | {"o.left": shape.heads, "key.left": shape.head_dim, "value.left": shape.head_dim}


class FlatParameters(nn.Module):
    """A layer's transforms, scales and clips. All factors lie in one padded stack, which saves launches."""

    def __init__(
        self,
        shape: Shape,
        scales: dict[str, Tensor],
        weights: dict[str, Tensor],
        options: dict[str, GPTQOptions],
        seed: int,
    ) -> None:
        """scales: starting channel scales of attention, mlp and down. weights: the layer's, as stored."""
        super().__init__()
        self.sizes = factor_sizes(shape)
        like = scales["attention"]
        widest, count = max(self.sizes.values()), len(self.sizes)
        generator = torch.Generator().manual_seed(seed)
        base = torch.eye(widest, dtype=torch.float64).repeat(2, count, 1, 1)  # U then V
        inside = torch.zeros(2, count, widest, widest)  # where a factor lies in the padding
        for i, n in enumerate(self.sizes.values()):
            make = random_hadamard if largest_block(n) == n else random_orthogonal
            base[0, i, :n, :n] = make(n, generator)
            inside[:, i, :n, :n] = 1
        self.register_buffer("base", base.to(like), persistent=False)
        self.register_buffer("inside", inside.to(like), persistent=False)
        self.skew = nn.Parameter(torch.zeros_like(self.base))
        self.log_values = nn.Parameter(like.new_zeros(count, widest))
        self.log_scales = nn.ParameterDict({site: nn.Parameter(scale.log()) for site, scale in scales.items()})
        self.site_logits = clip_logits((len(CLIPPED), 2), like)
        self.weight_clips = WeightClips(weights, options, like)

    base: Tensor
    inside: Tensor

    def state(self) -> State:
        """See `methods.training.Parameters`."""
        u, v = (self.base @ orthogonal(self.skew * self.inside)).unbind()  # each [factors, widest, widest]
        values = self.log_values.exp()[:, None]
        matrices, inverses = (u * values) @ v.mT, (u / values) @ v.mT
        out: State = {f"{site}.scale": log.exp() for site, log in self.log_scales.items()}
        for i, (name, n) in enumerate(self.sizes.items()):
            out[name], out[name + INVERSE] = matrices[i, :n, :n], inverses[i, :n, :n]
        shrink = torch.sigmoid(self.site_logits)
        out |= {f"{site}.shrink": shrink[i] for i, site in enumerate(CLIPPED)}
        return out | self.weight_clips.state()

    def transforms(self) -> list[nn.Parameter]:
        """See `methods.training.Parameters`."""
        return [self.skew, self.log_values, *self.log_scales.values()]

    def clips(self) -> list[nn.Parameter]:
        """See `methods.training.Parameters`."""
        return [self.site_logits, *self.weight_clips.logits]

    def advance(self, share: float) -> None:
        """Nothing changes with time."""


def learn_layer(
    task: LayerTask, sites: Sites, options: dict[str, GPTQOptions], products: torch.dtype, schedule: Schedule
) -> tuple[State, dict[str, float]]:
    """The layer's state and its loss in the first and last epoch. Arguments as `methods.training.learn`."""
    largest, outputs = maxima(task)
    scales = {}
    for site in ("attention", "mlp", "down"):
        w_max = weight_maxima(task.weights, READERS[site]).to(outputs).clamp(min=LEAST)
        scales[site] = w_max ** (1 - SCALE_ALPHA) / largest[site].clamp(min=LEAST) ** SCALE_ALPHA
    parameters = FlatParameters(task.runner.shape, scales, task.weights, options, schedule.seed + task.index)
    figures = learn(task, outputs, parameters, sites, options, products, schedule)
    state = {name: tensor for name, tensor in parameters.state().items() if not name.endswith(INVERSE)}
    return {name: tensor.detach().clone() for name, tensor in state.items()}, figures
