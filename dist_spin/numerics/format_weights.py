"""Weights in floating-point formats: their scales, with a search, their codes, and how those are packed.

Codes are element values held as E4M3, which has all of E2M1's, so that `quantizer.dequantize_weight` takes them as it takes
integers. Scales are what elements are multiplied by, in fp32 values whatever the dtype: for NVFP4 the quotient of its two.
"""

import torch
from torch import Tensor

from dist_spin.numerics.format_rounding import E4M3, global_scale, group_scales, round_elements
from dist_spin.numerics.formats import FORMATS, NumberFormat
from dist_spin.numerics.quantizer import GPU_SEARCH_ELEMENTS, ROW_TILE


def tensor_scale_of(w: Tensor) -> float:
    """NVFP4's global scale of a weight, or of several that share one, stacked."""
    return float(global_scale(w.float().abs().amax()))


def format_scales(
    w: Tensor, name: str, *, group_size: int, tensor_scale: float | None, norm: float, search: bool
) -> Tensor:
    """Scales [out, n] of w [out, in] in the format `name`, in w's dtype.

    group_size: neighbours that share one, 0 for the row. tensor_scale: NVFP4's global scale, None: each row has its own.
    search: of the format's `factors` of each plain scale, take the one of least sum of |error| ** norm, the first in a tie.
    NaN in a group gives NaN in its weights. Raises ValueError for a group that does not divide `in`.
    """
    columns = w.shape[1]
    if columns % (group_size or columns):
        raise ValueError(f"group_size {group_size} does not divide the last dimension, {columns}")
    number_format = FORMATS[name]
    given = None if tensor_scale is None else torch.full((1,), tensor_scale, device=w.device)
    groups = w.float().unflatten(1, (-1, group_size or columns))
    # Equal chunks, so that a row's result is the same whichever rows come with it (see `quantizer.weight_scales`).
    at_once = GPU_SEARCH_ELEMENTS // columns if search else len(w)
    chunks = groups.split(ROW_TILE if w.device.type == "cpu" else max(ROW_TILE, at_once))
    fitted = [_best_scales(chunk, number_format, given, norm, search=search) for chunk in chunks]
    return torch.cat(fitted).to(w.dtype)


def _best_scales(
    groups: Tensor, number_format: NumberFormat, tensor_scale: Tensor | None, norm: float, *, search: bool
) -> Tensor:
    """Scales [out, n] of groups [out, n, group]."""
    largest = groups.abs().amax(-1)
    if number_format.scale == "e4m3" and tensor_scale is None:
        tensor_scale = global_scale(largest.amax(-1, keepdim=True))
    best = group_scales(largest, number_format, tensor_scale)
    if not search or len(number_format.factors) == 1:
        return best
    best_error = _error(groups, best, number_format, norm)
    for factors in [number_format.factors[1:]] if groups.is_cuda else [[f] for f in number_format.factors[1:]]:
        tried = torch.stack(
            [largest * factor for factor in factors]
        )  # together on a GPU, where few launches count for more
        scales = group_scales(tried, number_format, tensor_scale)
        for scale, error in zip(scales, _error(groups, scales, number_format, norm), strict=True):
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def _error(groups: Tensor, scale: Tensor, number_format: NumberFormat, norm: float) -> Tensor:
    scale = scale.unsqueeze(-1)
    return (round_elements(groups / scale, number_format) * scale - groups).abs_().pow_(norm).sum(-1)


def format_codes(w: Tensor, scale: Tensor, name: str) -> Tensor:
    """Codes [..., out, in] of w [..., out, in], rounded to nearest under scales [..., out, n]: values in E4M3."""
    groups = w.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    return round_elements(groups / scale.unsqueeze(-1), FORMATS[name]).flatten(-2).to(E4M3)


def pack_e2m1(values: Tensor) -> Tensor:
    """Two E2M1 values [..., in] per byte, uint8 [..., in / 2], the even column in the low half; signs are the high bits."""
    doubled = values.to(torch.float32) * 2  # 0, 1, 2, 3, 4, 6, 8, 12
    size = doubled.abs().to(torch.uint8)
    code = torch.where(size <= 4, size, torch.where(size == 12, 7, size // 2 + 2)).to(torch.uint8)
    code = code | (torch.signbit(doubled).to(torch.uint8) << 3)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of `pack_e2m1`: uint8 [..., in / 2] to values [..., in] in E4M3."""
    return e2m1_values(packed).to(E4M3)


def e2m1_values(packed: Tensor) -> Tensor:
    """`unpack_e2m1` in fp32."""
    nibbles = _nibbles(packed)
    size = (nibbles & 7).float()
    size = torch.where(size <= 4, size / 2, torch.where(size == 7, 6.0, size - 2))
    return torch.where(nibbles > 7, -size, size)


def values_by_fields(stored: Tensor, *, packed: bool) -> Tensor:
    """Values [..., in] in fp32 of codes as bytes, E2M1 packed or E4M3, from their exponents and mantissas."""
    codes = _nibbles(stored) if packed else stored
    mantissa_bits, bias = (1, 1) if packed else (3, 7)
    exponent_bits = 2 if packed else 4
    mantissa = (codes & (2**mantissa_bits - 1)).float()
    exponent = ((codes >> mantissa_bits) & (2**exponent_bits - 1)).float()
    size = torch.where(exponent == 0, 2 * mantissa, mantissa + 2**mantissa_bits) * torch.exp2(
        exponent - bias - mantissa_bits
    )
    return torch.where(codes >= 2 ** (mantissa_bits + exponent_bits), -size, size)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
