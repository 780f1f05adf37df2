"""The places of a decoder layer where activations are quantised, as thin modules around transformers' own.

While rotations are learned with 16-bit weights, nothing but these sites knows about a rotation: because RMSNorm commutes
with R1 and Q(x R1)(W R1)^T = [Q(x R1) R1^T] W^T, the rotated network is the original one with the activation rotated,
quantised and rotated back. After a merge the same sites run without a rotation. Row-vector convention throughout: y = x R.

Beside rotations, sites may learn per-channel scales s and clip ratios c, Q_c((x R) * s) / s: these too merge (`merge` in
model/rotation.py). Inside `plain_sites` every site is the identity, which is how the full-precision teacher runs.

Modules rather than hooks: hooks gave torch.compile one graph per layer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_spin.model.architecture import ATTENTION
from dist_spin.numerics.hadamard import kronecker_apply, online_transform
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize, range_gradients, range_quantize


class Basis:
    """One learned rotation as the sites see it. Not a module, so that no engine shards, casts or moves it.

    value: R [n, n], orthonormal, in the dtype of compute; refreshed in place after every step; no gradient.
    tilt:  the leaf that receives gradients [n, n], fp32 (fp64 for fp64 compute): the coordinates Omega of
           R(Omega) = (I + Omega) R at Omega = 0. Its value is never read.
    """

    def __init__(self, value: Tensor, tilt: Tensor | None = None) -> None:
        self.value, self.tilt = value, tilt


class Learned:
    """The scale and clip that are learned at one site, as leaves in the masters' dtype; None where there is none.

    scale: log of the per-channel scale. clip: logit of the clip ratio, a scalar. Not a module, as `Basis`.
    """

    def __init__(self, scale: Tensor | None = None, clip: Tensor | None = None) -> None:
        self.scale, self.clip = scale, clip


NOTHING = Learned()


class _Mode:
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


@torch.library.custom_op("dist_spin::kept_matmul", mutates_args=())
def kept_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., k] @ b [k, n]: a matmul of its own name, so that recomputation can keep its result (model/recompute.py)."""
    return a @ b


@kept_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _kept_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    (b,) = ctx.saved_tensors
    return g @ b.T, None  # b is a frozen weight


kept_matmul.register_autograd(
    _kept_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1])
)


def matmul_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b for 2-D operands with the result in `dtype`, without rounding the sum to the operands' dtype on the way."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _RotateQuantize(torch.autograd.Function):
    """x_hat = Q(x R) R^T, with straight-through gradients for x and the tilt of R.

    With e = Q(x R) - x R held constant (straight-through), x_hat = x R R^T + e R^T: on the manifold dx is the incoming
    gradient g itself, with no matmul. Turning R into (I + Omega) R changes x_hat by x (Omega + Omega^T) + e R^T Omega^T;
    the first term vanishes for every skew Omega, so the gradient along the manifold is the skew part of g^T (x_hat - x):
    one [n, T] x [T, n] matmul, which needs neither Q(x R) nor R again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tilt: Tensor, rotation: Tensor, spec: QuantSpec) -> Tensor:
        y = fake_quantize(x @ rotation, spec)
        x_hat = kept_matmul(y, rotation.T)
        ctx.save_for_backward(x, x_hat)
        ctx.tilt_dtype = tilt.dtype
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, x_hat = ctx.saved_tensors
        return g, _tilt_gradient(x, x_hat, g, ctx.tilt_dtype), None, None


class _RotateScaleQuantize(torch.autograd.Function):
    """x_hat = Q_c((x R) * s) / s R^T: as `_RotateQuantize` for x and the tilt, which take e as it is.

    Log-scales and clip get the gradient through the range as well (`range_gradients`). With z = (x R) * s, g_u = g R the
    gradient of u = Q_c(z) / s, g_q = g_u / s and g_z that of z through Q_c, d log s = sum over tokens of g_z z - g_q Q_c(z).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tilt: Tensor,
        rotation: Tensor,
        scale: Tensor | None,
        clip: Tensor | None,
        spec: QuantSpec,
    ) -> Tensor:
        x_hat = kept_matmul(_scale_quantize(x @ rotation, scale, clip, spec), rotation.T)
        ctx.save_for_backward(x, x_hat, rotation, scale, clip)
        ctx.tilt_dtype, ctx.spec = tilt.dtype, spec
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None, None]:
        x, x_hat, rotation, scale, clip = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        z, g_q = (x @ rotation).to(wide), (g @ rotation).to(wide)
        if scale is not None:
            s = scale.to(wide).exp()
            z, g_q = z * s, g_q / s
        ratio = None if clip is None else clip.sigmoid()
        g_z, d_ratio = range_gradients(z, g_q, ctx.spec, ratio)
        d_scale = d_clip = None
        if scale is not None:
            q = fake_quantize(z, ctx.spec) if ratio is None else range_quantize(z, ctx.spec, ratio)
            d_scale = (g_z * z - g_q * q).flatten(0, -2).sum(0).to(scale.dtype)
        if ratio is not None:
            d_clip = d_ratio.to(clip.dtype) * ratio * (1 - ratio)
        return g, _tilt_gradient(x, x_hat, g, ctx.tilt_dtype), None, d_scale, d_clip, None


def _tilt_gradient(x: Tensor, x_hat: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    n = x.shape[-1]
    moved = (x_hat - x).reshape(-1, n)  # [tokens, n]
    return matmul_wide(g.reshape(-1, n).T, moved, dtype)  # [n, n]


def _scale_quantize(y: Tensor, scale: Tensor | None, clip: Tensor | None, spec: QuantSpec) -> Tensor:
    """Q_c(y * s) / s in y's dtype, computed in fp32 or wider."""
    ratio = None if clip is None else clip.sigmoid()
    if scale is None:
        return range_quantize(y, spec, ratio)
    wide = torch.promote_types(y.dtype, torch.float32)
    s = scale.to(wide).exp()
    return (range_quantize(y.to(wide) * s, spec, ratio) / s).to(y.dtype)


def rotate_quantize(x: Tensor, basis: Basis, spec: QuantSpec, learned: Learned = NOTHING) -> Tensor:
    """x_hat = Q(x R) R^T for x [..., n]; differentiable in x, in what is learned and, along the manifold, in the tilt of R.

    Only the skew part of the tilt's gradient has a meaning; `Rotations` takes it. Without a tilt: plain straight-through.
    """
    if learned.scale is not None or learned.clip is not None:
        assert basis.tilt is not None, "scales and clips are learned together with a rotation"
        out: Tensor = _RotateScaleQuantize.apply(x, basis.tilt, basis.value, learned.scale, learned.clip, spec)
        return out
    if basis.tilt is not None:
        return _RotateQuantize.apply(x, basis.tilt, basis.value, spec)
    return fake_quantize(x @ basis.value, spec) @ basis.value.T


def clipped(x: Tensor, spec: QuantSpec, learned: Learned) -> Tensor:
    """Q_c(x), its gradient through the range where a clip is learned, straight-through otherwise."""
    if learned.scale is None and learned.clip is None:
        return fake_quantize(x, spec)
    return range_quantize(x, spec, None if learned.clip is None else learned.clip.sigmoid())


def _times(x: Tensor, log_scale: Tensor, sign: int = 1) -> Tensor:
    """x * s, or x / s for sign -1, in x's dtype; differentiable in both."""
    return (x * (sign * log_scale).exp()).to(x.dtype)


class WideRMSNorm(nn.Module):
    """RMSNorm in max(fp32, input dtype), as fp64 checks need (transformers' always drops to fp32), with or without a gain."""

    weight: nn.Parameter | None

    def __init__(self, eps: float, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] normalised over its last dimension, in its own dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return normed if self.weight is None else self.weight * normed


class NormSite(nn.Module):
    """A norm followed by the quantiser of the linears it feeds: computed once, shared by q, k, v or by gate and up."""

    def __init__(
        self, norm: nn.Module, spec: QuantSpec, basis: Basis | None = None, learned: Learned = NOTHING
    ) -> None:
        super().__init__()
        self.norm, self.spec, self.basis, self.learned = norm, spec, basis, learned

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if not self.spec.enabled or _mode.plain:
            return x  # Q is the identity, so R R^T cancels
        if self.basis is None:
            return fake_quantize(x, self.spec)
        return rotate_quantize(x, self.basis, self.spec, self.learned)


class ValueSite(nn.Module):
    """v_proj and the quantiser of the V cache: v_hat = Q(v R2 * s) per head, left in the rotated, scaled basis."""

    def __init__(
        self, linear: nn.Module, spec: QuantSpec, head_dim: int, basis: Basis | None = None, learned: Learned = NOTHING
    ) -> None:
        super().__init__()
        self.linear, self.spec, self.head_dim, self.basis, self.learned = linear, spec, head_dim, basis, learned

    def forward(self, x: Tensor) -> Tensor:
        v = self.linear(x)
        if _mode.plain:
            return v
        v = v.unflatten(-1, (-1, self.head_dim))  # [..., kv_heads, d]
        if self.basis is not None:
            v = v @ _differentiable(self.basis, v.dtype)
        if self.learned.scale is not None:
            v = _times(v, self.learned.scale)
        return clipped(v, self.spec, self.learned).flatten(-2)


def across_heads(x: Tensor, hadamard: tuple[Tensor, ...], head_dim: int) -> Tensor:
    """x (H (x) I_d) for x [..., heads * d]: every channel of a head mixed with the same channel of the other heads."""
    return online_transform(x.unflatten(-1, (-1, head_dim)).mT, hadamard).mT.flatten(-2)


class OutputFront(nn.Module):
    """What o_proj reads: Q(a) / s R2^T, quantised in the scaled R2 basis, by token or by head (`spec.group_size`).

    heads: Kronecker factors of an online Hadamard across heads (QuaRot), whose inverse o_proj's weight then holds; () leaves
    it out, as learning does.
    """

    def __init__(
        self,
        spec: QuantSpec,
        head_dim: int,
        basis: Basis | None,
        heads: tuple[Tensor, ...] = (),
        learned: Learned = NOTHING,
    ) -> None:
        """learned: its scale is the values' one, [kv_heads, d]."""
        super().__init__()
        self.spec, self.head_dim, self.basis, self.heads, self.learned = spec, head_dim, basis, heads, learned

    def forward(self, attended: Tensor) -> Tensor:
        """attended [..., heads * d] to the same."""
        if _mode.plain:
            return attended
        if self.heads:
            attended = across_heads(attended, self.heads, self.head_dim)
        a = clipped(attended, self.spec, self.learned)
        if self.basis is None:
            return a
        a = a.unflatten(-1, (-1, self.head_dim))
        if self.learned.scale is not None:
            a = _times(a, _per_query_head(self.learned.scale, a.shape[-2]), -1)
        return (a @ _differentiable(self.basis, a.dtype).T).flatten(-2)


class DownFront(nn.Module):
    """What down_proj reads: its input rotated online by the Hadamard R4 and quantised.

    unfold: down_proj has R4 not folded in, so that what is quantised is rotated and scaled back: Q((m * s) R4) R4^T / s.
    """

    def __init__(
        self, spec: QuantSpec, hadamard: tuple[Tensor, ...], learned: Learned = NOTHING, unfold: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.learned, self.unfold = spec, learned, unfold
        self.hadamard = hadamard  # Kronecker factors of R4, normalised; () leaves R4 out

    def forward(self, m: Tensor) -> Tensor:
        """m [..., intermediate] to the same."""
        if _mode.plain and (self.unfold or not self.hadamard):
            return m
        if self.learned.scale is not None and not _mode.plain:
            m = _times(m, self.learned.scale)
        if self.hadamard:
            m = online_transform(m, self.hadamard)
        if _mode.plain:
            return m
        m = clipped(m, self.spec, self.learned)
        if self.unfold and self.hadamard:
            m = kronecker_apply(m, self.hadamard, inverse=True)
        return m if self.learned.scale is None else _times(m, self.learned.scale, -1)


class FrontedLinear(nn.Module):
    """A linear behind the site that prepares its input; apart, so that calibration can read what lies between them.

    keep: let recomputation keep the result, for a linear whose result others are computed from (o_proj's feeds the residual).
    """

    def __init__(self, front: nn.Module, linear: nn.Linear, keep: bool = False) -> None:
        super().__init__()
        self.front, self.linear, self.keep = front, linear, keep

    def forward(self, x: Tensor) -> Tensor:
        """The linear of the prepared input."""
        x = self.front(x)
        if not self.keep:
            return self.linear(x)
        y = kept_matmul(x, self.linear.weight.T)
        return y if self.linear.bias is None else y + self.linear.bias


class KeySite(nn.Module):
    """The online Hadamard R3 on q and k after RoPE and the quantiser of the K cache; called by our attention function.

    With a learned scale t [kv_heads or 1, d / 2], one number for both channels of a RoPE pair (j, j + d/2), which therefore
    commutes with RoPE: Q((k * t) R3) and (q / t) R3.
    """

    def __init__(self, spec: QuantSpec, hadamard: tuple[Tensor, ...] = (), learned: Learned = NOTHING) -> None:
        super().__init__()
        self.spec, self.hadamard, self.learned = spec, hadamard, learned

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query [batch, heads, T, d], key [batch, kv_heads, T, d] to the same."""
        if _mode.plain:
            return query, key
        if self.learned.scale is not None:
            t = torch.cat((self.learned.scale, self.learned.scale), -1)  # [kv_heads or 1, d]
            query = _times(query, _per_query_head(t, query.shape[1]).unsqueeze(-2), -1)
            key = _times(key, t.unsqueeze(-2))
        if self.hadamard:
            query, key = online_transform(query, self.hadamard), online_transform(key, self.hadamard)
        return query, clipped(key, self.spec, self.learned)


def _per_query_head(scale: Tensor, heads: int) -> Tensor:
    """[kv_heads or 1, d] repeated for the query heads of each group: [heads, d]."""
    return scale.repeat_interleave(heads // scale.shape[0], 0)


def _differentiable(basis: Basis, dtype: torch.dtype) -> Tensor:
    """R with its gradient path: the value of (I + Omega) R at Omega = 0, differentiable in Omega in the tilt's dtype."""
    if basis.tilt is None:
        return basis.value.to(dtype)
    return _Tilted.apply(basis.tilt, basis.value).to(dtype)


class _Tilted(torch.autograd.Function):
    """R(Omega) = (I + Omega) R at Omega = 0, so dOmega = G R^T; no matmul in the forward."""

    @staticmethod
    def forward(ctx: Any, tilt: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.tilt_dtype = tilt.dtype
        return rotation.to(tilt.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return g.to(ctx.tilt_dtype) @ rotation.to(ctx.tilt_dtype).T, None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' SDPA attention with the layer's `key_site` applied to q and k (post-RoPE, before repeat_kv)."""
    site = getattr(module, "key_site", None)
    if site is not None:
        query, key = site(query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# Both registries, or padding and sliding windows are silently lost.
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
