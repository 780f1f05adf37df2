"""What vLLM is to be told beside an export, which a checkpoint cannot say: its kernels, and the cache of keys and values."""

from typing import Any

from dist_spin.model.families import FAMILIES
from dist_spin.model.sites_config import Sites

KV_CACHE = {8: "int8_per_token_head", 4: "int4_per_token_head"}  # by bits; that of 4 rotates by a Hadamard of its own
ROUNDING_KERNEL = "humming"


def linear_backend(quantization: dict[str, Any]) -> str:
    """The value of --linear-backend that an export needs; empty where vLLM's own choice rounds activations.

    Of packed codes beside rounded activations, vLLM 0.32 takes the first kernel that reads the codes, and of those only
    Humming rounds activations: the others (Machete, Marlin, the CPU's) would leave them in 16 bits, without a word.

    Args:
        quantization: `quantization_config` of config.json; empty for a merged model.
    """
    groups = quantization.get("config_groups", {}).values()
    rounded = any(group["input_activations"] and group["format"] == "pack-quantized" for group in groups)
    return ROUNDING_KERNEL if rounded else ""


def kv_cache_dtype(sites: Sites) -> str:
    """The value of --kv-cache-dtype nearest to the run's quantisers of keys and values; "auto" where there is none.

    An engine rounds keys together with the bias of k_proj, which `sites.k_bias_apart` says that they do not bear.
    """
    if sites.k_bias_apart:
        return "auto"
    if sites.k.enabled and sites.k.format != "int":
        return "fp8" if sites.k.format == "fp8" and sites.k.bits == sites.v.bits else "auto"
    return KV_CACHE.get(sites.k.bits, "auto") if sites.k.bits == sites.v.bits else "auto"


def takes_activation(config: Any) -> bool:
    """Whether vLLM computes the activation of a model: its Llama and its like know SiLU alone. config: from transformers."""
    return getattr(config, "hidden_act", "silu") == "silu"


def tried_engine(config: Any) -> str:
    """The engine that has loaded a merged export of the family, and how far it computes the same; empty where none has."""
    engine = FAMILIES[config.model_type].engines
    return engine if engine.startswith("vLLM") and takes_activation(config) else ""


def serve_command(path: str, quantization: dict[str, Any], sites: Sites) -> str:
    """The command that serves an export with vLLM as it was measured, as far as vLLM can."""
    backend, cache = linear_backend(quantization), kv_cache_dtype(sites)
    words = ["vllm", "serve", path, *(["--linear-backend", backend] if backend else [])]
    return " ".join([*words, *(["--kv-cache-dtype", cache] if cache != "auto" else [])])
