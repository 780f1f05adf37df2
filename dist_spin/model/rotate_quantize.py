"""Rotate, quantise, rotate back: the operation at a quantiser site, with its gradients for activation and rotation."""

from typing import Any

import torch
from torch import Tensor

from dist_spin.numerics.block_rotation import apply_rotation, rotation_gradient
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize, range_gradients, range_quantize


class RotationParam:
    """One learned rotation as the sites see it. Not a module, so that no engine shards, casts or moves it.

    value: R [n, n], orthonormal, in the dtype of compute; refreshed in place after every step; no gradient. In blocks: they
           alone, as numerics/block_rotation.py has them.
    lie_grad:  the leaf that receives gradients in R's shape, fp32 (fp64 for fp64 compute): the coordinates Omega of
           R(Omega) = (I + Omega) R at Omega = 0, block by block. Its value is never read.
    """

    def __init__(self, value: Tensor, lie_grad: Tensor | None = None) -> None:
        self.value, self.lie_grad = value, lie_grad


class ScaleAndClip:
    """The scale and clip that are learned at one site, as leaves in the masters' dtype; None where there is none.

    scale: log of the per-channel scale. clip: logit of the clip ratio, a scalar. Not a module, as `RotationParam`.
    """

    def __init__(self, scale: Tensor | None = None, clip: Tensor | None = None) -> None:
        self.scale, self.clip = scale, clip


NO_SCALE_OR_CLIP = ScaleAndClip()


@torch.library.custom_op("dist_spin::kept_matmul", mutates_args=())
def kept_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., k] @ b [k, n] under a name of its own, so that model/activation_checkpoint.py can keep its result.

    b may be a rotation in blocks (numerics/block_rotation.py).
    """
    return apply_rotation(a, b)


@kept_matmul.register_fake
def _kept_matmul_shape(a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 2 and a.shape[-1] == len(b):
        return a.new_empty(*a.shape[:-1], b.shape[-1])
    return a.new_empty(a.shape)


def _kept_matmul_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    (b,) = ctx.saved_tensors
    return apply_rotation(g, b.mT), None  # b is frozen


kept_matmul.register_autograd(
    _kept_matmul_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1])
)


class _RotateQuantize(torch.autograd.Function):
    """x_hat = Q(x R) R^T, with straight-through gradients for x and the lie_grad of R.

    With e = Q(x R) - x R held constant (straight-through), x_hat = x R R^T + e R^T: on the manifold dx is the incoming
    gradient g itself, with no matmul. Turning R into (I + Omega) R changes x_hat by x (Omega + Omega^T) + e R^T Omega^T;
    the first term vanishes for every skew Omega, so the gradient along the manifold is the skew part of g^T (x_hat - x):
    one [n, T] x [T, n] matmul, which needs neither Q(x R) nor R again; of a rotation in blocks only these blocks of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lie_grad: Tensor, rotation: Tensor, spec: QuantSpec) -> Tensor:
        y = fake_quantize(apply_rotation(x, rotation), spec)
        x_hat = kept_matmul(y, rotation.mT)
        ctx.save_for_backward(x, x_hat)
        ctx.lie_grad_dtype, ctx.blocks = lie_grad.dtype, lie_grad.shape
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, x_hat = ctx.saved_tensors
        return g, rotation_gradient(g, x_hat - x, ctx.blocks, ctx.lie_grad_dtype), None, None


class _RotateScaleQuantize(torch.autograd.Function):
    """x_hat = Q_c((x R) * s) / s R^T: as `_RotateQuantize` for x and the lie_grad, which take e as it is.

    Log-scales and clip get the gradient through the range as well (`range_gradients`). With z = (x R) * s, g_u = g R the
    gradient of u = Q_c(z) / s, g_q = g_u / s and g_z that of z through Q_c, d log s = sum over tokens of g_z z - g_q Q_c(z).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lie_grad: Tensor,
        rotation: Tensor,
        scale: Tensor | None,
        clip: Tensor | None,
        spec: QuantSpec,
    ) -> Tensor:
        x_hat = kept_matmul(_scale_quantize(apply_rotation(x, rotation), scale, clip, spec), rotation.mT)
        ctx.save_for_backward(x, x_hat, rotation, scale, clip)
        ctx.lie_grad_dtype, ctx.spec = lie_grad.dtype, spec
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None, None]:
        x, x_hat, rotation, scale, clip = ctx.saved_tensors
        wide = accumulation_dtype(x.dtype)
        z, g_q = apply_rotation(x, rotation).to(wide), apply_rotation(g, rotation).to(wide)
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
        d_omega = rotation_gradient(g, x_hat - x, rotation.shape, ctx.lie_grad_dtype)
        return g, d_omega, None, d_scale, d_clip, None


def _scale_quantize(y: Tensor, scale: Tensor | None, clip: Tensor | None, spec: QuantSpec) -> Tensor:
    """Q_c(y * s) / s in y's dtype, computed in fp32 or wider."""
    ratio = None if clip is None else clip.sigmoid()
    if scale is None:
        return range_quantize(y, spec, ratio)
    wide = accumulation_dtype(y.dtype)
    s = scale.to(wide).exp()
    return (range_quantize(y.to(wide) * s, spec, ratio) / s).to(y.dtype)


def rotate_quantize(
    x: Tensor, rotation: RotationParam, spec: QuantSpec, learned: ScaleAndClip = NO_SCALE_OR_CLIP
) -> Tensor:
    """x_hat = Q(x R) R^T for x [..., n]; differentiable in x, in what is learned and, along the manifold, in the lie_grad of R.

    Only the skew part of the lie_grad's gradient has a meaning; `Rotations` takes it. Without a lie_grad: plain straight-through.
    """
    if learned.scale is not None or learned.clip is not None:
        assert rotation.lie_grad is not None, "scales and clips are learned together with a rotation"
        out: Tensor = _RotateScaleQuantize.apply(
            x, rotation.lie_grad, rotation.value, learned.scale, learned.clip, spec
        )
        return out
    if rotation.lie_grad is not None:
        return _RotateQuantize.apply(x, rotation.lie_grad, rotation.value, spec)
    return apply_rotation(fake_quantize(apply_rotation(x, rotation.value), spec), rotation.value.mT)


def clipped(x: Tensor, spec: QuantSpec, learned: ScaleAndClip) -> Tensor:
    """Q_c(x), its gradient through the range where a clip is learned, straight-through otherwise."""
    if learned.scale is None and learned.clip is None:
        return fake_quantize(x, spec)
    return range_quantize(x, spec, None if learned.clip is None else learned.clip.sigmoid())


def scale_channels(x: Tensor, log_scale: Tensor, sign: int = 1) -> Tensor:
    """x * s, or x / s for sign -1, in x's dtype; differentiable in both."""
    return (x * (sign * log_scale).exp()).to(x.dtype)


def differentiable_rotation(rotation: RotationParam, dtype: torch.dtype) -> Tensor:
    """R with its gradient path: the value of (I + Omega) R at Omega = 0, differentiable in Omega in the lie_grad's dtype."""
    if rotation.lie_grad is None:
        return rotation.value.to(dtype)
    return _AtIdentity.apply(rotation.lie_grad, rotation.value).to(dtype)


class _AtIdentity(torch.autograd.Function):
    """R(Omega) = (I + Omega) R at Omega = 0, so dOmega = G R^T; no matmul in the forward."""

    @staticmethod
    def forward(ctx: Any, lie_grad: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.lie_grad_dtype = lie_grad.dtype
        return rotation.to(lie_grad.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return g.to(ctx.lie_grad_dtype) @ rotation.to(ctx.lie_grad_dtype).mT, None
