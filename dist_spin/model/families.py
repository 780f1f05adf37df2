"""The model families that can be rotated, as data: one row per `model_type` of transformers, and why others are refused.

A family with Llama's module names (`architecture.LAYER_LINEARS`) is a row alone. One that computes the same as a Llama or
Mistral with other weights, because it fuses or scales them, also says in `llama_form` how its weights are read. docs/models.md is
made from this table, and tests/test_families.py proves each row.
"""

from dataclasses import dataclass
from typing import Any

from dist_spin.errors import UserError


@dataclass(frozen=True)
class Family:
    """One architecture.

    models: published ones, for docs/models.md. windows: which layers attend to `sliding_window` tokens alone: none, all of
    them, or those that `layer_types` names. read_as: `model_type` of the equal model that the weights are read as, "" for its
    own. how: what is done for that, for that page. norms: where a layer's norms stand (`output_norms.PLACES`). norm: what they
    are, "rms", "rms from one" (which store w of a gain 1 + w) or "layer" (LayerNorm without bias). without_r1: why R1 cannot
    turn the residual stream, "" where it can. engines: those that have loaded an export, with what was compared. unscaled: which
    scales cannot be merged (`architecture.Shape`).
    """

    models: str
    windows: str = "none"
    read_as: str = ""
    how: str = ""
    norms: str = "before"
    norm: str = "rms"
    without_r1: str = ""
    engines: str = ""
    unscaled: tuple[str, ...] = ()


_OUTPUT_NORMS = (
    "norms with a gain on the outputs of attention and MLP do not commute with a rotation of the residual stream"
)
_RENAMED = "a Llama under a name of its own"
_GELU = "none: theirs compute a Llama with SiLU alone"
_LAYER_NORM = "LayerNorm, whose mean does not commute with a rotation of the residual stream"

# Families checked to be RMSNorm decoders with a gated MLP and norms in front of attention and MLP, or what their row says.
FAMILIES = {
    "llama": Family("Llama 1 to 3.3, Falcon 3, SmolLM2, TinyLlama, Yi", engines="vLLM"),
    "mistral": Family("Mistral 7B, Nemo, Small 24B (text)", windows="all", engines="vLLM"),
    "qwen2": Family("Qwen2, Qwen2.5", windows="by layer", engines="vLLM"),
    "qwen3": Family("Qwen3, dense", windows="by layer", engines="vLLM"),
    "smollm3": Family("SmolLM3", windows="by layer", engines="vLLM"),
    "ministral": Family("Ministral 8B (2410)", windows="by layer", engines="vLLM"),
    "seed_oss": Family("Seed-OSS 36B", engines="vLLM"),
    "cwm": Family("CWM 32B", windows="by layer", engines="vLLM"),
    "qwen3_moe": Family("Qwen3-MoE (30B-A3B, 235B-A22B)", windows="all", engines="vLLM"),
    "qwen2_moe": Family("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", windows="by layer", engines="vLLM"),
    "olmoe": Family("OLMoE-1B-7B", engines="vLLM"),
    "mixtral": Family("Mixtral 8x7B, 8x22B", windows="all", engines="vLLM"),
    "gpt_oss": Family(
        "gpt-oss 20B, 120B",
        windows="by layer",
        how="gate and up of the experts are read apart; dequantised first, see below",
        engines="vLLM",
        unscaled=("up",),
    ),
    "glm4_moe": Family("GLM-4.5 to 4.7, GLM-4.5-Air", engines="vLLM", unscaled=("up", "key")),
    "solar_open": Family("Solar Open 100B", engines="vLLM"),
    "minimax_m2": Family(
        "MiniMax-M2 to M2.5", engines="none: vLLM's router on CPUs knows no correction", unscaled=("key",)
    ),
    "dots1": Family("dots.llm1", windows="by layer", engines="vLLM", unscaled=("up",)),
    "phi3": Family(
        "Phi-3 and 3.5 mini, Phi-3 medium, Phi-4 14B",
        windows="all",
        read_as="mistral",
        how="fused q, k, v and gate, up are read apart",
        engines="vLLM",
    ),
    "internlm3": Family("InternLM3 8B", read_as="llama", how=_RENAMED, engines="vLLM"),
    "iquestcoder": Family("IQuest-Coder-V1 40B, without loops", read_as="llama", how=_RENAMED, engines="vLLM"),
    "granite": Family(
        "Granite 3, dense",
        read_as="llama",
        how="multipliers go into the weights: embedding, q_proj (attention), o_proj and down_proj (residual), lm_head",
        engines="vLLM",
    ),
    "gemma": Family(
        "Gemma 1",
        read_as="llama",
        how="gains 1 + w are read as gains, the scale of the embedding goes into it",
        engines=_GELU,
    ),
    "gemma2": Family(
        "Gemma 2", "by layer", norms="around", norm="rms from one", without_r1=_OUTPUT_NORMS, engines="vLLM"
    ),
    "gemma3_text": Family(
        "Gemma 3 (270M, 1B; text)",
        "by layer",
        norms="around",
        norm="rms from one",
        without_r1=_OUTPUT_NORMS,
        engines="vLLM",
    ),
    "olmo2": Family("OLMo 2", norms="after", without_r1=_OUTPUT_NORMS, engines="vLLM"),
    "olmo3": Family("OLMo 3", "by layer", norms="after", without_r1=_OUTPUT_NORMS, engines="vLLM"),
    "exaone4": Family("EXAONE 4.0", "by layer", norms="after", without_r1=_OUTPUT_NORMS, engines="vLLM"),
    "cohere": Family(
        "Command R, Aya 23 and Expanse", norms="shared", norm="layer", without_r1=_LAYER_NORM, engines="vLLM"
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        "by layer",
        norms="shared",
        norm="layer",
        without_r1=_LAYER_NORM,
        engines="vLLM, up to the length of a window",
    ),
}

# Whose position embedding may turn a part of each head; keys then learn no scales (`Shape.unscaled`).
PARTIAL = ("glm4_moe", "minimax_m2")

# Why a family that people ask for is refused; anything else is simply unknown.
_LATENT = "queries and keys made from latent vectors with norms of their own (MLA), which are sites that are not built"
_WRAPPER = "a vision or audio model around its language model; only the language model alone is read"
_LINEAR = "linear attention in most layers, whose state R2 and R3 do not go through"
_STATES = "state-space layers or convolutions beside attention, which are sites that are not built"
_NEIGHBOURS = "a position embedding that turns neighbouring channels, with which learned scales of keys do not commute"
_NO_GATE = "an MLP without a gate, for which no sites are built"
_LATE_NORMS = "norms of queries and keys behind the position embedding, which are not built"
REFUSED = {
    **dict.fromkeys(("gemma3", "mistral3", "mllama", "qwen2_5_vl", "qwen3_vl", "gemma4"), _WRAPPER),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    "minicpm3": _LATENT,
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "kimi_linear", "minimax"), _LINEAR),
    **dict.fromkeys(("granitemoehybrid", "nemotron_h", "falcon_h1", "jamba", "lfm2", "lfm2_moe"), _STATES),
    **dict.fromkeys(("phi", "gpt2", "gpt_neox", "falcon", "olmo", "stablelm", "starcoder2", "nemotron"), _LAYER_NORM),
    "phimoe": _LAYER_NORM,
    **dict.fromkeys(("ernie4_5", "ernie4_5_moe", "helium", "glm", "glm4"), _NEIGHBOURS),
    **dict.fromkeys(("arcee", "apertus"), _NO_GATE),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), _LATE_NORMS),
    "granitemoe": "multipliers of embedding, attention, residual and logits around its experts",
    "llama4": "a router that scales what experts read, shared experts, and attention in chunks",
    "ministral3": "queries scaled by their position, which the layers here are not told",
}


def check_supported(model_type: str) -> None:
    """Refuse a family whose function rotations would change.

    Raises:
        UserError: names the architecture and what is missing for it.
    """
    if model_type not in FAMILIES:
        why = REFUSED.get(
            model_type, "no entry says which of its modules are the norms, projections and residual writes"
        )
        raise UserError(f"architecture '{model_type}' is not supported: {why}", f"use one of {', '.join(FAMILIES)}")


def check_flags(config: Any) -> None:
    """Refuse settings of a supported family that change what it computes in a way that is not built here.

    Args:
        config: from transformers.

    Raises:
        UserError: names the setting.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [values for values in rope.values() if isinstance(values, dict)] or [
        rope
    ]  # by kind of layer, or one for all
    partial = next((p for values in ropes if (p := values.get("partial_rotary_factor")) not in (None, 0, 1)), 1.0)
    two_sided = getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True)
    for problem in (
        partial != 1
        and config.model_type not in PARTIAL
        and f"partial_rotary_factor {partial}: only a position embedding of whole heads is built",
        two_sided
        and "attention to later tokens (use_bidirectional_attention, is_causal): only causal attention is built",
    ):
        if problem:
            raise UserError(f"config.json has {problem}", "use another model")
