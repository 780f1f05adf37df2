"""The models of each supported family, one row per published size: their features, their sizes divided by a power of two.

Dividing keeps the ratios and, as long as a factor of two is left beside it, the Hadamard core of the real size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gptq import oracle
from torch import Tensor
from transformers import (
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    Dots1Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteConfig,
    InternLM3Config,
    IQuestCoderConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    SolarOpenConfig,
)

from dist_spin.model.layers import LayerRunner
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.storage.quantized_layers import QuantizedLayer, finished_layer, save_layer

TIED: dict[str, Any] = {"tie_word_embeddings": True}
LLAMA31_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
LONG_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.8],
        "long_factor": [1.0, 1.3, 2.0, 5.0, 9.0, 20.0],
    },
    "original_max_position_embeddings": 16,  # below the length of the tests' sequences
}
YARN_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    }
}


def _granite(attention: float, logits: float) -> dict[str, Any]:
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    return {"attention_multiplier": attention, "logits_scaling": logits} | multipliers | TIED


def _config(
    kind: type[PreTrainedConfig], hidden: int, intermediate: int, heads: int, kv_heads: int, **features: Any
) -> PreTrainedConfig:
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return kind(**settings | features)


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama-1-33b (6656, 17920)": _config(LlamaConfig, 104, 280, 13, 13),
    "llama-2-7b (4096, 11008)": _config(LlamaConfig, 128, 344, 8, 8),
    "llama-2-13b (5120, 13824)": _config(LlamaConfig, 80, 216, 5, 5),
    "llama-2-70b (8192, 28672)": _config(LlamaConfig, 64, 224, 8, 1),
    "llama-3-8b (4096, 14336)": _config(
        LlamaConfig, 64, 224, 8, 2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "llama-3.1-405b (16384, 53248)": _config(LlamaConfig, 128, 416, 16, 1, **LLAMA31_ROPE),
    "llama-3.2-1b (2048, 8192)": _config(LlamaConfig, 64, 256, 8, 2, **TIED, **LLAMA31_ROPE),
    "llama-3.2-3b (3072, 8192)": _config(LlamaConfig, 96, 256, 6, 2, **TIED, **LLAMA31_ROPE),
    "llama-3.3-70b (8192, 28672)": _config(LlamaConfig, 64, 224, 8, 1, **LLAMA31_ROPE),
    "mistral-7b-v0.1 (4096, 14336)": _config(MistralConfig, 64, 224, 8, 2, sliding_window=7),
    "mistral-nemo-12b (5120, 14336)": _config(MistralConfig, 80, 224, 8, 2, head_dim=8, sliding_window=None),
    "mistral-small-24b (5120, 32768)": _config(MistralConfig, 80, 512, 8, 2, head_dim=8, sliding_window=None),
    "qwen2-0.5b (896, 4864)": _config(Qwen2Config, 56, 304, 7, 1, **TIED),
    "qwen2.5-1.5b (1536, 8960)": _config(Qwen2Config, 48, 280, 6, 1, **TIED),
    "qwen2.5-7b (3584, 18944)": _config(Qwen2Config, 56, 296, 7, 1),
    "qwen2.5-32b (5120, 27648)": _config(Qwen2Config, 40, 216, 5, 1),
    "qwen2.5-72b (8192, 29568)": _config(Qwen2Config, 256, 924, 8, 1),
    "qwen3-0.6b (1024, 3072)": _config(Qwen3Config, 64, 192, 8, 4, head_dim=16, **TIED),
    "qwen3-4b (2560, 9728)": _config(Qwen3Config, 80, 304, 8, 2, head_dim=16, **TIED),
    "qwen3-8b (4096, 12288)": _config(Qwen3Config, 64, 192, 8, 2, head_dim=8),
    "qwen3-14b (5120, 17408)": _config(Qwen3Config, 80, 272, 10, 2, head_dim=8),
    "qwen3-32b (5120, 25600)": _config(Qwen3Config, 80, 400, 16, 2, head_dim=8),
    "smollm2-135m (576, 1536)": _config(LlamaConfig, 72, 192, 9, 3, **TIED),
    "smollm2-360m (960, 2560)": _config(LlamaConfig, 120, 320, 15, 5, **TIED),
    "smollm2-1.7b (2048, 8192)": _config(LlamaConfig, 64, 256, 8, 8, **TIED),
    "smollm3-3b (2048, 11008)": _config(SmolLM3Config, 64, 344, 8, 2, num_hidden_layers=4, **TIED),
    "falcon3-7b (3072, 23040)": _config(LlamaConfig, 48, 360, 6, 2, head_dim=16),
    "ministral-8b (4096, 12288)": _config(
        MinistralConfig,
        64,
        192,
        8,
        2,
        head_dim=8,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "seed-oss-36b (5120, 27648)": _config(SeedOssConfig, 40, 216, 10, 1, head_dim=8),
    "cwm-32b (6144, 21504)": _config(
        CwmConfig, 96, 336, 12, 2, head_dim=8, sliding_window=7, layer_types=["full_attention", "sliding_attention"]
    ),
    "phi-3-mini-4k (3072, 8192)": _config(Phi3Config, 48, 128, 4, 4, sliding_window=7),
    "phi-3.5-mini (3072, 8192)": _config(Phi3Config, 48, 128, 4, 4, **LONG_ROPE),
    "phi-4-14b (5120, 17920)": _config(Phi3Config, 80, 280, 10, 5),
    "internlm3-8b (4096, 10240)": _config(
        InternLM3Config, 64, 160, 8, 1, head_dim=8, attention_bias=True, mlp_bias=True
    ),
    "iquest-coder-40b (5120, 27648)": _config(IQuestCoderConfig, 40, 216, 5, 1, head_dim=8),
    "granite-3-2b (2048, 8192)": _config(GraniteConfig, 64, 256, 8, 2, **_granite(1 / 64, 8.0)),
    "granite-3-8b (4096, 12800)": _config(GraniteConfig, 64, 200, 8, 2, **_granite(1 / 128, 16.0)),
    "gemma-2b (2048, 16384)": _config(GemmaConfig, 64, 512, 4, 1, head_dim=32, **TIED),
    "gemma-7b (3072, 24576)": _config(GemmaConfig, 48, 384, 4, 4, head_dim=16, **TIED),
    "qwen3-30b-a3b (2048, 768)": _config(
        Qwen3MoeConfig,
        64,
        192,
        8,
        2,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "qwen1.5-moe-a2.7b (2048, 1408)": _config(
        Qwen2MoeConfig,
        64,
        176,
        4,
        4,
        moe_intermediate_size=44,
        shared_expert_intermediate_size=176,
        num_experts=6,
        num_experts_per_tok=4,
    ),
    "olmoe-1b-7b (2048, 1024)": _config(OlmoeConfig, 64, 32, 4, 4, num_experts=8, num_experts_per_tok=3),
    "mixtral-8x7b (4096, 14336)": _config(MixtralConfig, 64, 224, 8, 2, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss-20b (2880, 2880)": _config(
        GptOssConfig,
        180,
        180,
        8,
        1,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=7,
        swiglu_limit=1.0,  # which these small numbers reach
        **YARN_ROPE,
    ),
    "glm-4.5 (5120, 1536)": _config(
        Glm4MoeConfig,
        80,
        192,
        12,
        1,
        head_dim=8,
        attention_bias=True,
        use_qk_norm=True,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "solar-open-100b (4096, 1280)": _config(
        SolarOpenConfig,
        64,
        20,
        8,
        1,
        head_dim=8,
        moe_intermediate_size=20,
        n_routed_experts=4,
        num_experts_per_tok=2,
    ),
    "minimax-m2 (3072, 1536)": _config(
        MiniMaxM2Config,
        96,
        48,
        12,
        2,
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    ),
    "dots-llm1 (4608, 1408)": _config(
        Dots1Config,
        144,
        88,
        8,
        8,
        head_dim=16,
        moe_intermediate_size=44,
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        sliding_window=None,
    ),
}

WINDOWS: dict[str, Any] = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
# Those whose norms do not commute with R1.
WITHOUT_R1: dict[str, PreTrainedConfig] = {
    "gemma-2-2b (2304, 9216)": _config(
        Gemma2Config, 72, 288, 8, 4, head_dim=8, query_pre_attn_scalar=11, **TIED, **WINDOWS
    ),
    "gemma-2-27b (4608, 36864)": _config(
        Gemma2Config,
        72,
        576,
        4,
        2,
        head_dim=16,
        query_pre_attn_scalar=18,
        attn_logit_softcapping=None,
        **TIED,
        **WINDOWS,
    ),
    "gemma-3-270m (640, 2048)": _config(Gemma3TextConfig, 80, 256, 4, 1, head_dim=32, **TIED, **WINDOWS),
    "gemma-3-1b (1152, 6912)": _config(
        Gemma3TextConfig,
        72,
        432,
        4,
        1,
        head_dim=16,
        query_pre_attn_scalar=11,
        final_logit_softcapping=3.0,
        **TIED,
        **WINDOWS,
    ),
    "olmo-2-7b (4096, 11008)": _config(Olmo2Config, 128, 344, 8, 8),
    "olmo-2-32b (5120, 27648)": _config(Olmo2Config, 80, 432, 10, 2),
    "olmo-3-7b (4096, 11008)": _config(Olmo3Config, 128, 344, 8, 8, **WINDOWS),
    "exaone-4-1.2b (2048, 4096)": _config(Exaone4Config, 64, 128, 8, 2, **TIED, **WINDOWS),
    "aya-8b (4096, 14336)": _config(CohereConfig, 64, 224, 8, 2, **TIED),
    "command-r-plus (12288, 33792)": _config(CohereConfig, 96, 264, 12, 2, use_qk_norm=True, logit_scale=0.8, **TIED),
    "command-r7b (4096, 14336)": _config(Cohere2Config, 64, 224, 8, 2, **TIED, **WINDOWS),
}

# One size of each family, where more would show nothing else.
ONE_OF_EACH = {config.model_type: name for name, config in reversed((FAMILIES | WITHOUT_R1).items())}


def assert_codes_are_the_oracles(
    runner: LayerRunner, index: int, made: QuantizedLayer, weights: dict[str, Tensor], entered: list[Tensor]
) -> None:
    """A layer's codes are those of a plain GPTQ, one column at a time, of the Hessians of what its linears read.

    In the quantised layer every linear reads what it read while it was quantised: that of the rounded linears before it.
    weights: of the layer, not rounded; entered: the hidden states [batch, T, h] that it was quantised with.
    """
    layer: Any = runner.build(index, made.weights(torch.float64, torch.device("cpu")))
    read: dict[str, list[Tensor]] = {role: [] for role in (*made.quantized_weights, "mlp.gate")}

    def listen(role: str) -> None:
        module = layer.get_submodule(role)
        linear = getattr(module, "linear", module)
        linear.register_forward_pre_hook(lambda module, inputs: read[role].append(inputs[0].flatten(0, -2)))

    for role in made.quantized_weights:
        listen(role)
    if runner.shape.experts:
        listen("mlp.gate")
    for hidden in entered:
        runner.run(layer, index, hidden)
    for e in range(runner.shape.experts):
        name = f"mlp.experts.{e}"
        counts = made.figures[f"{name}.up_proj"]
        if counts["calibrated"] > counts["tokens"]:  # too few tokens chose it: its Hessian is of all
            for linear in ("gate_proj", "up_proj", "down_proj"):
                read[f"{name}.{linear}"].clear()
            layer.mlp.experts[e](torch.cat(read["mlp.gate"]))
    for role, quantized in made.quantized_weights.items():
        x = torch.cat(read[role])
        wanted = oracle(weights[f"{role}.weight"], x.T @ x, GPTQOptions())
        assert np.array_equal(quantized.codes.numpy(), wanted), role


def assert_a_layer_from_disk_computes(
    place: Path, runner: LayerRunner, index: int, made: QuantizedLayer, entered: list[Tensor], left: list[Tensor]
) -> None:
    """A quantised layer, stored below `place` and read again in fp64, turns each of `entered` into its `left`."""
    save_layer(place / "layer.safetensors", made, "a fingerprint")
    loaded = finished_layer(place / "layer.safetensors", "a fingerprint", pytest.fail)
    assert loaded is not None
    rebuilt = runner.build(index, loaded.weights(torch.float64, torch.device("cpu")))
    for before, after in zip(entered, left, strict=True):
        torch.testing.assert_close(runner.run(rebuilt, index, before), after, rtol=1e-12, atol=1e-12)
