"""Settings in the config of a supported family: each does what it does in transformers, or is refused."""

import copy
import random
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, WITHOUT_R1
from test_model import CPU, relative
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from dist_spin.errors import UserError
from dist_spin.model.architecture import norm_eps
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model

MODELS = FAMILIES | WITHOUT_R1
IDS = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(1))


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


def by_kind_of_layer(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": dict(parameters), "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}


PAIRS = 4
NEED_WINDOW = ("cwm", "gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss", "exaone4")
FACTORS = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 9.0]}
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
# What a config may say; families that do not know an entry must ignore it, as transformers does.
FLAGS: dict[str, dict[str, Any]] = {
    "attention_bias": {"attention_bias": True},
    "a bias after attention": {"attention_out_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act": {"hidden_act": "gelu_pytorch_tanh"},
    "rms_norm_eps": {"rms_norm_eps": 0.3},
    "layer_norm_eps": {"layer_norm_eps": 0.3},
    "hidden_activation": {"hidden_activation": "silu"},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 16},
    "one kv head": {"num_key_value_heads": 1},
    "window": WINDOW,
    "window not used": WINDOW | {"use_sliding_window": False, "sliding_window_pattern": 2},
    "window by layer": WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
    "full by layer": WINDOW | {"layer_types": ["full_attention", "full_attention"]},
    "layers without rope": {"no_rope_layers": [0, 1]},
    "theta": rope("default", rope_theta=100.0),
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0) | {"max_position_embeddings": 16},
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "longrope": rope("longrope", **FACTORS) | {"original_max_position_embeddings": 16},
    "longrope within": rope("longrope", **FACTORS, factor=4.0) | {"original_max_position_embeddings": 64},
    "partial rotary": rope("default", partial_rotary_factor=0.5),
    "partial rotary, linear": rope("linear", factor=2.0, partial_rotary_factor=0.5),
    "proportional": rope("proportional", partial_rotary_factor=0.5),
    "attention_multiplier": {"attention_multiplier": 0.7},
    "residual_multiplier": {"residual_multiplier": 0.4},
    "embedding_multiplier": {"embedding_multiplier": 3.0},
    "logits_scaling": {"logits_scaling": 5.0},
    "logit_scale": {"logit_scale": 0.1},
    "soft caps": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0},
    "query scale": {"query_pre_attn_scalar": 3.0, "query_pre_attn_scaling": 3.0},
    "qk norm": {"use_qk_norm": True},
    "clip_qkv": {"clip_qkv": 0.1},
    "layer norm": {"norm_type": "layer_norm", "use_rms_norm": False},
    "parallel": {"parallel_attn": True, "use_parallel_residual": True},
    "bidirectional": {"use_bidirectional_attention": True},
    "not causal": {"is_causal": False},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "every other layer without rope": {"no_rope_layers": None, "no_rope_layer_interval": 2},
    "dropout": {"attention_dropout": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5, "residual_dropout": 0.5},
    "pretraining_tp": {"pretraining_tp": 2},
    "shares as they are": {"norm_topk_prob": False},
    "shares normalised": {"norm_topk_prob": True},
    "one expert a token": {"num_experts_per_tok": 1},
    "three experts": {"num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3},
    "wider experts": {"moe_intermediate_size": 48},
    "every other layer dense": {"decoder_sparse_step": 2, "first_k_dense_replace": 0},
    "one layer dense": {"mlp_only_layers": [0]},
    "router's logits": {"output_router_logits": True, "router_aux_loss_coef": 0.1},
    "router noise": {"router_jitter_noise": 0.5},
    "limit of the experts": {"swiglu_limit": 0.5, "swiglu_alpha": 1.0},
    "a shared expert": {"shared_expert_intermediate_size": 24, "n_shared_experts": 1},
    "groups of experts": {"n_group": 2, "topk_group": 1, "scoring_func": "sigmoid", "routed_scaling_factor": 2.0},
}
# What is left: sizes, which every test here has others of, ids of tokens, and what training and caches read.
NOT_OF_THE_FUNCTION = {
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "num_mtp_layers"),
}


def base(kind: str) -> PreTrainedConfig:
    """The smallest config of a family, with its head size given."""
    config = next(config for config in MODELS.values() if config.model_type == kind)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    content = config.to_dict() | sizes | {"num_hidden_layers": 2, "head_dim": 8} | rope("default")
    by_kind = kind in ("gemma3_text", "olmo3")  # a position embedding for each kind of layer
    if by_kind:
        content["rope_parameters"] = by_kind_of_layer(content["rope_parameters"])
    content |= {
        "sliding_window": 99 if kind == "ministral" or kind in NEED_WINDOW else None,
        "layer_types": None,
        "tie_word_embeddings": False,
        "no_rope_layers": [1, 1],
    }
    content.pop("layer_types", None)
    if by_kind:
        content["layer_types"] = ["sliding_attention", "full_attention"]
    return type(config).from_dict(content)


def flags_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The flags of a family, and a few pairs of them, other ones for each family."""
    flags = single_flags_of(config)
    pairs = random.Random(config.model_type).sample(list(combinations(flags, 2)), PAIRS)
    return flags | {f"{one}, {other}": flags[one] | flags[other] for one, other in pairs}


def single_flags_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """FLAGS, for a family without R1 with all entries that its config has no field for in one: they must all be ignored."""
    if config.model_type not in {model.model_type for model in WITHOUT_R1.values()}:
        return FLAGS
    known = {field.name for field in fields(config)} | {"is_causal", "use_bidirectional_attention"}
    unknown = {k: v for change in FLAGS.values() if not known & set(change) for k, v in change.items()}
    return {flag: change for flag, change in FLAGS.items() if known & set(change)} | {"unknown": unknown}


def theirs(config: PreTrainedConfig, directory: Path) -> Tensor | None:
    """transformers' logits of a random model of this config, which is written; None where it builds or runs none."""
    torch.manual_seed(0)
    config.save_pretrained(directory)
    try:
        config = AutoConfig.from_pretrained(directory)  # which may be of another class: Mistral with layer_types
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
                else:
                    nn.init.uniform_(parameter, 0.5 if "norm" in name else -0.5, 1.5 if "norm" in name else 0.5)
            logits = model(IDS).logits
    except Exception:  # whatever it has against this config
        return None
    model.save_pretrained(directory)
    return logits


def ours(directory: Path) -> Tensor | None:
    """The logits of the written model, layer by layer; None where it is refused."""
    try:
        files = open_model(str(directory))
    except UserError:
        return None
    weights = RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float32)
    runner = LayerRunner(files.config, Sites(), device=CPU, dtype=torch.float32, rotated=False)
    hidden = weights.embedded(IDS)
    for i in range(files.shape.layers):
        hidden = runner.run(runner.build(i, weights.layer(i)), i, hidden)
    return weights.head(norm_eps(files.config)).logits(hidden)


def test_no_setting_of_a_family_is_left_out():
    changed = {name for change in FLAGS.values() for name in change} | NOT_OF_THE_FUNCTION
    of_every_model = {field.name for field in fields(PreTrainedConfig)}
    for config in MODELS.values():
        assert {field.name for field in fields(config)} <= changed | of_every_model, config.model_type


@pytest.mark.parametrize("kind", dict.fromkeys(config.model_type for config in MODELS.values()))
def test_a_changed_flag_is_honoured_or_refused(kind, tmp_path):
    plain = base(kind)
    unchanged = theirs(plain, tmp_path / "plain")
    assert unchanged is not None
    wrong, changed = {}, set()
    for number, (flag, change) in enumerate(({"": {}} | flags_of(plain)).items()):
        directory = tmp_path / str(number)
        if "rope_parameters" in change and kind in ("gemma3_text", "olmo3"):
            change = change | {"rope_parameters": by_kind_of_layer(change["rope_parameters"])}
        try:
            # A copy: configs write into the rope_parameters that they are given.
            config = type(plain).from_dict(copy.deepcopy(plain.to_dict() | change))
        except Exception:  # transformers refuses it
            continue
        wanted = theirs(config, directory)
        if wanted is None:
            continue
        if relative(wanted, unchanged) > 1e-3:
            changed.add(flag)
        found = ours(directory)
        if found is not None and relative(found, wanted) > 1e-5:
            wrong[flag] = relative(found, wanted)
    assert wrong == {}, wrong
    eps = "layer_norm_eps" if "cohere" in kind else "rms_norm_eps"
    own_head_size = (
        {"head_dim"} if "olmo" not in kind and "cohere" not in kind and kind != "exaone4" else set()
    )  # theirs follows the hidden size
    assert {eps, "theta", "one kv head"} | own_head_size <= changed
