"""FlatQuant (Sun et al. 2024): learned invertible transforms that flatten weights and activations, layer by layer.

Kronecker pairs at the inputs of attention, MLP and down_proj, a matrix across heads at the input of o_proj, one for keys, one for
values; each factor is U diag(s) V^T with orthogonal U and V, so that its inverse needs no inversion. A scale per channel, and
clip ratios of activations, keys, values and weights, are learned with them.
"""

import torch
from torch import Tensor, nn

from dist_spin.compare.methods.layer_training import LayerParameters, TrainedLayerMethod, WeightClips, clip_logits
from dist_spin.compare.methods.transformed_layer import INVERSE, State
from dist_spin.model.architecture import Shape
from dist_spin.model.layer_inputs import READERS, LayerTask, weight_maxima
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.hadamard import largest_block
from dist_spin.numerics.kronecker import kronecker_sizes, orthogonal
from dist_spin.numerics.random_rotations import random_hadamard, random_orthogonal

SCALE_ALPHA = 0.3  # strength of the starting scale, w_max^(1-a) / x_max^a
MIN_CHANNEL_MAX = 1e-5  # least maximum of a channel, so that one that is never used gets a finite scale
CLIPPED = ("attention", "mlp", "down", "o", "key", "value")


def factor_sizes(shape: Shape) -> dict[str, int]:
    """The size of each learned factor, by its name in a state."""
    sizes = {}
    for site, n in (("attention", shape.hidden), ("mlp", shape.hidden), ("down", shape.intermediate)):
        sizes[f"{site}.left"], sizes[f"{site}.right"] = kronecker_sizes(n)
    return sizes | {"o.left": shape.heads, "key.left": shape.head_dim, "value.left": shape.head_dim}


class FlatParameters(nn.Module):
    """Transforms, scales and clips of a layer. All factors lie in one padded stack, which saves kernel launches."""

    def __init__(
        self,
        shape: Shape,
        scales: dict[str, Tensor],
        weights: dict[str, Tensor],
        options: dict[str, GPTQOptions],
        seed: int,
    ) -> None:
        """scales: of the channels of attention, mlp and down, at their start. weights: of the layer, as stored."""
        super().__init__()
        self.sizes = factor_sizes(shape)
        like = scales["attention"]
        widest, count = max(self.sizes.values()), len(self.sizes)
        generator = torch.Generator().manual_seed(seed)
        base = torch.eye(widest, dtype=torch.float64).repeat(2, count, 1, 1)  # U then V
        inside = torch.zeros(2, count, widest, widest)  # 1 at the entries of a factor, 0 in the padding
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
        """See `LayerParameters`."""
        u, v = (self.base @ orthogonal(self.skew * self.inside)).unbind()  # each [factors, widest, widest]
        values = self.log_values.exp()[:, None]
        matrices, inverses = (u * values) @ v.mT, (u / values) @ v.mT
        state: State = {f"{site}.scale": log.exp() for site, log in self.log_scales.items()}
        # Unbound, not indexed: the gradient of each index would be a stack of zeros with one entry, and all of them a sum.
        for (name, n), matrix, inverse in zip(self.sizes.items(), matrices.unbind(), inverses.unbind(), strict=True):
            state[name], state[name + INVERSE] = matrix[:n, :n], inverse[:n, :n]
        shrinks = torch.sigmoid(self.site_logits).unbind()
        state |= {f"{site}.shrink": shrink for site, shrink in zip(CLIPPED, shrinks, strict=True)}
        return state | self.weight_clips.state()

    def transforms(self) -> list[nn.Parameter]:
        """See `LayerParameters`."""
        return [self.skew, self.log_values, *self.log_scales.values()]

    def clips(self) -> list[nn.Parameter]:
        """See `LayerParameters`."""
        return [self.site_logits, *self.weight_clips.logits]

    def start_epoch(self, progress: float) -> None:
        """Nothing changes with time."""


class FlatQuant(TrainedLayerMethod):
    """A state has left, right, scale and shrink of attention, mlp and down, left and shrink of o, key and value, ROLE.shrink."""

    label = "FlatQuant"

    def parameters(self, task: LayerTask, largest: dict[str, Tensor]) -> LayerParameters:
        """As `TrainedLayerMethod.parameters`; scales start from the maxima of weights and activations."""
        scales = {}
        for site in ("attention", "mlp", "down"):
            w_max = weight_maxima(task.weights, READERS[site]).to(largest[site]).clamp(min=MIN_CHANNEL_MAX)
            x_max = largest[site].clamp(min=MIN_CHANNEL_MAX)
            scales[site] = w_max ** (1 - SCALE_ALPHA) / x_max**SCALE_ALPHA
        seed = self.config.quantize.seed + task.index
        return FlatParameters(self.shape, scales, task.weights, self.weight_options, seed)
