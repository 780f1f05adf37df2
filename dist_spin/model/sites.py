"""The sites of a decoder layer, where activations are quantised, as thin modules around transformers' own.

While rotations are learned with 16-bit weights, nothing but these sites knows about a rotation: because RMSNorm commutes
with R1 and Q(x R1)(W R1)^T = [Q(x R1) R1^T] W^T, the rotated network is the original one with the activation rotated,
quantised and rotated back. After a merge the same sites run without a rotation. Row-vector convention throughout: y = x R.

Beside rotations, sites may learn per-channel scales s and clip ratios c, Q_c((x R) * s) / s: these too merge
(model/merge.py). Inside `plain_sites` every site is the identity, which is how the full-precision teacher runs.

Modules rather than hooks: hooks gave torch.compile one graph per layer.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dist_spin.model.rotate_quantize import (
    NO_SCALE_OR_CLIP,
    RotationParam,
    ScaleAndClip,
    clipped,
    differentiable_rotation,
    kept_matmul,
    rotate_quantize,
    scale_channels,
)
from dist_spin.numerics.block_rotation import apply_rotation
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.hadamard_transform import kronecker_apply, online_transform
from dist_spin.numerics.quantizer import QuantSpec


class _Mode:
    """Not an argument: transformers' own forward passes lie between whoever decides and the sites."""

    plain = False


_mode = _Mode()


@contextlib.contextmanager
def plain_sites() -> Iterator[None]:
    """Switch every site off: the layers compute the full-precision network on the same weights."""
    _mode.plain = True
    try:
        yield
    finally:
        _mode.plain = False


class WideRMSNorm(nn.Module):
    """RMSNorm in max(fp32, input dtype), as fp64 checks need (transformers' always drops to fp32), with or without a gain.

    kind: as `families.Family.norm`; "layer" is LayerNorm.
    """

    weight: nn.Parameter | None

    def __init__(self, eps: float, weight: nn.Parameter | None = None, kind: str = "rms") -> None:
        super().__init__()
        self.eps, self.kind = eps, kind
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] normalised over its last dimension, in its own dtype."""
        wide = x.to(accumulation_dtype(x.dtype))
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is None or self.kind == "rms":
            return normed.to(x.dtype) if self.weight is None else self.weight * normed.to(x.dtype)
        gain = self.weight.to(wide.dtype)  # these families round after it
        return (normed * (1 + gain if self.kind == "rms from one" else gain)).to(x.dtype)


class NormSite(nn.Module):
    """A norm followed by the quantiser of the linears it feeds: computed once, shared by q, k, v or by gate and up."""

    def __init__(
        self,
        norm: nn.Module,
        spec: QuantSpec,
        rotation: RotationParam | None = None,
        learned: ScaleAndClip = NO_SCALE_OR_CLIP,
    ) -> None:
        super().__init__()
        self.norm, self.spec, self.rotation, self.learned = norm, spec, rotation, learned

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if not self.spec.enabled or _mode.plain:
            return x  # Q is the identity, so R R^T cancels
        if self.rotation is None:
            return clipped(x, self.spec, self.learned)
        return rotate_quantize(x, self.rotation, self.spec, self.learned)


class ValueSite(nn.Module):
    """v_proj and the quantiser of the V cache: v_hat = Q(v R2 * s) per head, left in the rotated, scaled basis."""

    def __init__(
        self,
        linear: nn.Module,
        spec: QuantSpec,
        head_dim: int,
        rotation: RotationParam | None = None,
        learned: ScaleAndClip = NO_SCALE_OR_CLIP,
    ) -> None:
        super().__init__()
        self.linear, self.spec, self.head_dim, self.rotation, self.learned = linear, spec, head_dim, rotation, learned

    def forward(self, x: Tensor) -> Tensor:
        v = self.linear(x)
        if _mode.plain:
            return v
        v = v.unflatten(-1, (-1, self.head_dim))  # [..., kv_heads, d]
        if self.rotation is not None:
            v = apply_rotation(v, differentiable_rotation(self.rotation, v.dtype))
        if self.learned.scale is not None:
            v = scale_channels(v, self.learned.scale)
        return clipped(v, self.spec, self.learned).flatten(-2)


def across_heads(x: Tensor, hadamard: tuple[Tensor, ...], head_dim: int) -> Tensor:
    """x (H (x) I_d) for x [..., heads * d]: every channel of a head mixed with the same channel of the other heads."""
    return online_transform(x.unflatten(-1, (-1, head_dim)).mT, hadamard).mT.flatten(-2)


class OProjInputQuant(nn.Module):
    """What o_proj reads: Q(a) / s R2^T, quantised in the scaled R2 basis, by token or by head (`spec.group_size`).

    heads: Kronecker factors of an online Hadamard across heads (QuaRot), whose inverse o_proj's weight then holds; () leaves
    it out, as learning does.
    """

    def __init__(
        self,
        spec: QuantSpec,
        head_dim: int,
        rotation: RotationParam | None,
        heads: tuple[Tensor, ...] = (),
        learned: ScaleAndClip = NO_SCALE_OR_CLIP,
    ) -> None:
        """learned: its scale is the values' one, [kv_heads, d]."""
        super().__init__()
        self.spec, self.head_dim, self.rotation, self.heads, self.learned = spec, head_dim, rotation, heads, learned

    def forward(self, attended: Tensor) -> Tensor:
        """attended [..., heads * d] to the same."""
        if _mode.plain:
            return attended
        if self.heads:
            attended = across_heads(attended, self.heads, self.head_dim)
        a = clipped(attended, self.spec, self.learned)
        if self.rotation is None:
            return a
        a = a.unflatten(-1, (-1, self.head_dim))
        if self.learned.scale is not None:
            a = scale_channels(a, _per_query_head(self.learned.scale, a.shape[-2]), -1)
        return apply_rotation(a, differentiable_rotation(self.rotation, a.dtype).mT).flatten(-2)


class DownProjInputQuant(nn.Module):
    """What down_proj reads: its input rotated online by the Hadamard R4 and quantised.

    unfold: down_proj has R4 not folded in, so that what is quantised is rotated and scaled back: Q((m * s) R4) R4^T / s.
    part: the rows of a layer's learned scales that are this input's, side by side; None: all of them.
    """

    def __init__(
        self,
        spec: QuantSpec,
        hadamard: tuple[Tensor, ...],
        learned: ScaleAndClip = NO_SCALE_OR_CLIP,
        *,
        unfold: bool = False,
        part: slice | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.learned, self.unfold, self.part = spec, learned, unfold, part
        self.hadamard = hadamard  # Kronecker factors of R4, normalised; () leaves R4 out

    def forward(self, m: Tensor, expert: Tensor | None = None) -> Tensor:
        """m [..., intermediate] to the same. expert [rows], of m [rows, intermediate]: whose learned scale each row takes."""
        scale = self.learned.scale
        if scale is not None and expert is not None:
            scale = scale[expert]
        elif scale is not None and self.part is not None:
            scale = scale[self.part].flatten()
        if _mode.plain and (self.unfold or not self.hadamard):
            return m
        if scale is not None and not _mode.plain:
            m = scale_channels(m, scale)
        if self.hadamard:
            m = online_transform(m, self.hadamard)
        if _mode.plain:
            return m
        m = clipped(m, self.spec, self.learned)
        if self.unfold and self.hadamard:
            m = kronecker_apply(m, self.hadamard, inverse=True)
        return m if scale is None else scale_channels(m, scale, -1)


class QuantizedInputLinear(nn.Module):
    """A linear behind the site that prepares its input; apart, so that calibration can read what lies between them.

    keep: let recomputation keep the result, for a linear whose result others are computed from (o_proj's feeds the residual).
    """

    def __init__(self, input_quant: nn.Module, linear: nn.Linear, *, keep: bool = False) -> None:
        super().__init__()
        self.input_quant, self.linear, self.keep = input_quant, linear, keep

    def forward(self, x: Tensor) -> Tensor:
        """The linear of the prepared input."""
        x = self.input_quant(x)
        if not self.keep:
            return self.linear(x)
        y = kept_matmul(x, self.linear.weight.T)
        return y if self.linear.bias is None else y + self.linear.bias


class KeyBiasApart(nn.Module):
    """k_proj with its bias as heads of their own behind the keys: the position embedding turns both, and a `KeySite` joins them.

    In 4 bits a bias that dwarfs what depends on the token leaves that next to no codes; and it need not be stored at all.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] to keys and biases, [..., 2 * kv_heads * d]."""
        keys = nn.functional.linear(x, self.linear.weight)
        return torch.cat((keys, self.linear.bias.to(keys.dtype).expand_as(keys)), -1)


class KeySite(nn.Module):
    """The online Hadamard R3 on q and k after RoPE and the quantiser of the K cache; called by model/attention.py.

    With a learned scale t [kv_heads or 1, d / 2], one number for both channels of a RoPE pair (j, j + d/2), which therefore
    commutes with RoPE: Q((k * t) R3) and (q / t) R3. bias_apart: keys come from a `KeyBiasApart`.
    """

    def __init__(
        self,
        spec: QuantSpec,
        hadamard: tuple[Tensor, ...] = (),
        learned: ScaleAndClip = NO_SCALE_OR_CLIP,
        *,
        bias_apart: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.hadamard, self.learned, self.bias_apart = spec, hadamard, learned, bias_apart

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query [batch, heads, T, d], key [batch, kv_heads, T, d] to the same; with `bias_apart` key has twice the heads."""
        if self.bias_apart:
            key, bias = key.chunk(2, 1)
            if _mode.plain:
                return query, key + bias
            query, key, bias = self._turned(query, key, bias)
            return query, clipped(key, self.spec, self.learned) + bias
        if _mode.plain:
            return query, key
        query, key = self._turned(query, key)
        return query, clipped(key, self.spec, self.learned)

    def _turned(self, query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        """All of them scaled and rotated, so that q k^T stays."""
        if self.learned.scale is not None:
            t = torch.cat((self.learned.scale, self.learned.scale), -1)  # [kv_heads or 1, d]
            query = scale_channels(query, _per_query_head(t, query.shape[1]).unsqueeze(-2), -1)
            keys = tuple(scale_channels(key, t.unsqueeze(-2)) for key in keys)
        if self.hadamard:
            return tuple(online_transform(x, self.hadamard) for x in (query, *keys))
        return query, *keys


def _per_query_head(scale: Tensor, heads: int) -> Tensor:
    """[kv_heads or 1, d] repeated for the query heads of each group: [heads, d]."""
    return scale.repeat_interleave(heads // scale.shape[0], 0)
