"""Decoder layers with invertible transforms at their sites: the tensors that describe them, the merge into weights, the run.

What a method learns of one layer is a dict of tensors, its state. All of these are optional:

    attention.scale [h]   mlp.scale [h]   down.scale [intermediate]       per channel, merged (norm gains, rows of up_proj)
    attention.shift [h]   mlp.shift [h]                                   subtracted before the quantiser, added after it
    SITE.left [a, a], SITE.right [b, b] at attention, mlp, down           x (left (x) right), online
    o.left [heads, heads]                                                 mixes heads, online
    value.left [d, d]                                                     v_proj to o_proj, merged
    key.left [d, d]                                                       k left and q left^-T after RoPE, online
    SITE.shrink [2] at attention, mlp, down, o, key, value                clip ratios of the range's minimum and maximum
    SITE.kept [n] int64 at attention, mlp, o                              channels that stay exact
    ROLE.shrink [2, out, groups, 1]                                       clip ratios of the rows of a weight, by group

A scale multiplies x and divides the weights. With 16 bits everywhere the layer computes what the original one does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM, Shape
from dist_spin.model.layers import LayerRunner
from dist_spin.model.merge import NORM_BEFORE
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites import KeyBiasApart, QuantizedInputLinear
from dist_spin.model.sites_config import Sites, keeps_bias_apart
from dist_spin.model.weight_source import WeightSource
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.kronecker import apply_pair
from dist_spin.numerics.learned_clipping import clipped_quantize
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize

State = dict[str, Tensor]
INVERSE = ".inverse"  # beside a matrix: its inverse transpose, where that is known without inverting
SITE_BEFORE = {role: "attention" if norm == ATTENTION_NORM else "mlp" for role, norm in NORM_BEFORE.items()}


class TransformedInputQuant(nn.Module):
    """Transform and quantise the input of a linear, or a key or value. Buffers are None where the state has none.

    dtype: of the result, if another than that of the input; training keeps the residual stream wider than the products.
    """

    left: Tensor | None
    right: Tensor | None
    shift: Tensor | None
    shrink: Tensor | None
    exact_channels: Tensor | None

    def __init__(self, spec: QuantSpec, state: State, site: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        for name in ("left", "right", "shift", "shrink"):
            self.register_buffer(name, state.get(f"{site}.{name}"), persistent=False)
        self.register_buffer("exact_channels", state.get(f"{site}.kept"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] to the same."""
        if self.dtype is not None:
            x = x.to(self.dtype)
        if self.left is not None:
            x = apply_pair(x, self.left, self.right)
        if self.exact_channels is not None and self.spec.enabled:
            quantized = self._quantize(x.index_fill(-1, self.exact_channels, 0))
            return quantized.index_copy(-1, self.exact_channels, x.index_select(-1, self.exact_channels))
        if self.shift is None:
            return self._quantize(x)
        shift = self.shift.to(x.dtype)
        return self._quantize(x - shift) + shift

    def _quantize(self, x: Tensor) -> Tensor:
        s = self.spec
        if not s.enabled:
            return x
        if self.shrink is None:
            return fake_quantize(x, s)
        low, high = self.shrink.to(accumulation_dtype(x.dtype)).unbind()
        return clipped_quantize(x, (low, high), s.bits, symmetric=s.symmetric, group_size=s.group_size)


class TransformedNorm(nn.Module):
    """A norm, then the transform and quantiser of the linears that it feeds."""

    def __init__(self, norm: nn.Module, input_quant: TransformedInputQuant) -> None:
        super().__init__()
        self.norm, self.input_quant = norm, input_quant

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] to the same."""
        return self.input_quant(self.norm(x))


class TransformedValue(nn.Module):
    """v_proj and the quantiser of the V cache."""

    def __init__(self, linear: nn.Module, input_quant: TransformedInputQuant) -> None:
        super().__init__()
        self.linear, self.input_quant = linear, input_quant

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] to the values [..., kv_heads * d]."""
        return self.input_quant(self.linear(x))


class TransformedKey(nn.Module):
    """After the position embedding: k goes through a matrix and the quantiser, q through the inverse transpose of the matrix."""

    left: Tensor | None
    inverse: Tensor | None

    def __init__(self, input_quant: TransformedInputQuant, state: State, *, bias_apart: bool = False) -> None:
        """bias_apart: keys come from a `sites.KeyBiasApart`."""
        super().__init__()
        self.input_quant = input_quant  # has the clip ratios; the matrix is here, since q needs its inverse
        self.bias_apart = bias_apart
        self.register_buffer("left", state.get("key.left"), persistent=False)
        self.register_buffer("inverse", None if self.left is None else inverse(state, "key.left"), persistent=False)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query [batch, heads, T, d], key [batch, kv_heads, T, d] to the same; with `bias_apart` key has twice the heads."""
        if self.left is not None and self.inverse is not None:
            query, key = query @ self.inverse.to(query.dtype), key @ self.left.to(key.dtype)
        if self.bias_apart:
            key, bias = key.chunk(2, 1)
            return query, self.input_quant(key) + bias
        return query, self.input_quant(key)


def inverse(state: State, name: str) -> Tensor:
    """The inverse transpose of a matrix of a state, in its dtype."""
    stored = state.get(name + INVERSE)
    return torch.linalg.inv(state[name].double()).mT.to(state[name].dtype) if stored is None else stored


def merged(weights: dict[str, Tensor], state: State, shape: Shape) -> dict[str, Tensor]:
    """A layer's parameters (names within the layer, norms not folded) with its state merged into them; differentiable.

    Computed in the dtype of the given tensors: convert both to fp64 for an exact merge.
    """
    result = dict(weights)
    for norm, site in ((ATTENTION_NORM, "attention"), (MLP_NORM, "mlp")):
        if (scale := state.get(f"{site}.scale")) is not None:
            result[f"{norm}.weight"] = weights[f"{norm}.weight"] * scale
    for role in LAYER_LINEARS:
        site = SITE_BEFORE.get(role, "down" if role == "mlp.down_proj" else "o")
        w, bias = weights[f"{role}.weight"], weights.get(f"{role}.bias")
        if (scale := state.get(f"{site}.scale")) is not None:
            w = w / scale
        if (value_matrix := state.get("value.left")) is not None:
            if role == "self_attn.o_proj":
                w = (w.unflatten(1, (-1, shape.head_dim)) @ inverse(state, "value.left")).flatten(1)
            if role == "self_attn.v_proj":
                w = (value_matrix.mT @ w.unflatten(0, (-1, shape.head_dim))).flatten(0, 1)
                bias = None if bias is None else (bias.unflatten(0, (-1, shape.head_dim)) @ value_matrix).flatten()
        if f"{site}.left" in state:
            right = inverse(state, f"{site}.right") if f"{site}.right" in state else None
            w = apply_pair(w, inverse(state, f"{site}.left"), right)
        if role == "mlp.up_proj" and (scale := state.get("down.scale")) is not None:
            w = w * scale[:, None]
            bias = None if bias is None else bias * scale
        result[f"{role}.weight"] = w
        if bias is not None:
            result[f"{role}.bias"] = bias
    return result


def clamp(weights: dict[str, Tensor], state: State, *, symmetric: bool) -> dict[str, Tensor]:
    """Weights clamped to the ranges of a state, so that a min-max grid of each row (or group) is the clipped grid.

    weights: a layer's parameters by their names within it. Without ROLE.shrink in the state a weight stays as it is.
    """
    clamped = dict(weights)
    for role in LAYER_LINEARS:
        if (shrink := state.get(f"{role}.shrink")) is not None:
            w = weights[f"{role}.weight"]
            low, high = shrink.to(w.device, w.dtype)  # each [out, groups, 1]
            groups = w.unflatten(1, (low.shape[1], -1))
            minimum, maximum = groups.amin(-1, keepdim=True) * low, groups.amax(-1, keepdim=True) * high
            if symmetric:
                maximum = torch.maximum(-minimum, maximum)
                minimum = -maximum
            clamped[f"{role}.weight"] = torch.minimum(torch.maximum(groups, minimum), maximum).flatten(1)
    return clamped


class TransformedRunner(LayerRunner):
    """Builds and runs layers with the transforms that `states` gives for the index of each; weights come `merged`."""

    def __init__(
        self,
        config: Any,
        sites: Sites,
        states: Callable[[int], State],
        *,
        device: torch.device,
        dtype: torch.dtype,
        products: torch.dtype | None = None,
        down: QuantSpec | None = None,
    ) -> None:
        """products: dtype of the inputs of linears, if another than `dtype`.

        down: quantiser of the input of down_proj, if another than `sites.a`.
        """
        super().__init__(config, sites, device=device, dtype=dtype, rotated=False)
        self.states, self.products, self.down = states, products, down

    def attach(self, layer: nn.Module, index: int, sites: Sites) -> None:
        """Put the transforms and quantisers of a layer into it, in place."""
        dtype = accumulation_dtype(self.dtype)
        state = {n: t.to(self.device, dtype if t.is_floating_point() else None) for n, t in self.states(index).items()}
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        for name, site in ((ATTENTION_NORM, "attention"), (MLP_NORM, "mlp")):
            input_quant = TransformedInputQuant(sites.a, state, site, self.products)
            setattr(layer, name, TransformedNorm(getattr(layer, name), input_quant))
        # Of values and keys the module has the clip ratios alone: value.left is merged, key.left belongs to TransformedKey.
        clips: State = {name: state[name] for name in ("value.shrink", "key.shrink") if name in state}
        attention.v_proj = TransformedValue(attention.v_proj, TransformedInputQuant(sites.v, clips, "value"))
        apart = keeps_bias_apart(attention, sites)
        if apart:
            attention.k_proj = KeyBiasApart(attention.k_proj)
        attention.key_site = TransformedKey(TransformedInputQuant(sites.k, clips, "key"), state, bias_apart=apart)
        attention.o_proj = QuantizedInputLinear(TransformedInputQuant(sites.o, state, "o"), attention.o_proj)
        down = sites.a if self.down is None else self.down
        mlp.down_proj = QuantizedInputLinear(TransformedInputQuant(down, state, "down"), mlp.down_proj)


class WeightsAndStates(RotatedWeights):
    """The unrotated weights of a model, and the state of each layer: `states` of its index."""

    def __init__(
        self,
        source: WeightSource,
        shape: Shape,
        states: Callable[[int], State],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(source, shape, None, (), device, dtype)
        self.states = states


class TransformedWeights(WeightsAndStates):
    """The unrotated weights of a model with the state of each layer merged into them, in fp64."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """As `RotatedWeights.layer`, merged."""
        wide = {name: w.double() for name, w in super().layer(index).items()}
        state = {name: tensor.to(self.device).double() for name, tensor in self.states(index).items()}
        return {name: w.to(self.dtype) for name, w in merged(wide, state, self.shape).items()}
