"""Learned scales and clips: what is learned beside the rotations, and merges into weights, norm gains and quantisers.

Parameters are log-scales (Xiao et al. 2023, SmoothQuant, whose scales are found by a rule; here by the loss) and logits of
clip ratios (Shao et al. 2024, OmniQuant; Sun et al. 2025, FlatQuant). All lie in one packed vector, replicated on every rank:
tens of thousands of numbers per layer.
"""

import math

import torch
from torch import Tensor

from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM, Shape
from dist_spin.model.rotation import CLIPS
from dist_spin.model.sites import Learned

FIRST_CLIP = 0.95  # of the range, when learning starts
SCALE_AT = {"attention": ATTENTION_NORM, "mlp": MLP_NORM, "down": "up", "o": "value", "v": "value", "k": "key"}


def scale_shapes(shape: Shape, shared_keys: bool) -> dict[str, tuple[int, ...]]:
    """Name of each scale to its shape within a layer.

    The names of the norms: after R1, before the linears they feed. up: up_proj's rows, before R4. value: channels of V,
    after R2. key: RoPE pairs of K; shared_keys: one set for all heads, since it goes into the gain of the keys' norm.
    """
    h, d, kv = shape.hidden, shape.head_dim, shape.kv_heads
    keys = 1 if shared_keys else kv
    return {ATTENTION_NORM: (h,), MLP_NORM: (h,), "up": (shape.intermediate,), "value": (kv, d), "key": (keys, d // 2)}


class Transforms:
    """The master copies of scales and clips on one device and their gradients, both packed.

    parameters, gradient: [n], fp32 (fp64 when compute is fp64); backward accumulates straight into `gradient`.
    """

    def __init__(
        self, shape: Shape, device: torch.device, compute: torch.dtype, *, scales: bool, clips: bool, shared_keys: bool
    ) -> None:
        master = torch.float64 if compute == torch.float64 else torch.float32
        self.shapes = {
            f"scale.{name}": (shape.layers, *size) for name, size in scale_shapes(shape, shared_keys).items() if scales
        }
        if clips:
            self.shapes["clip"] = (shape.layers, len(CLIPS))
        self.scales = scales
        total = sum(math.prod(size) for size in self.shapes.values())
        self.parameters = torch.zeros(total, dtype=master, device=device)
        self.gradient = torch.zeros_like(self.parameters)
        if clips:
            self.named(self.parameters)["clip"].fill_(math.log(FIRST_CLIP / (1 - FIRST_CLIP)))

    def named(self, packed: Tensor) -> dict[str, Tensor]:
        """Views of a packed vector by name, each [layers, ...]."""
        sizes = [math.prod(size) for size in self.shapes.values()]
        parts = packed.split(sizes) if sizes else ()
        return {name: part.view(size) for (name, size), part in zip(self.shapes.items(), parts, strict=True)}

    def layer(self, index: int) -> dict[str, Learned]:
        """What the sites of one layer learn, by the names in CLIPS; to be asked for once per layer."""
        leaves: dict[str, Tensor] = {}
        gradients = self.named(self.gradient)
        for name, values in self.named(self.parameters).items():
            if name == "clip":
                for i, site in enumerate(CLIPS):
                    leaves[f"clip.{site}"] = _leaf(values[index, i], gradients[name][index, i])
            else:
                leaves[name] = _leaf(values[index], gradients[name][index])
        return {site: Learned(leaves.get(f"scale.{SCALE_AT[site]}"), leaves.get(f"clip.{site}")) for site in CLIPS}

    def values(self) -> dict[str, Tensor]:
        """Scales and clip ratios themselves, by name, each [layers, ...]: what is stored and merged."""
        named = self.named(self.parameters)
        return {name: x.sigmoid() if name == "clip" else x.exp() for name, x in named.items()}

    def start_from(self, values: dict[str, Tensor]) -> None:
        """Take up stored `values`; what is not among them, or not learned here, stays as it is.

        Raises:
            ValueError: their shapes are of another model.
        """
        for name, parameters in self.named(self.parameters).items():
            if name in values:
                if values[name].shape != parameters.shape:
                    raise ValueError(f"{name} is {list(values[name].shape)}, not {list(parameters.shape)}")
                stored = values[name].to(parameters)
                parameters.copy_(stored.logit(eps=1e-6) if name == "clip" else stored.log())


def _leaf(value: Tensor, gradient: Tensor) -> Tensor:
    leaf = value.detach().requires_grad_()  # shares its memory: a step shows at once
    leaf.grad = gradient  # a view: packed as it accumulates
    return leaf
