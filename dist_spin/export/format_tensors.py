"""Number formats as compressed-tensors stores them: `float-quantized`, `mxfp8-quantized`, `mxfp4-` and `nvfp4-pack-quantized`.

E4M3 codes are stored as they are (`weight`), E2M1 codes two per byte (`weight_packed`). Scales: fp32 per row for fp8, exponents
biased by 127 as bytes for the MX formats, E4M3 beside one global scale in fp32 for NVFP4.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from dist_spin.numerics.format_rounding import E4M3
from dist_spin.numerics.format_weights import pack_e2m1, unpack_e2m1
from dist_spin.numerics.formats import FORMATS
from dist_spin.numerics.gptq import QuantizedWeight

LAYOUTS = {
    "fp8": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
WEIGHT, PACKED, SCALE, GLOBAL, INPUT_GLOBAL = (
    *("weight", "weight_packed", "weight_scale"),
    *("weight_global_scale", "input_global_scale"),
)
TENSORS = (WEIGHT, PACKED, SCALE, GLOBAL, INPUT_GLOBAL)
SCALE_DTYPES = {"e8m0": torch.uint8, "e4m3": E4M3}


def format_arguments(name: str, *, activations: bool) -> QuantizationArgs:
    """The library's description of weights, or of inputs, in the format `name`."""
    number_format = FORMATS[name]
    dtype = SCALE_DTYPES.get(number_format.scale)
    strategy = {"fp32": "token" if activations else "channel", "e8m0": "group", "e4m3": "tensor_group"}[
        number_format.scale
    ]
    return QuantizationArgs(
        num_bits=number_format.bits,
        type="float",
        symmetric=True,
        strategy=strategy,
        group_size=number_format.group or None,
        dynamic=("local" if name == "nvfp4" else True) if activations else False,
        scale_dtype=dtype,
        zp_dtype=dtype,
    )


def format_tensors(quantized: QuantizedWeight, name: str, tensor_scale: float | None) -> dict[str, Tensor]:
    """The tensors of a linear by the library's names; `format_weight` gives the codes and scales back."""
    codes, scale, _ = quantized
    scale = scale.float()
    stored = {PACKED: pack_e2m1(codes)} if FORMATS[name].bits == 4 else {WEIGHT: codes}
    if name == "fp8":
        return stored | {SCALE: scale}
    if tensor_scale is None:
        return stored | {SCALE: (torch.frexp(scale).exponent + 126).to(torch.uint8)}
    return stored | {SCALE: (scale * tensor_scale).to(E4M3), GLOBAL: torch.tensor([tensor_scale])}


def format_weight(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Codes, scale in fp32 and zeros of a linear from its tensors."""
    codes = unpack_e2m1(tensors[PACKED]) if PACKED in tensors else tensors[WEIGHT]
    scale = tensors[SCALE]
    if scale.dtype == torch.uint8:
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    scale = scale.float()
    if GLOBAL in tensors:
        scale = scale / tensors[GLOBAL]
    return QuantizedWeight(codes, scale, torch.zeros_like(scale))
