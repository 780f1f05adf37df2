"""Families whose weights compute the same as a Llama's or Mistral's once they are split or scaled, read as such a model.

Everything behind `open_model` then sees one config and one set of tensors: multipliers cannot be forgotten where a layer is
rebuilt, and exports are of that family too. Where a weight is scaled, its rows come in fp32 or wider, so that
they are rounded to the model's dtype once, after norms and rotations are merged.
"""

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dist_spin.model.architecture import ATTENTION_NORM, EMBEDDING, FINAL_NORM, HEAD, MLP_NORM, Shape
from dist_spin.model.families import FAMILIES
from dist_spin.model.weight_source import WeightSource
from dist_spin.numerics.dtypes import accumulation_dtype

# Entries that the families share with Llama and Mistral by name, and that are not those models'.
NOT_OF_LLAMA = ("model_type", "architectures", "auto_map", "transformers_version")


@dataclass(frozen=True)
class LlamaForm:
    """How each module of the Llama form is made of the stored ones; modules by their names within a layer or the model.

    parts: stored module, first row and number of rows of a module that is stored fused with others. factors: what a module's
    weight and bias are multiplied by. gains_from_one: norms store w of a gain 1 + w.
    """

    config: Any
    parts: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    gains_from_one: bool = False


def llama_form(config: Any) -> LlamaForm | None:
    """How a model of `config`, from transformers, is read as another family; None where it is read as it is."""
    make = {"phi3": _phi3, "granite": _granite, "gemma": _gemma, "internlm3": _same, "iquestcoder": _same}.get(
        config.model_type
    )
    return None if make is None else make(config)


def form_config(config: Any) -> Any:
    """The config that the model is read by."""
    form = llama_form(config)
    return config if form is None else form.config


def _config(config: Any, *, tied: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = FAMILIES[config.model_type].read_as
    # Neither what is Llama's alone, which this family would ignore, nor what is this family's alone.
    known = {f.name for f in fields(config)} & {f.name for f in fields(CONFIG_MAPPING[model_type])} - set(NOT_OF_LLAMA)
    content = {name: value for name, value in config.to_dict().items() if name in known}
    content |= {"tie_word_embeddings": tied, "head_dim": Shape.of(config).head_dim}
    content["rope_parameters"] = {k: v for k, v in config.rope_parameters.items() if k != "partial_rotary_factor"}
    made = AutoConfig.for_model(model_type, **content)
    made.architectures = [f"{model_type.capitalize()}ForCausalLM"]
    made.name_or_path = config.name_or_path
    if original := content["rope_parameters"].get("original_max_position_embeddings"):
        made.original_max_position_embeddings = original  # where vLLM and older transformers look for it
    return made


def _same(config: Any) -> LlamaForm:
    return LlamaForm(_config(config, tied=config.tie_word_embeddings))


def _phi3(config: Any) -> LlamaForm:
    shape = Shape.of(config)
    query, key, width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    parts = {
        "self_attn.q_proj": ("self_attn.qkv_proj", 0, query),
        "self_attn.k_proj": ("self_attn.qkv_proj", query, key),
        "self_attn.v_proj": ("self_attn.qkv_proj", query + key, key),
        "mlp.gate_proj": ("mlp.gate_up_proj", 0, width),
        "mlp.up_proj": ("mlp.gate_up_proj", width, width),
    }
    return LlamaForm(_config(config, tied=config.tie_word_embeddings), parts)


def _granite(config: Any) -> LlamaForm:
    """logits / logits_scaling; residual + y * residual_multiplier; scores q k * attention_multiplier, not over sqrt(d)."""
    factors = {
        EMBEDDING: config.embedding_multiplier,
        "self_attn.q_proj": config.attention_multiplier * Shape.of(config).head_dim ** 0.5,
        "self_attn.o_proj": config.residual_multiplier,
        "mlp.down_proj": config.residual_multiplier,
        HEAD: 1 / config.logits_scaling,
    }
    return LlamaForm(_config(config, tied=False), factors=factors)


def _gemma(config: Any) -> LlamaForm:
    # transformers rounds the scale of the embedding to the dtype of the weights, as training did.
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    scale = float(torch.tensor(config.hidden_size**0.5, dtype=stored))
    return LlamaForm(_config(config, tied=False), factors={EMBEDDING: scale}, gains_from_one=True)


class LlamaFormWeights:
    """A `WeightSource` that reads another family's weights as those of its Llama form."""

    def __init__(self, stored: WeightSource, form: LlamaForm) -> None:
        self._stored, self._form = stored, form

    def has(self, name: str) -> bool:
        return self._stored.has(self._place(name)[0])

    def rows(self, name: str, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        stored, first, count = self._place(name)
        if count is not None:
            stop = count if stop is None else min(stop, count)
            start, stop = first + start, first + stop
        rows = self._stored.rows(stored, start, stop, device)
        module = _module(name)
        factor = self._form.factors.get(module, 1)
        shift = 1 if self._form.gains_from_one and module in (ATTENTION_NORM, MLP_NORM, FINAL_NORM) else 0
        if factor == 1 and shift == 0:
            return rows
        return rows.to(accumulation_dtype(rows.dtype)) * factor + shift

    def row_count(self, name: str) -> int:
        stored, _, count = self._place(name)
        return self._stored.row_count(stored) if count is None else count

    def fingerprint(self) -> str:
        how = repr((self._form.parts, self._form.factors, self._form.gains_from_one))
        return hashlib.sha256(f"{self._stored.fingerprint()}:{how}".encode()).hexdigest()

    def _place(self, name: str) -> tuple[str, int, int | None]:
        """The stored parameter that holds `name`, the first of its rows there and their number, None for all."""
        module = _module(name)
        if module not in self._form.parts:
            return name, 0, None
        stored, first, count = self._form.parts[module]
        return name.replace(module, stored), first, count


def _module(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`, `model.norm` of `model.norm.weight`."""
    module = name.rpartition(".")[0]
    return module.split(".", 3)[3] if module.startswith("model.layers.") else module
