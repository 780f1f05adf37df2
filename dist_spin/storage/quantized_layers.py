"""One file per quantised decoder layer: codes, scales, what was left alone, where it came from and how good it is.

The embedding and lm_head, where they are quantised, share a file beside them.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.model.attention import SINKS
from dist_spin.model.experts import CORRECTION, kept_dtype
from dist_spin.model.sites_config import INPUT_SCALES
from dist_spin.numerics.format_weights import pack_e2m1, unpack_e2m1
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.numerics.quantizer import dequantize_weight, pack_int4, unpack_int4
from dist_spin.storage.tensor_file import CorruptFile, load_if_current, load_tensors, save_tensors


@dataclass
class QuantizedLayer:
    """A decoder layer after quantisation.

    quantized_weights: linear (`self_attn.q_proj`, ...) -> codes and scales. others: remaining parameters (biases, q/k norms,
    and the layer norms of a model that was not rotated) by their names within the layer, INPUT_SCALES where inputs of
    linears are NVFP4, and for a linear some of whose columns are exact, ROLE.kept (their indices) and ROLE.columns [out, n].
    figures: per linear, `error` (relative output error), `rtn_error` (the same for rounding to nearest) and `damping`. bits: of
    each linear's codes. format: of the weights, as `quant.w_format`. tensor_scales: NVFP4's global scale of each linear.
    """

    quantized_weights: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    figures: dict[str, dict[str, float]]
    bits: dict[str, int]
    symmetric: bool
    group_size: int
    format: str = "int"
    tensor_scales: dict[str, float] = field(default_factory=dict)

    def weights(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """All parameters by their names within the layer, dequantised."""
        exact = {name for role in self.quantized_weights for name in (f"{role}.kept", f"{role}.columns")}
        kept = {name: tensor for name, tensor in self.others.items() if name not in exact}
        out = {name: tensor.to(device, kept_dtype(name, dtype)) for name, tensor in kept.items()}
        if INPUT_SCALES in self.others:  # no parameters: they stay as they are
            out[INPUT_SCALES] = self.others[INPUT_SCALES]
        for role, quantized in self.quantized_weights.items():
            codes, scale, zero = (t.to(device) for t in quantized)
            out[f"{role}.weight"] = dequantize_weight(codes, scale, zero, self.group_size, dtype)
            if f"{role}.kept" in self.others:
                indices, columns = (self.others[f"{role}.{kind}"].to(device) for kind in ("kept", "columns"))
                out[f"{role}.weight"][:, indices] = columns.to(dtype)
        return out


def layer_path(directory: Path, index: int) -> Path:
    """The file of layer `index`."""
    return directory / f"{index:03d}.safetensors"


def save_layer(path: Path, layer: QuantizedLayer, fingerprint: str) -> None:
    """Write one layer, atomically and with a checksum; 4-bit codes are packed two to a byte."""
    tensors = dict(layer.others)
    for role, quantized in layer.quantized_weights.items():
        packed = layer.bits[role] == 4 and quantized.codes.shape[-1] % 2 == 0
        pack = pack_int4 if layer.format == "int" else pack_e2m1
        tensors[f"{role}.packed" if packed else f"{role}.codes"] = pack(quantized.codes) if packed else quantized.codes
        tensors[f"{role}.scale"] = quantized.scale
        if not layer.symmetric:
            tensors[f"{role}.zero"] = quantized.zero
    header = {
        "bits": layer.bits,
        "symmetric": layer.symmetric,
        "group_size": layer.group_size,
        "figures": layer.figures,
    }
    if layer.format != "int":
        header |= {"format": layer.format, "tensor_scales": layer.tensor_scales}
    save_tensors(path, tensors, {"fingerprint": fingerprint, "name": path.name, "layer": json.dumps(header)})


def load_layer(path: Path, device: torch.device | str = "cpu") -> tuple[QuantizedLayer, str]:
    """A layer on `device`, where its codes are unpacked, and the fingerprint in its header.

    Raises:
        CorruptFile: see `tensor_file.load_tensors`; or it is no layer file.
    """
    tensors, metadata = load_tensors(path, device)
    if "layer" not in metadata or metadata["name"] != path.name:
        raise CorruptFile(f"{path}: is the file {metadata.get('name')} of something else")
    header = json.loads(metadata["layer"])
    quantized_weights, others = {}, {}
    for name, tensor in tensors.items():
        role, _, kind = name.rpartition(".")
        if kind in ("packed", "codes"):
            codes = tensor
            if kind == "packed":
                whole = "format" not in header
                codes = unpack_int4(tensor, symmetric=header["symmetric"]) if whole else unpack_e2m1(tensor)
            scale = tensors[f"{role}.scale"]
            quantized_weights[role] = QuantizedWeight(
                codes, scale, tensors.get(f"{role}.zero", torch.zeros_like(scale))
            )
        elif kind in ("weight", "bias", "kept", "columns") or name in (INPUT_SCALES, SINKS, CORRECTION):
            others[name] = tensor
    return QuantizedLayer(
        quantized_weights, others, **{f.name: header[f.name] for f in fields(QuantizedLayer) if f.name in header}
    ), (metadata["fingerprint"])


def finished_layer(
    path: Path, fingerprint: str, warn: Callable[[str], None], device: torch.device | str = "cpu"
) -> QuantizedLayer | None:
    """The layer at `path`, on `device`, if whole and of this `fingerprint`; anything else is set aside, saying so."""
    load = functools.partial(load_layer, device=device)
    return load_if_current(path, load, lambda made_from: made_from == fingerprint, "doing the layer again", warn)


def embeddings_path(directory: Path) -> Path:
    """The file of the quantised embedding and lm_head."""
    return directory / "ends.safetensors"


def save_embeddings(path: Path, embeddings: dict[str, QuantizedWeight], bits: dict[str, int], fingerprint: str) -> None:
    """Write `embedding` and `head`, those there are, atomically and with a checksum; codes are symmetric, one per byte."""
    tensors = {f"{end}.codes": quantized.codes for end, quantized in embeddings.items()}
    tensors |= {f"{end}.scale": quantized.scale for end, quantized in embeddings.items()}
    save_tensors(path, tensors, {"fingerprint": fingerprint, "name": path.name, "bits": json.dumps(bits)})


def load_embeddings(path: Path) -> tuple[dict[str, QuantizedWeight], str]:
    """The quantised embedding and lm_head, those there are, and the fingerprint in their header.

    Raises:
        CorruptFile: see `tensor_file.load_tensors`; or it is another kind of file.
    """
    tensors, metadata = load_tensors(path)
    if "bits" not in metadata or metadata["name"] != path.name:
        raise CorruptFile(f"{path}: is the file {metadata.get('name')} of something else")
    embeddings = {}
    for end in json.loads(metadata["bits"]):
        scale = tensors[f"{end}.scale"]
        embeddings[end] = QuantizedWeight(tensors[f"{end}.codes"], scale, torch.zeros_like(scale))
    return embeddings, metadata["fingerprint"]


def finished_embeddings(path: Path, fingerprint: str, warn: Callable[[str], None]) -> dict[str, QuantizedWeight] | None:
    """The embedding and lm_head at `path`, if whole and of this `fingerprint`; anything else is set aside, saying so."""
    return load_if_current(path, load_embeddings, lambda made_from: made_from == fingerprint, "making it again", warn)
