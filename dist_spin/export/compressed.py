"""The compressed-tensors format: packed codes and scales as the layer files hold them, and the config that explains them.

Nothing is rounded again, so codes and scales come back exactly (`unpack`). They are stored in one of two ways (`layout`):

- `pack-quantized`: codes shifted to be unsigned, dense in int32 words along the input, low bits first (`weight_packed`);
- `int-quantized`: codes as int8 under the plain name `weight`, which kernels that multiply int8 by int8 read.

Weights in other number formats are stored as `format_tensors` says.
"""

import dataclasses
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.export.card import LOAD_EXAMPLE, MERGED
from dist_spin.export.export_job import DirectoryWriter, ExportFormat, ExportJob
from dist_spin.export.format_tensors import INPUT_GLOBAL, LAYOUTS, format_arguments, format_tensors
from dist_spin.export.serving import kv_cache_dtype, linear_backend, serve_command, tried_engine
from dist_spin.model.architecture import layer_name
from dist_spin.model.expert_storage import name_in_checkpoints
from dist_spin.model.experts import kept_dtype
from dist_spin.model.sites_config import INPUT_SCALES, SITE_OF_LINEAR, Sites
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.numerics.quantizer import QuantSpec, dequantize_weight
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.model import model_dtype
from dist_spin.storage.quantized_layers import QuantizedLayer

# Said in the file for every linear: the library's own choice beside int activations is unpacked int8, even of 4 bits.
PACK, INT, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
DOWN = "mlp.down_proj"
# What `transformers` prints in the error that it stops with, cut after 50 characters.
REFUSAL = "needs R4 online: dist_spin.load or vLLM"
PACKED, PLAIN, SCALE, ZERO, SHAPE = "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"


def prepare(job: ExportJob) -> DirectoryWriter:
    """The run's quantised layers, packed.

    Raises:
        UserError: the first layer cannot be used.
    """
    first = job.quantised_layer(job.files.shape.dense)  # with experts, where some layers have them
    entries = entries_of(job.sites, first)
    shared, kind = online_tensors(job.sites), job.files.config.model_type

    def layer(index: int) -> dict[str, Tensor]:
        tensors = packed_layer(job.quantised_layer(index), model_dtype(job.config), job.sites.a)
        named = {name_in_checkpoints(kind, name): tensor for name, tensor in tensors.items()}
        return named | (shared if index == 0 else {})

    def write(directory: Path) -> None:
        job.write_checkpoint(directory, layer, {"quantization_config": entries})
        job.write_sidecar(directory)

    return write


def layout(bits: int, activations: QuantSpec, *, symmetric: bool, group_size: int) -> str:
    """How a linear's codes are stored: the way for which vLLM has a kernel.

    Int8 by int8 products (CUTLASS on GPUs, oneDNN on CPUs) take plain int8 weights with one scale a row; of the same model
    packed, vLLM would ask for a kernel that only some GPUs have. Every other pair of widths has kernels for packed codes alone.

    Args:
        bits: of the weight. activations: of the linear's input. group_size: of the weight, 0 for one scale per row.
    """
    plain = bits == 8 and activations.bits == 8 and symmetric and not group_size and not activations.group_size
    return INT if plain else PACK


def packed_layer(layer: QuantizedLayer, dtype: torch.dtype, activations: QuantSpec) -> dict[str, Tensor]:
    """Tensors of one decoder layer by their names within it; what is not quantised goes to `dtype`.

    activations: of the inputs of its linears.

    Raises:
        UserError: a weight is more than codes and scales, so that the format would lose a part of it.
    """
    others = {name: tensor for name, tensor in layer.others.items() if name != INPUT_SCALES}
    out = {name: tensor.to(kept_dtype(name, dtype)) for name, tensor in others.items()}
    weights = layer.weights(torch.float32, next(iter(layer.quantized_weights.values())).codes.device)
    inputs = weights.pop(INPUT_SCALES, torch.empty(0)).tolist()
    for role, quantized in layer.quantized_weights.items():
        if not torch.equal(weights.pop(f"{role}.weight"), dequantize_weight(*quantized, layer.group_size)):
            raise UserError(
                f"{role} is more than codes and scales, which compressed-tensors cannot hold", "export as hf"
            )
        if layer.format != "int":
            found = format_tensors(quantized, layer.format, layer.tensor_scales.get(role))
            if inputs:
                found[INPUT_GLOBAL] = torch.tensor([inputs[SITE_OF_LINEAR[role]]])
            out |= {f"{role}.{name}": tensor for name, tensor in found.items()}
            continue
        bits = layer.bits[role]
        offset = 0 if layer.symmetric else 2 ** (bits - 1)  # the format's codes are signed either way

        def signed(codes: Tensor, offset: int = offset) -> Tensor:
            return (codes.to(torch.int16) - offset).to(torch.int8)

        out[f"{role}.{SCALE}"] = quantized.scale
        if layout(bits, activations, symmetric=layer.symmetric, group_size=layer.group_size) == INT:
            out[f"{role}.{PLAIN}"] = quantized.codes
            continue
        out[f"{role}.{PACKED}"] = pack_to_int32(signed(quantized.codes), bits)
        out[f"{role}.{SHAPE}"] = torch.tensor(quantized.codes.shape)
        if not layer.symmetric:
            out[f"{role}.{ZERO}"] = pack_to_int32(signed(quantized.zero), bits, packed_dim=0).contiguous()
    assert weights.keys() == layer.others.keys() - {INPUT_SCALES}
    return out


def unpack(tensors: dict[str, Tensor], bits: int) -> QuantizedWeight:
    """Codes, scale and zero of a linear from its tensors (`weight_packed`, ...), signed; the inverse of `packed_layer`."""
    scale = tensors[SCALE]
    if PLAIN in tensors:
        return QuantizedWeight(tensors[PLAIN], scale, torch.zeros_like(scale))
    shape = torch.Size(tensors[SHAPE].tolist())
    codes = unpack_from_int32(tensors[PACKED], bits, shape)
    if ZERO not in tensors:
        return QuantizedWeight(codes, scale, torch.zeros_like(scale))
    zero = unpack_from_int32(tensors[ZERO], bits, torch.Size((shape[0], scale.shape[-1])), packed_dim=0)
    return QuantizedWeight(codes, scale, zero.to(scale.dtype))


def is_down(role: str) -> bool:
    """Whether a linear is a down_proj, of the MLP or of an expert."""
    return role.endswith("down_proj")


def bits_in(quantization: dict[str, Any], role: str) -> tuple[int, int]:
    """Bits and group size (0: whole rows) of a linear, from the `quantization_config` that `config_entries` made."""
    groups = quantization["config_groups"]
    weights = groups["down" if is_down(role) and "down" in groups else "linears"]["weights"]
    return weights["num_bits"], weights["group_size"] or 0


def entries_of(sites: Sites, layer: QuantizedLayer) -> dict[str, Any]:
    """`config_entries` of a run's quantised layers, of which `layer` is one."""
    grid: dict[str, Any] = {"symmetric": layer.symmetric, "group_size": layer.group_size, "weight_format": layer.format}
    return config_entries(sites, layer.bits, **grid)


def config_entries(
    sites: Sites, bits: dict[str, int], *, symmetric: bool, group_size: int, weight_format: str = "int"
) -> dict[str, Any]:
    """`quantization_config` of config.json, through the library's own classes, which check it.

    Args:
        bits: of each linear's weight. group_size: 0 for one scale per row. weight_format: as `quant.w_format`.
    """

    def scheme(targets: list[str], width: int) -> QuantizationScheme:
        if weight_format != "int":
            return QuantizationScheme(
                targets=targets,
                weights=format_arguments(weight_format, activations=False),
                input_activations=_activations(sites.a),
                format=LAYOUTS[weight_format],
            )
        strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
        weights = QuantizationArgs(num_bits=width, type="int", symmetric=symmetric, dynamic=False, **strategy)
        stored = layout(width, sites.a, symmetric=symmetric, group_size=group_size)
        return QuantizationScheme(
            targets=targets, weights=weights, input_activations=_activations(sites.a), format=stored
        )

    most = {role: width for role, width in bits.items() if not is_down(role)}
    (width,), (down_width,) = set(most.values()), {width for role, width in bits.items() if is_down(role)}
    groups = {"linears": scheme(["Linear"], width)}
    if down_width != width:
        others = "|".join(sorted({role.rpartition(".")[2] for role in most}))
        both = [("linears", f"re:.*({others})$", width), ("down", r"re:.*down_proj$", down_width)]
        # The wider first: transformers, asked to dequantise, takes the first for all, which must then fail, not mislead.
        both.sort(key=lambda group: -group[2])
        groups = {name: scheme([target], width) for name, target, width in both}
    routers = (
        [r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$", r"re:.*block_sparse_moe\.gate$"] if DOWN not in bits else []
    )
    formats = sorted({group.format for group in groups.values()})
    config = QuantizationConfig(
        config_groups=groups,
        format=formats[0] if len(formats) == 1 else MIXED,
        quantization_status="compressed",
        ignore=["lm_head", *routers],
    )
    entries = config.model_dump(mode="json") | {"version": compressed_tensors.__version__}
    if sites.r4:
        # transformers leaves `transform_config` out silently, and would be wrong. It reads this figure, which decides
        # nothing, as a number, and stops; runtimes that apply `transform_config` do not look at it.
        entries["global_compression_ratio"] = REFUSAL
        entries["transform_config"] = _online_r4(sites).model_dump(mode="json")
    return entries


def _activations(spec: QuantSpec) -> QuantizationArgs | None:
    if not spec.enabled:
        return None
    if spec.format != "int":
        return format_arguments(spec.format, activations=True)
    scale = {"strategy": "group", "group_size": spec.group_size} if spec.group_size else {"strategy": "token"}
    return QuantizationArgs(num_bits=spec.bits, type="int", symmetric=spec.symmetric, dynamic=True, **scale)


def _online_r4(sites: Sites) -> TransformConfig:
    """R4 in front of down_proj, and its inverse as already merged into the weight."""
    block = 1
    for factor in sites.r4:
        block *= len(factor)
    target = ["re:.*down_proj$"]
    apply = [
        TransformArgs(targets=target, location="input"),
        TransformArgs(targets=target, location="weight_input", inverse=True),
    ]
    return TransformConfig(config_groups={"R4": TransformScheme(type="hadamard", head_dim=block, apply=apply)})


def online_tensors(sites: Sites) -> dict[str, Tensor]:
    """The Hadamard that loaders of `transform_config` read, unnormalised, for the first layer; all layers share it."""
    if not sites.r4:
        return {}
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in sites.r4:
        dense = torch.kron(dense, factor.sign())
    return {f"{DOWN}.R4_input.weight": dense.float()}


def loading(job: ExportJob) -> list[str]:
    """The lines of README.md on how to load the export."""
    if job.r4:
        return [
            "**A bare transformers `from_pretrained` stops with an error**, on purpose: it would leave out the Hadamard R4 in",
            f"front of down_proj, which the weights need (`global_compression_ratio` of config.json says `{REFUSAL}`",
            "instead of a number). Right are",
            "",
            LOAD_EXAMPLE,
            "",
            "and runtimes that apply `transform_config` of config.json online (vLLM with tensor-parallel size 1; it refuses",
            "more).",
            *_serving(job),
        ]
    return [
        f"Any program that loads the format: {MERGED[job.config.rotation.r1]} of the weights, nothing has to be rotated online.",
        *_serving(job),
        "",
        LOAD_EXAMPLE,
        "",
        "gives what was measured below, quantisers included.",
    ]


LIKE_VLLM = (
    "vLLM does: the largest is divided by 127 (7). Transformers divides by 127.5 (7.5), which "
    "`quant.arithmetic=compressed-tensors` learns, quantises and measures."
)
ACTIVATIONS = {  # how each `quant.arithmetic` rounds activations
    "compressed-tensors": "transformers does: the largest is divided by 127.5 (7.5). vLLM divides by 127 (7), which "
    "`quant.arithmetic=vllm` learns, quantises and measures.",
    "fp32": LIKE_VLLM,
    "vllm": LIKE_VLLM,
}


def _serving(job: ExportJob) -> list[str]:
    config, first = job.config, job.quantised_layer(job.files.shape.dense)
    entries = entries_of(job.sites, first)
    sites = job.sites
    if not job.files.weights.has(f"{layer_name(0)}.self_attn.k_proj.bias"):
        sites = dataclasses.replace(sites, k_bias_apart=False)  # nothing to keep apart
    command = serve_command("PATH OF THIS DIRECTORY", entries, sites)
    tried = config.quant.w_format == config.quant.a_format == config.quant.kv_format == "int"
    engine = tried_engine(job.files.config) if tried and not job.files.shape.experts else ""
    serves = (
        f"serves it with {engine}." if engine else "is vLLM's command for it, not tried with this format or family."
    )
    lines = ["", f"    {command}", "", serves]
    if linear_backend(entries):
        lines.append("Without its `--linear-backend`, vLLM would leave activations in 16 bits, without a word.")
    if kv_cache_dtype(sites) != "auto":
        lines.append(
            "Its cache of keys and values has the same bits by another rule: measure it (`dist-spin serve-check`)."
        )
    elif min(config.quant.k_bits, config.quant.v_bits) < 16:
        lines.append("The KV cache is quantised by `dist_spin.load` alone.")
    if config.quant.arithmetic == "compressed-tensors" and config.export.profile == "no-had":
        lines.append("Bare transformers rounds what the linears read and hold as measured below, to the bit.")
    if config.quant.arithmetic == "fp32" and dtype_name(config) in ("bfloat16", "float16"):
        lines.append("Scales are in fp32 here; a program that holds them in 16 bits rounds them, by up to 0.2 %.")
    if config.quant.a_bits < 16 and config.quant.a_format == "int":
        lines.append(f"Activations are rounded here as {ACTIVATIONS[config.quant.arithmetic]}")
    return lines


FORMAT = ExportFormat(prepare, loading)
