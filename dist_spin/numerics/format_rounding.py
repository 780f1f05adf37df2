"""Rounding to the formats of `formats`, and the scales of groups.

An element is E4M3 (largest 448) or E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6). A group of neighbours along the last dimension shares a
scale s, and x comes back as s * round(x / s), rounding half to even, saturating. Scales are computed as compressed-tensors 0.20
does, bit for bit, in the dtype of what is given:

- fp8: largest / 448, one for the whole row;
- mxfp8, mxfp4 (OCP MX): a power of two for 32 elements, that of the largest, rounded up from 1.75 times it on, divided by that
  of the format's largest element. A largest value whose power of two, so rounded, is infinite gives NaN;
- nvfp4: E4M3 for 16 elements, times one number for the tensor: E4M3(g * largest / 6) / g, with the global scale g = 448 * 6 /
  the tensor's largest (`global_scale`). Where none is known each row takes its own, which differs by the rounding of scales
  alone.
"""

import torch
from torch import Tensor

from dist_spin.numerics.formats import E2M1_MAX, E4M3_MAX, FORMATS, NumberFormat

E4M3 = torch.float8_e4m3fn
E8M0_FOR_ZERO, E4M3_FOR_ZERO = 1.0, 0.125  # scales in place of 0; of fp8 it is the dtype's epsilon
INTS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
EXPONENT_BIAS = {torch.float16: 15, torch.bfloat16: 127, torch.float32: 127, torch.float64: 1023}


def grouped(x: Tensor, group_size: int) -> Tensor:
    """View [..., d] as [..., d / group, group]; 0 groups all of d. Raises ValueError when the group does not divide d."""
    width = x.shape[-1]
    group = group_size or width
    if width % group:
        raise ValueError(f"group_size {group} does not divide the last dimension, {width}")
    return x.unflatten(-1, (width // group, group))


def round_elements(x: Tensor, number_format: NumberFormat) -> Tensor:
    """x, already divided by its scale, to the nearest elements of a format; same dtype, NaN stays."""
    x = x.clamp(-number_format.largest, number_format.largest)
    if number_format.bits == 8:
        return x.to(E4M3).to(x.dtype)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.round(x / step) * step


SATURATES_BEYOND = E4M3_MAX / 2.0**-6  # times what is usual: E4M3's largest number over its smallest normal one


def global_scale(largest: Tensor) -> Tensor:
    """NVFP4's global scale of tensors with these largest absolute values, fp32; 1 where it is no finite number."""
    scale = E4M3_MAX * E2M1_MAX / largest.clamp(min=torch.finfo(largest.dtype).tiny)
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0, neginf=1.0).float()


def group_scales(largest: Tensor, number_format: NumberFormat, tensor_scale: Tensor | None = None) -> Tensor:
    """Scale of each group, by which elements are divided, from its largest absolute value [..., groups].

    tensor_scale: NVFP4's global scale, broadcastable; None takes that of the largest along the last dimension. Returns
    [..., groups] in the dtype of `largest`, for NVFP4 in fp32 or wider.
    """
    if number_format.scale == "e8m0":
        return _power_of_two(largest, number_format)
    scale = largest / largest.new_full((), number_format.largest)  # by a tensor: CUDA rounds that division correctly
    if number_format.scale == "fp32":
        return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    if tensor_scale is None:
        tensor_scale = global_scale(largest.amax(-1, keepdim=True).float())
    scale = (
        (tensor_scale * scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).to(torch.promote_types(scale.dtype, torch.float32))
    )
    return torch.where(scale == 0, E4M3_FOR_ZERO, scale) / tensor_scale


def _power_of_two(largest: Tensor, number_format: NumberFormat) -> Tensor:
    dtype = largest.dtype
    mantissa = MANTISSA[dtype]
    # A quarter added to the mantissa carries into the exponent from 1.75 on.
    rounded = (largest.contiguous().view(INTS[dtype]).to(torch.int64) + (1 << (mantissa - 2))) >> mantissa
    infinite = rounded >= 2 * EXPONENT_BIAS[dtype] + 1
    offset = 2 if number_format.bits == 4 else 8  # exponent of the largest element
    code = (rounded - EXPONENT_BIAS[dtype] + 127 - offset).clamp(0, 255)
    code = torch.where(rounded == 0, 0, torch.where(infinite, 255, code))  # E8M0, biased by 127
    # fp32 with this exponent: 255 is infinity, and 0, which stands for 2^-127, is a subnormal number.
    bits = torch.where(code == 0, 1 << 22, code << 23).to(torch.int32)
    scale = bits.view(torch.float32).to(dtype)
    return torch.where(scale == 0, E8M0_FOR_ZERO, scale)


def round_groups(groups: Tensor, name: str, tensor_scale: float = 0.0) -> Tensor:
    """Groups [..., n, group] in the format `name` and back, in a dtype that may be wider; tensor_scale 0: each row its own."""
    number_format = FORMATS[name]
    given = torch.full((1,), tensor_scale, device=groups.device) if tensor_scale else None
    scale = group_scales(groups.abs().amax(-1), number_format, given).unsqueeze(-1)
    return round_elements(groups / scale, number_format) * scale


def group_gradient(groups: Tensor, g: Tensor, name: str) -> Tensor:
    """Gradient of <g, Q(groups)> by groups [..., n, group], where the scale follows a group's largest value.

    Only rounding is held constant, of elements and of scales: with Q = s * element and s proportional to the largest value,
    dQ = dx + (Q - x) ds / s inside the range, and (Q / s) ds beyond it. A group whose members all grow alike keeps its relative
    error, and the gradient says so: <group_gradient, x> = <g, Q(x)>. With NVFP4, each row has its own global scale.
    """
    number_format = FORMATS[name]
    largest = groups.abs().amax(-1, keepdim=True)
    scale = group_scales(largest.squeeze(-1), number_format).unsqueeze(-1)
    units = groups / scale
    inside = units.abs() <= number_format.largest
    elements = round_elements(units, number_format)
    d_scale = (g * (elements - torch.where(inside, units, 0.0))).sum(-1, keepdim=True)
    extreme = (groups.abs() == largest) & (largest > 0)
    share = d_scale * scale / torch.where(largest > 0, largest, 1.0) / extreme.sum(-1, keepdim=True).clamp(min=1)
    return g * inside + extreme * torch.sign(groups) * share
