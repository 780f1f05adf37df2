"""A Hugging Face directory of a rotated model, written layer by layer: weights, config and tokenizer."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.export.directory import Shards
from dist_spin.export.tokenizer import copy_tokenizer
from dist_spin.model.architecture import ATTENTION_NORM, EMBEDDING, FINAL_NORM, HEAD, MLP_NORM, layer_name
from dist_spin.model.families import FAMILIES
from dist_spin.model.output_norms import name_in_checkpoints
from dist_spin.model.weights import ModelFiles
from dist_spin.runtime.prefetch import prefetched
from dist_spin.storage.atomic import write_json


def write_checkpoint(
    directory: Path,
    files: ModelFiles,
    dtype: torch.dtype,
    *,
    device: torch.device,
    layer: Callable[[int], dict[str, Tensor]],
    embedding: Callable[[], Tensor],
    head: Callable[[], Tensor] | None,
    final_gain: Tensor | None,
    extra: dict[str, Any],
    shard_bytes: float,
    before_layer: Callable[[int], None],
) -> None:
    """Weights, config.json, tokenizer and generation config; norm gains that are folded into the linears are one.

    While a layer goes to its file, a thread makes the next one.

    Args:
        layer: tensors of decoder layer i by their names within it; a layer norm that it leaves out gets gains of one, one
            that it has is a learned scale. device: where it makes them. embedding, head: [vocab, h]; no head where it is the
            embedding. final_gain: [h], of the final norm where it is not folded.
        extra: entries of config.json that replace the model's own. before_layer: called before each layer, with its number.
    """
    ones, norms = torch.ones(files.shape.hidden, dtype=dtype), FAMILIES[files.config.model_type].norms
    with Shards(directory, shard_bytes) as shards:
        shards.add(f"{EMBEDDING}.weight", embedding())
        for index, tensors in enumerate(prefetched(layer, range(files.shape.layers), device)):
            before_layer(index)
            gains = {f"{norm}.weight": ones.clone() for norm in (ATTENTION_NORM, MLP_NORM) if final_gain is None}
            for name, tensor in (gains | tensors).items():
                shards.add(f"{layer_name(index)}.{name_in_checkpoints(norms, name)}", tensor)
            del tensors
        shards.add(f"{FINAL_NORM}.weight", ones if final_gain is None else final_gain)
        if head is not None:
            shards.add(f"{HEAD}.weight", head())
        shards.finish()
    config = copy.deepcopy(files.config)
    config.tie_word_embeddings = head is None  # a folded gain of the final norm is in lm_head alone
    config.dtype = dtype
    if getattr(config, "num_mtp_layers", 0):
        config.num_mtp_layers = 0  # layers for predicting several tokens are not read, and nothing must look for them
    config.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", content | legacy_fields(config, dtype) | extra)
    copy_tokenizer(files, directory)


def legacy_fields(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Entries of config.json under the names that transformers before version 5 reads them by.

    Args:
        config: from transformers, with one position embedding for all layers in `rope_parameters`.
    """
    fields: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return fields
