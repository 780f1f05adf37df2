"""The model families that can be rotated, as data: one name per family, and why others are refused.

A family that shares Llama's module names (`architecture.LAYER_LINEARS`) and passes tests/test_families.py is added here.
"""

from dist_spin.errors import UserError

# Families checked to be pre-norm RMSNorm decoders with Llama's linear layers and a gated MLP.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

# Why a family that people ask for is refused; anything else is simply unknown.
_EXPERTS = "mixture-of-experts layers, which are not supported"
_OUTPUT_NORMS = "norms on the outputs of attention and MLP, which do not commute with a rotation of the residual stream"
_LAYER_NORM = "LayerNorm, whose mean does not commute with a rotation of the residual stream"
_FUSED = "q, k, v and gate, up fused into one projection each, which are not split here"
_WRAPPER = "a vision or audio model around its language model; only the language model alone is read"
REFUSED = {
    "gemma": "norm gains stored as 1 + w and a scaled embedding, which merging rotations does not handle",
    "gemma2": _OUTPUT_NORMS,
    "gemma3": _WRAPPER,
    "gemma3_text": _OUTPUT_NORMS,
    "olmo2": _OUTPUT_NORMS,
    "olmo3": _OUTPUT_NORMS,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "llama4": _EXPERTS,
    "phi3": _FUSED,
    "gpt2": _LAYER_NORM,
    "gpt_neox": _LAYER_NORM,
    "falcon": _LAYER_NORM,
    "cohere": _LAYER_NORM,
    "granite": "multipliers on the embedding, residual and logits, which merging rotations does not handle",
    "mistral3": _WRAPPER,
    "mllama": _WRAPPER,
    "qwen2_5_vl": _WRAPPER,
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
