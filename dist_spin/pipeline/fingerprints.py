"""Fingerprints: everything that decides the content of stored hidden states and quantised layers, as plain values.

`storage.tensor_file.identity_hash` makes a hash of them, which is written into each file; a file with another hash is not used.
Settings are named as they were when they first came up (`flat`), so that the files of older runs keep their hashes.
"""

import dataclasses
import json
from typing import Any

from torch import Tensor

from dist_spin.config.loader import RENAMED
from dist_spin.config.run import RunConfig
from dist_spin.data import tokens_fingerprint
from dist_spin.model.families import FAMILIES
from dist_spin.model.llama_form import LlamaFormWeights
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.model import model_dtype
from dist_spin.pipeline.variants import Variant
from dist_spin.storage.run_directory import LEARNED
from dist_spin.storage.tensor_file import identity_hash

EMBEDDING_SETTINGS = ("quant.embedding_bits", "quant.head_bits")  # decide nothing about layers
# Entries of config.json that do not change what a layer computes; the number format is a setting of the run.
NAMES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
WEIGHT_SETTINGS = ("quant.w_", "quant.down_bits", *EMBEDDING_SETTINGS)  # beginnings of what decides weights alone


NEWER: dict[str, Any] = {  # settings that runs of before do not name, with what those did
    "quant.a_group_size": 0,
    "rotation.r1": True,
    "quant.k_bias_apart": False,
    "optimize.teacher_top_k": 0,
    "quantize.tune_steps": 0,
    "quantize.tune_lr": 1e-3,
    "quantize.expert_tokens": "auto",
    "rotation.block": 0,
    "rotation.block_shared": False,
    **dict.fromkeys(("quant.w_format", "quant.a_format", "quant.kv_format"), "int"),
}


def flat(settings: Any, prefix: str) -> dict[str, Any]:
    """The fields of a settings dataclass as `prefix.field`, for fingerprints: by their first names, so that runs stay known."""
    first = {new: old for old, new in RENAMED.items()}
    named = {first.get(key := f"{prefix}.{name}", key): value for name, value in vars(settings).items()}
    return {name: value for name, value in named.items() if name not in NEWER or NEWER[name] != value}


HALF = ("bfloat16", "float16")


def states_identity(config: RunConfig, files: ModelFiles, variant: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the hidden states of a variant's 16-bit model on the calibration sequences."""
    return {
        **model_identity(config, files, variant),
        "calibration": tokens_fingerprint(tokens),
        "sites": site_settings(config) if config.quantize.quantize_activations else "unquantized",
    }


def model_identity(config: RunConfig, files: ModelFiles, variant: Variant) -> dict[str, Any]:
    """Everything that decides a variant's 16-bit weights and online Hadamards."""
    method = {} if variant.method is None else {"recipe": variant.method.fingerprint}
    return {
        **method,
        "model": files.weights.fingerprint(),
        "dtype": dtype_name(config),
        "rotations": variant.digest,
        "online": config.rotation.online and variant.rotations is not None,
        "r4_block": config.rotation.r4_size,
        **({"heads": True} if variant.sites.heads else {}),
        # Runs of the other families were made before this was noted; their files keep their hashes.
        **(
            {"config": network_settings(files)}
            if files.shape.experts
            or isinstance(files.weights, LlamaFormWeights)
            or FAMILIES[files.config.model_type].without_r1
            else {}
        ),
    }


def network_settings(files: ModelFiles) -> dict[str, Any]:
    """What the model's config.json says of the network (angles of RoPE, eps of the norms, ...), but for names and formats."""
    stored: dict[str, Any] = json.loads((files.directory / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in stored.items() if name not in NAMES}


def site_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of what is quantised at run time: activations, keys and values."""
    return {k: v for k, v in flat(config.quant, "quant").items() if not k.startswith(WEIGHT_SETTINGS)}


def layer_identity(config: RunConfig, files: ModelFiles, variant: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the content of a variant's layer files."""
    settings = flat(config.quantize, "quantize")
    del settings["quantize.baselines"], settings["quantize.parallel"]  # decide nothing about layers
    tuned = config.quantize.tune_steps > 0 and variant.name == LEARNED  # no other variant is
    if not tuned:
        for name in ("quantize.tune_steps", "quantize.tune_lr"):
            settings.pop(name, None)
    if settings["quantize.layers_per_job"] >= files.shape.layers:  # one range of layers, however it was said
        settings["quantize.layers_per_job"] = 0
    # No setting of a site decides a weight that was calibrated without it and not tuned afterwards.
    seen = () if config.quantize.quantize_activations or tuned else site_settings(config)
    quant = {k: v for k, v in flat(config.quant, "quant").items() if k not in (*EMBEDDING_SETTINGS, *seen)}
    if config.quant.down_bits in (0, config.quant.w_bits):  # the same, however it was said
        del quant["quant.down_bits"]
    rounded = gptq_options(config).scale_dtype
    scales = {} if rounded is None else {"scales": str(rounded)}
    inputs = {"input_scales": True} if keeps_input_scales(config, variant) else {}
    return {**states_identity(config, files, variant, tokens), **quant, **settings, **scales, **inputs}


def layer_fingerprint(config: RunConfig, files: ModelFiles, variant: Variant, tokens: Tensor) -> str:
    """The fingerprint of a variant's layer files."""
    return identity_hash(layer_identity(config, files, variant, tokens))


def keeps_input_scales(config: RunConfig, variant: Variant) -> bool:
    """Whether a variant's layers hold calibrated scales of what its linears read, as NVFP4 activations need."""
    return config.quant.a_format == "nvfp4" and variant.sites.a.enabled


def gptq_options(config: RunConfig) -> GPTQOptions:
    """The solver's options of a configuration."""
    q, w = config.quantize, config.quant
    options = GPTQOptions(
        w.w_bits,
        w.w_symmetric,
        w.weights_per_scale,
        w.w_mse_clip,
        q.percdamp,
        q.block_size,
        q.act_order,
        clip_norm=q.clip_norm,
        format=w.w_format,
    )
    if w.w_format not in ("int", "fp8"):  # the others have a scale of their own
        return options
    # Runtimes hold scales in the model's number format; but vLLM those of fp8, and of weights that meet int8 activations as
    # int8, in fp32.
    int8 = w.arithmetic == "vllm" and w.w_bits == w.a_bits == 8 and w.down_bits in (0, 8) and not w.w_group_size
    wide = int8 or (w.arithmetic == "vllm" and w.w_format == "fp8")
    if w.arithmetic in ("compressed-tensors", "vllm") and not wide and dtype_name(config) in HALF:
        return dataclasses.replace(options, scale_dtype=model_dtype(config))
    return options
