"""Learning rotations with quantised weights: the layers of the rotated network, and the gradients of their rotations.

With W bits below 16 the rotation cannot stay at the sites: what is rounded is the merged weight. So the residual stream
is kept in the rotated basis and every linear runs on its rounded merged weight, W^ = Q(merge(W, R)), which an engine
quantises anew once per optimiser step (`merged_rows`) and keeps as codes. Straight-through, W^ moves with R as the merged weight
does. With a the quantised input of a linear and g the gradient of its output (row-vector convention, y = a W^T):

    q, k, gate, up   W^ ~ W R1          dR1 += (g W)^T a
    v                W^ ~ R2^T W R1     dR1 += ((g R2^T) W)^T a     dR2 += (W R1) (g^T a)^T
    o                W^ ~ R1^T W R2     dR1 += ((a R2^T) W^T)^T g   dR2 += ((g R1^T) W)^T a
    down (R4 in W)   W^ ~ R1^T W        dR1 += (a W^T)^T g

with R2 acting, and dR2 summed, per head. A linear pays one more product of its own size; no [out, in] gradient but v's is
ever formed. The leaves receive plain Euclidean gradients here (`Rotations` turns them into the lie_grad's).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM, Shape
from dist_spin.model.rotate_quantize import RotationParam, kept_matmul
from dist_spin.model.sites import DownProjInputQuant, KeySite, OProjInputQuant, ValueSite
from dist_spin.model.sites_config import Sites, keeps_bias_apart
from dist_spin.numerics.block_rotation import (
    apply_rotation,
    apply_rotation_left,
    matmul_wide,
    rotated_rows,
    rotation_gradient,
)
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.format_rounding import E4M3
from dist_spin.numerics.format_weights import e2m1_values, format_codes, format_scales, pack_e2m1, values_by_fields
from dist_spin.numerics.quantizer import (
    CLIP_NORM,
    STAGED_CLIP,
    QuantSpec,
    dequantize_weight,
    fake_quantize,
    pack_nibbles,
    quantize_weight,
    unpack_int4,
    weight_scales,
)

# Where a decoder layer keeps the parameters of each linear, within the layer.
LINEAR_ROLES = {
    f"{ATTENTION_NORM}.linears.0": "self_attn.q_proj",
    f"{ATTENTION_NORM}.linears.1": "self_attn.k_proj",
    f"{ATTENTION_NORM}.linears.2": "self_attn.v_proj",
    f"{MLP_NORM}.linears.0": "mlp.gate_proj",
    f"{MLP_NORM}.linears.1": "mlp.up_proj",
    "self_attn.o_proj.linear": "self_attn.o_proj",
    "mlp.down_proj.linear": "mlp.down_proj",
}
# Codes are bytes, but parameters of this type: FSDP2 of torch 2.11 cannot shard a parameter of integers.
BYTES = torch.float8_e5m2


@dataclass(frozen=True)
class WeightQuantizer:
    """How merged weights are rounded while rotations are learned; the fields are `quantizer.weight_scales`'s.

    format: int, or one of `formats.FORMATS`; each row has then a global scale of its own, where the format has one.
    """

    bits: int
    symmetric: bool = True
    group_size: int = 0
    mse_clip: bool = False
    format: str = "int"

    def packs(self, width: int) -> bool:
        """Whether rows of `width` codes are stored two per byte."""
        return self.bits <= 4 and width % 2 == 0

    def fit(self, merged: Tensor) -> "PackedWeight":
        """Codes and scales of rows of a merged weight [rows, in], the scales in fp32 (fp64 for fp64)."""
        if self.format != "int":
            scale = format_scales(
                merged,
                self.format,
                group_size=self.group_size,
                tensor_scale=None,
                norm=CLIP_NORM,
                search=self.mse_clip,
            )
            codes = format_codes(merged, scale, self.format)
            return PackedWeight(pack_e2m1(codes) if self.packs(merged.shape[1]) else codes.view(torch.uint8), scale)
        scale, zero = weight_scales(
            merged,
            self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            mse_clip=self.mse_clip,
            strides=STAGED_CLIP,
        )
        codes = quantize_weight(merged, scale, zero, self.bits, symmetric=self.symmetric, group_size=self.group_size)
        stored = pack_nibbles(codes) if self.packs(merged.shape[1]) else codes.view(torch.uint8)
        return PackedWeight(stored, scale, None if self.symmetric else zero)

    def weight(self, packed: "PackedWeight", like: Tensor, *, for_backward: bool = False) -> Tensor:
        """The rounded weight in the shape and dtype of `like` [out, in].

        for_backward: decode by other arithmetic, to the same bits. A compiler would find that a backward pass needs the
        value that its forward pass had, and keep whole weights of every layer in between.
        """
        codes = _decoded_for_backward(self, packed.codes, like) if for_backward else _decoded(self, packed.codes, like)
        zero = torch.zeros_like(packed.scale) if packed.zero is None else packed.zero
        return dequantize_weight(codes, packed.scale, zero, self.group_size, like.dtype)


def _decoded(spec: WeightQuantizer, stored: Tensor, like: Tensor) -> Tensor:
    if spec.format != "int":
        return e2m1_values(stored) if spec.packs(like.shape[1]) else stored.view(E4M3)
    if spec.packs(like.shape[1]):
        return unpack_int4(stored, symmetric=spec.symmetric)
    return stored.view(torch.int8) if spec.symmetric else stored


def _decoded_for_backward(spec: WeightQuantizer, stored: Tensor, like: Tensor) -> Tensor:
    if spec.format != "int":
        return values_by_fields(stored, packed=spec.packs(like.shape[1]))
    signed = stored.view(torch.int8)
    if spec.packs(like.shape[1]):
        both = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)  # shifts keep the sign
        return both if spec.symmetric else torch.where(both < 0, both + 16, both)
    if spec.symmetric:
        return torch.where(stored > 127, stored.to(torch.int16) - 256, stored.to(torch.int16))
    return torch.where(signed < 0, signed.to(torch.int16) + 256, signed.to(torch.int16))


class PackedWeight(NamedTuple):
    """A rounded weight [out, in]: codes uint8 [out, in or in / 2], scale and zero [out, groups]; symmetric: no zero."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


class FakeQuantLinear(nn.Module):
    """The parameters of a linear whose merged weight is rounded; its site computes the product.

    weight [out, in]: folded, unrotated; bias [out]: unrotated; codes (as BYTES), scale, zero: see `PackedWeight`. All frozen.
    """

    bias: nn.Parameter | None
    zero: nn.Parameter | None

    def __init__(self, linear: nn.Linear, spec: WeightQuantizer) -> None:
        super().__init__()
        self.spec, self.weight = spec, linear.weight
        self.register_parameter("bias", linear.bias)
        rows, width = linear.weight.shape
        groups, wide = width // (spec.group_size or width), accumulation_dtype(linear.weight.dtype)

        def frozen(columns: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(rows, columns, dtype=dtype, device=linear.weight.device), requires_grad=False
            )

        self.codes = frozen(width // 2 if spec.packs(width) else width, BYTES)
        self.scale = frozen(groups, wide)
        self.register_parameter("zero", None if spec.symmetric else frozen(groups, wide))

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.codes.view(torch.uint8), self.scale, self.zero)


class _FusedSlice(nn.Module):
    """In place of a linear whose result the site in front has computed together with others: takes its columns.

    behind: and those from here on, where the site has put the linear's bias.
    """

    def __init__(self, start: int, stop: int, behind: int = 0) -> None:
        super().__init__()
        self.start, self.stop, self.behind = start, stop, behind

    def forward(self, fused: Tensor) -> Tensor:
        own = fused[..., self.start : self.stop]
        return torch.cat((own, fused[..., self.behind :]), -1) if self.behind else own


class InputLinears(nn.Module):
    """Norm, quantiser and all linears that read it, as one product: [..., h] to [..., sum of out].

    The last linear of `linears` is v where `r2` is given. apart: the index of one whose bias goes behind all results.
    """

    def __init__(
        self,
        norm: nn.Module,
        spec: QuantSpec,
        linears: list[FakeQuantLinear],
        r1: RotationParam,
        r2: RotationParam | None,
        head_dim: int,
        apart: int | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.spec, self.r1, self.r2, self.head_dim, self.apart = norm, spec, r1, r2, head_dim, apart
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        a = fake_quantize(self.norm(x), self.spec)
        linears: list[Any] = list(self.linears)
        spec = linears[0].spec
        tensors = [t for linear in linears for t in (linear.weight, *linear.packed)]
        r2 = (None, None) if self.r2 is None else (self.r2.lie_grad, self.r2.value)
        y = _InputProduct.apply(a, self.r1.lie_grad, self.r1.value, *r2, spec, self.head_dim, *tensors)
        biases = [
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears
        ]
        if all(linear.bias is None for linear in linears):
            return y
        if self.r2 is not None:
            biases[-1] = rotate(biases[-1].view(-1, self.head_dim), self.r2).flatten()
        if self.apart is None:
            return y + torch.cat(biases)
        bias, biases[self.apart] = biases[self.apart], torch.zeros_like(biases[self.apart])
        return torch.cat((y + torch.cat(biases), bias.expand(*y.shape[:-1], -1)), -1)


class OutputLinear(nn.Module):
    """The linear that writes to the rotated residual stream, behind the site that prepares its input (o and down)."""

    def __init__(
        self,
        input_quant: nn.Module,
        linear: FakeQuantLinear,
        r1: RotationParam,
        r2: RotationParam | None,
        head_dim: int,
        *,
        keep: bool,
    ) -> None:
        super().__init__()
        self.input_quant, self.linear, self.r1, self.r2, self.head_dim, self.keep = (
            input_quant,
            linear,
            r1,
            r2,
            head_dim,
            keep,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., h]."""
        linear, r2 = self.linear, (None, None) if self.r2 is None else (self.r2.lie_grad, self.r2.value)
        y = _OutputProduct.apply(
            self.input_quant(x), self.r1.lie_grad, self.r1.value, *r2, linear.spec, self.head_dim, self.keep,
            linear.weight, *linear.packed,
        )  # fmt: skip
        return y if linear.bias is None else y + rotate(linear.bias[None], self.r1)[0]


class _InputProduct(torch.autograd.Function):
    """y = a [W^_1; W^_2; ...]^T, with the gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, leaf1: Tensor, r1: Tensor, leaf2: Tensor | None, r2: Tensor | None, spec: WeightQuantizer,
        head_dim: int, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(a, r1, r2, *tensors)
        ctx.spec, ctx.head_dim, ctx.wide = spec, head_dim, leaf1.dtype
        return a @ _stacked(spec, tensors).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, r1, r2, *tensors = ctx.saved_tensors
        d_a = g @ _stacked(ctx.spec, tensors, for_backward=True)
        a2, g2 = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        weights = tensors[::4]
        d_r2, through, start = None, None, 0
        for w in weights:
            part = g2[:, start : start + len(w)]  # [tokens, out]
            start += len(w)
            if r2 is not None and w is weights[-1]:
                rows = (-1, *r2.shape[:-1])  # of all heads, the repetitions of R2
                d_weight = matmul_wide(part.T, a2, ctx.wide).unflatten(0, rows)  # [heads, d, h], or d in blocks
                rotated_w = apply_rotation(w, r1, ctx.wide).unflatten(0, rows)
                d_r2 = (rotated_w @ d_weight.mT).sum(0)
                part = apply_rotation(part, r2.mT)
            through = part @ w if through is None else torch.addmm(through, part, w)
        assert through is not None
        d_r1 = rotation_gradient(through, a2, r1.shape, ctx.wide)
        return d_a, d_r1, None, d_r2, None, None, None, *(None,) * len(tensors)


class _OutputProduct(torch.autograd.Function):
    """y = a W^^T, with the gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, leaf1: Tensor, r1: Tensor, leaf2: Tensor | None, r2: Tensor | None, spec: WeightQuantizer,
        head_dim: int, keep: bool, *tensors: Tensor,  # noqa: FBT001 (autograd hands arguments on by position)
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(a, r1, r2, *tensors)
        ctx.spec, ctx.head_dim, ctx.wide = spec, head_dim, leaf1.dtype
        rounded = _stacked(spec, tensors)
        return kept_matmul(a, rounded.T) if keep else a @ rounded.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, r1, r2, *tensors = ctx.saved_tensors
        d_a = g @ _stacked(ctx.spec, tensors, for_backward=True)
        a2, g2, w = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1]), tensors[0]
        d_r2 = None
        if r2 is not None:
            q = apply_rotation(g2, r1.mT) @ w  # [tokens, heads * d]
            d_r2 = rotation_gradient(q, a2, r2.shape, ctx.wide)
            a2 = apply_rotation(a2, r2.mT)
        d_r1 = rotation_gradient(a2 @ w.T, g2, r1.shape, ctx.wide)
        return d_a, d_r1, None, d_r2, None, None, None, None, *(None,) * len(tensors)


def _stacked(spec: WeightQuantizer, tensors: Any, *, for_backward: bool = False) -> Tensor:
    """The rounded weights, one below the other; tensors: (weight, codes, scale, zero) of each."""
    parts = [
        spec.weight(PackedWeight(*tensors[i + 1 : i + 4]), tensors[i], for_backward=for_backward)
        for i in range(0, len(tensors), 4)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Rotate(torch.autograd.Function):
    """x R or x R^T with the Euclidean gradient of R going to its leaf in the leaf's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, r: Tensor, back: bool) -> Tensor:  # noqa: FBT001 (by position)
        ctx.save_for_backward(x, r)
        ctx.wide, ctx.back = leaf.dtype, back
        return apply_rotation(x, r.mT if back else r)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, r = ctx.saved_tensors
        d_r = rotation_gradient(g, x, r.shape, ctx.wide) if ctx.back else rotation_gradient(x, g, r.shape, ctx.wide)
        return apply_rotation(g, r if ctx.back else r.mT), d_r, None, None


def rotate(x: Tensor, rotation: RotationParam, *, back: bool = False) -> Tensor:
    """x R (x R^T with `back`) for x [..., n]; differentiable in x and in R, as a plain matrix."""
    return _Rotate.apply(x, rotation.lie_grad, rotation.value, back)


def attach_fake_quant(
    layer: nn.Module, shape: Shape, sites: Sites, quantizer: WeightQuantizer, r1: RotationParam, r2: RotationParam
) -> None:
    """Put sites and fake-quantised linears into one decoder layer on the meta device, in place.

    The counterpart of `sites_config.attach` for a network that lives in the rotated basis: r1, r2 must have leaves.
    """
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    bias_apart = keeps_bias_apart(attention, sites)
    for norm, owner, names, value_r2 in (
        (ATTENTION_NORM, attention, ("q_proj", "k_proj", "v_proj"), r2),
        (MLP_NORM, mlp, ("gate_proj", "up_proj"), None),
    ):
        linears = [FakeQuantLinear(getattr(owner, name), quantizer) for name in names]
        apart = names.index("k_proj") if bias_apart and "k_proj" in names else None
        site = InputLinears(getattr(layer, norm), sites.a, linears, r1, value_r2, shape.head_dim, apart)
        setattr(layer, norm, site)
        start, total = 0, sum(len(linear.weight) for linear in linears)
        for i, (name, linear) in enumerate(zip(names, linears, strict=True)):
            behind = total if i == apart else 0
            setattr(owner, name, _FusedSlice(start, start := start + len(linear.weight), behind))
    attention.v_proj = ValueSite(attention.v_proj, sites.v, shape.head_dim)
    o, down = (FakeQuantLinear(linear, quantizer) for linear in (attention.o_proj, mlp.down_proj))
    attention.o_proj = OutputLinear(
        OProjInputQuant(sites.o, shape.head_dim, None), o, r1, r2, shape.head_dim, keep=True
    )
    mlp.down_proj = OutputLinear(DownProjInputQuant(sites.a, sites.r4), down, r1, None, shape.head_dim, keep=False)
    attention.key_site = KeySite(sites.k, sites.r3, bias_apart=bias_apart)


def merged_rows(role: str, weight: Tensor, rows: slice, r1: Tensor, r2: Tensor, wide: torch.dtype) -> Tensor:
    """Rows of the merged weight of one linear, [rows, in] in `wide`.

    Args:
        role: the linear's last name, such as "q_proj". r1 [h, h], r2 [d, d]: in the weight's dtype; or their blocks.
        weight: the folded weight. For v, o and down the whole of it, since R1 or R2 mixes its rows; for the others the
            wanted rows alone.
    """
    if role == "o_proj":
        return rotated_rows(r1, apply_rotation(weight, r2), rows, wide)
    if role == "down_proj":
        return rotated_rows(r1, weight, rows, wide)
    if role == "v_proj":
        weight = apply_rotation_left(r2, weight)[rows]
    return apply_rotation(weight, r1, wide)
