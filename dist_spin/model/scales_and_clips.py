"""Learned scales and clips: what is learned beside the rotations, and merges into weights, norm gains and quantisers.

Parameters are log-scales (Xiao et al. 2023, SmoothQuant, whose scales are found by a rule; here by the loss) and logits of
clip ratios (Shao et al. 2024, OmniQuant; Sun et al. 2025, FlatQuant). All lie in one packed vector, replicated on every rank:
tens of thousands of numbers per layer.
"""

import math

import torch
from torch import Tensor

from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM, Shape
from dist_spin.model.rotate_quantize import ScaleAndClip
from dist_spin.model.sites_config import CLIP_SITES
from dist_spin.numerics.dtypes import accumulation_dtype

# Share of the range that is cut off when learning starts at 4 bits; each bit more cuts a quarter of it, as of the rounding error.
INITIAL_CUT = 0.05
SCALE_AT = {"attention": ATTENTION_NORM, "mlp": MLP_NORM, "down": "up", "o": "value", "v": "value", "k": "key"}


def scale_shapes(shape: Shape, *, shared_keys: bool) -> dict[str, tuple[int, ...]]:
    """Name of each scale to its shape within a layer.

    The names of the norms: after R1, before the linears they feed. up: up_proj's rows, of every expert, before R4. value:
    channels of V, after R2. key: RoPE pairs of K; shared_keys: one set for all heads, since it goes into the gain of the keys'
    norm. Those of `Shape.unscaled` are left out.
    """
    h, d, kv = shape.hidden, shape.head_dim, shape.kv_heads
    keys = 1 if shared_keys else kv
    found = {ATTENTION_NORM: (h,), MLP_NORM: (h,), "up": shape.up_scales, "value": (kv, d), "key": (keys, d // 2)}
    return {name: size for name, size in found.items() if name not in shape.unscaled}


def initial_clip(bits: int) -> float:
    """The share of its range that a quantiser of so many bits keeps when learning starts."""
    return 1 - INITIAL_CUT * 4.0 ** -max(0, min(bits, 8) - 4)


class Packed:
    """Learned vectors of all layers in one: the master copies on one device and their gradients.

    shapes: of each by name, [layers, ...]. parameters, gradient: [n], fp32 (fp64 when compute is fp64); backward
    accumulates straight into `gradient`.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device, compute: torch.dtype) -> None:
        master = accumulation_dtype(compute)
        self.shapes = shapes
        total = sum(math.prod(size) for size in shapes.values())
        self.parameters = torch.zeros(total, dtype=master, device=device)
        self.gradient = torch.zeros_like(self.parameters)

    def named(self, packed: Tensor) -> dict[str, Tensor]:
        """Views of a packed vector by name, each [layers, ...]."""
        parts = packed.split([math.prod(size) for size in self.shapes.values()])
        return {name: part.view(size) for (name, size), part in zip(self.shapes.items(), parts, strict=True)}

    def leaves(self, index: int) -> dict[str, Tensor]:
        """The parameters of one layer as leaves of autograd, by name; to be asked for once per layer."""
        values, gradients = self.named(self.parameters), self.named(self.gradient)
        return {name: _leaf(values[name][index], gradients[name][index]) for name in self.shapes}

    def values(self) -> dict[str, Tensor]:
        """Scales and clip ratios themselves, by name, each [layers, ...]: what is stored and merged."""
        named = self.named(self.parameters)
        return {name: x.sigmoid() if name == "clip" else x.exp() for name, x in named.items()}


class ScalesAndClips(Packed):
    """Scales and clips that are learned with the rotations."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        compute: torch.dtype,
        *,
        scales: bool,
        clips: bool,
        shared_keys: bool,
        bits: dict[str, int],
    ) -> None:
        """bits: of the quantiser at each of CLIP_SITES."""
        shapes: dict[str, tuple[int, ...]] = {}
        if scales:
            shapes |= {
                f"scale.{n}": (shape.layers, *size) for n, size in scale_shapes(shape, shared_keys=shared_keys).items()
            }
        if clips:
            shapes["clip"] = (shape.layers, len(CLIP_SITES))
        super().__init__(shapes, device, compute)
        self.scales = scales
        if clips:
            initial = torch.tensor([initial_clip(bits[site]) for site in CLIP_SITES], dtype=torch.float64)
            self.named(self.parameters)["clip"].copy_(initial.logit())

    def layer(self, index: int) -> dict[str, ScaleAndClip]:
        """What the sites of one layer learn, by the names in CLIP_SITES; to be asked for once per layer."""
        leaves = self.leaves(index)
        if "clip" in leaves:
            values, gradient = leaves["clip"].detach(), leaves.pop("clip").grad
            assert gradient is not None
            leaves |= {f"clip.{site}": _leaf(values[i], gradient[i]) for i, site in enumerate(CLIP_SITES)}
        return {
            site: ScaleAndClip(leaves.get(f"scale.{SCALE_AT[site]}"), leaves.get(f"clip.{site}")) for site in CLIP_SITES
        }

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
