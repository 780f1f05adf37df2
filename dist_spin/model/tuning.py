"""The quantised network with what may still be learned once its codes are fixed: norm gains and the scales of weight rows.

Both are numbers that the quantised model has anyway, so that learning them costs nothing at run time (Kim et al. 2023, PEQA,
for the scales). The network lives in the rotated basis; codes, embedding and head are frozen.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM, Shape, rotary, skeleton
from dist_spin.model.learning import LearningLayer, LearningModel, LossHead
from dist_spin.model.rotation import Sites, attach, widen_norms
from dist_spin.model.sites import Learned
from dist_spin.model.transforms import Packed


def tunable_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name of each norm and linear to the shape of its log-factors, [layers, out]."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = dict(zip(LAYER_LINEARS, (q, kv, kv, shape.hidden, *(shape.intermediate,) * 2, shape.hidden), strict=True))
    return {
        name: (shape.layers, size)
        for name, size in {ATTENTION_NORM: shape.hidden, MLP_NORM: shape.hidden, **rows}.items()
    }


class Tuned(nn.Module):
    """A norm or linear whose output channels are multiplied by learned factors."""

    def __init__(self, inner: nn.Module, log_factor: Tensor) -> None:
        """log_factor: leaf [out]."""
        super().__init__()
        self.inner, self.learned = inner, Learned(log_factor)

    def forward(self, x: Tensor) -> Tensor:
        """What `inner` makes of x, times the factors, in its dtype."""
        y: Tensor = self.inner(x)
        assert self.learned.scale is not None
        return (y * self.learned.scale.exp()).to(y.dtype)


class TuningModel(LearningModel):
    """A merged, quantised network on the meta device, like `LearningModel`; `parameters_of` says where its weights go.

    Norm gains are among the tunables alone: weights come without them.
    """

    def __init__(
        self, config: Any, sites: Sites, tunables: Packed, *, device: torch.device, dtype: torch.dtype, compile: bool
    ) -> None:
        """tunables: of `tunable_shapes`. sites: the merged network's, with its clips."""
        nn.Module.__init__(self)
        base = skeleton(config).to(dtype)
        self.config, self.device, self.rotated = base.config, device, None
        shape, sites = Shape.of(config), sites.to(device, dtype)
        for i, layer in enumerate(base.model.layers):
            widen_norms(layer, folded=True)
            leaves = tunables.leaves(i)
            for name, leaf in leaves.items():
                parent, _, last = name.rpartition(".")
                owner = layer.get_submodule(parent)
                setattr(owner, last, Tuned(getattr(owner, last), leaf))
            attach(layer, shape, sites.layer(i))
        self.embed = base.model.embed_tokens
        self.layers = nn.ModuleList([LearningLayer(layer, compile) for layer in base.model.layers])
        self.head = LossHead(base.config.rms_norm_eps, base.lm_head, teacher_share=0.0)
        self._rotary = (rotary(base, device),)
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}


def place_of(name: str) -> tuple[int, str]:
    """Layer index and name within the layer of a `TuningModel` parameter; -1 for those of the ends."""
    if not name.startswith("layers."):
        return -1, name
    _, index, _, rest = name.split(".", 3)
    return int(index), rest.replace(".linear.", ".").replace(".inner.", ".")
