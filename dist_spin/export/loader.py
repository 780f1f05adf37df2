"""The way back in: an exported directory as a transformers model that does what the run measured.

    model = dist_spin.load("runs/NAME/export/compressed-tensors", device="cuda")
    model.generate(...)

Other loaders leave out what their formats cannot say: the online Hadamards R3 and R4, and the quantisers of activations,
keys and values. Here they are put back, and weights come from codes and scales by the same arithmetic as in the run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.export.compressed import PACKED, PLAIN, SCALE, SHAPE, ZERO, bits_in, unpack
from dist_spin.export.format_tensors import INPUT_GLOBAL, LAYOUTS, TENSORS, format_weight
from dist_spin.export.hf import DOWN, FOREIGN_TYPE, ROTATED_DOWN
from dist_spin.export.sidecar import Sidecar, read_sidecar
from dist_spin.model.architecture import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER_LINEARS,
    MLP_NORM,
    Shape,
    layer_name,
)
from dist_spin.model.attention import SINKS
from dist_spin.model.experts import CORRECTION, ROUTERS
from dist_spin.model.families import FAMILIES
from dist_spin.model.full_model import build_full_model
from dist_spin.model.output_norms import OUTPUT_NORMS
from dist_spin.model.sites_config import INPUT_SCALES, SITE_OF_LINEAR, Sites
from dist_spin.model.weights import SafetensorsWeights
from dist_spin.numerics.quantizer import dequantize_weight
from dist_spin.runtime.prefetch import prefetched

KINDS = ("weight", "bias")
NORMS = ("self_attn.q_norm", "self_attn.k_norm", ATTENTION_NORM, MLP_NORM, *OUTPUT_NORMS)


def load(path: str | Path, device: str | torch.device = "auto") -> Any:
    """The model exported to `path` (format hf or compressed-tensors), on `device`, ready for `generate()`.

    Args:
        path: the directory. device: where all of it goes; "auto" takes CUDA where there is one.

    Returns:
        The family's own AutoModelForCausalLM class in the dtype of the run, in eval mode; weights dequantised. Moving it
        to another device or saving it is not supported: load it again, or copy the directory.

    Raises:
        UserError: the directory is no export, or its files are damaged or do not belong together.
    """
    directory = Path(path).expanduser()
    sidecar = read_sidecar(directory)
    return load_with_sites(directory, sidecar, sidecar.sites, device)


def load_with_sites(directory: Path, sidecar: Sidecar, sites: Sites, device: str | torch.device = "auto") -> Any:
    """`load` of the export that `sidecar` is of, with other quantisers at run time: what an engine without them computes.

    sites: must have the sidecar's online Hadamards, which the weights need.

    Raises:
        UserError: as `load`.
    """
    from transformers import AutoConfig, GenerationConfig

    content = json.loads((directory / "config.json").read_text())
    quantization = content.pop("quantization_config", {})
    model_type = content.pop("model_type")
    if model_type not in (sidecar.model_type, FOREIGN_TYPE.format(sidecar.model_type)):
        raise UserError(f"{directory}/config.json is of a {model_type}, not of a {sidecar.model_type}", "export again")
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = getattr(torch, sidecar.dtype)
    source = SafetensorsWeights(directory, FAMILIES[sidecar.model_type].norms)
    config = AutoConfig.for_model(sidecar.model_type, **content)
    shape = Shape.of(config)

    def roles(index: int) -> tuple[str, ...]:
        own = shape.layer(index)
        return (*own.linears, *ROUTERS) if own.experts else own.linears

    layers = prefetched(
        lambda index: _layer(source, index, roles(index), sidecar, quantization, dtype, target),
        range(shape.layers),
        target,
    )
    gain = source.rows(f"{FINAL_NORM}.weight", device=target)
    model = build_full_model(
        config,
        sites,
        layer=lambda index: next(layers),
        embedding=source.rows(f"{EMBEDDING}.weight", device=target),
        head=source.rows(f"{HEAD}.weight", device=target),
        # Ones where it is folded into the head; of norms that store w of a gain 1 + w it never is.
        final_gain=None if shape.norm != "rms from one" and (gain == 1).all() else gain,
        rotated=True,
        device=target,
        dtype=dtype,
    )
    model.name_or_path = str(directory)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _layer(
    source: SafetensorsWeights,
    index: int,
    roles: tuple[str, ...],
    sidecar: Sidecar,
    quantization: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Parameters of a decoder layer by their names within it; roles: its linears, and its router."""
    prefix = layer_name(index)

    def read(names: list[str]) -> dict[str, Tensor]:
        return {n: source.rows(f"{prefix}.{n}", device=device) for n in names if source.has(f"{prefix}.{n}")}

    of_linears = KINDS if sidecar.format == "hf" else ("bias",)  # elsewhere `weight` holds codes
    names = [f"{role}.{kind}" for role in roles for kind in (KINDS if role in ROUTERS else of_linears)]
    out = read([*names, *(f"{norm}.{kind}" for norm in NORMS for kind in KINDS), SINKS, CORRECTION])
    if sidecar.format == "hf":
        renamed = read([ROTATED_DOWN])
        return out | ({DOWN: renamed[ROTATED_DOWN]} if renamed else {})
    layouts = [group["format"] for group in quantization["config_groups"].values()]
    if layouts[0] in LAYOUTS.values():
        return out | _weights_in_format(source, prefix, dtype, device)
    for role in roles:
        if role in ROUTERS:
            continue
        stored = [kind for kind in (PACKED, PLAIN, SCALE, SHAPE, ZERO) if source.has(f"{prefix}.{role}.{kind}")]
        tensors = {kind: source.rows(f"{prefix}.{role}.{kind}", device=device) for kind in stored}
        bits, group = bits_in(quantization, role)
        codes, scale, zero = unpack(tensors, bits)
        out[f"{role}.weight"] = dequantize_weight(codes, scale, zero, group, dtype)
    return out


def _weights_in_format(
    source: SafetensorsWeights, prefix: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Weights of a layer's linears from a number format, and the global scales of their inputs where there are any."""
    out: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for role in LAYER_LINEARS:
        name = f"{prefix}.{role}"
        tensors = {
            kind: source.rows(f"{name}.{kind}", device=device) for kind in TENSORS if source.has(f"{name}.{kind}")
        }
        if INPUT_GLOBAL in tensors:
            scales[SITE_OF_LINEAR[role]] = tensors[INPUT_GLOBAL]
        codes, scale, zero = format_weight(tensors)
        out[f"{role}.weight"] = dequantize_weight(codes, scale, zero, codes.shape[1] // scale.shape[1], dtype)
    return out | ({INPUT_SCALES: torch.cat([scales[site] for site in sorted(scales)]).cpu()} if scales else {})
