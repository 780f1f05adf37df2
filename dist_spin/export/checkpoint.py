"""A Hugging Face directory of a rotated model, written layer by layer: weights, config and tokenizer."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.export.directory import Shards
from dist_spin.model.architecture import ATTENTION_NORM, EMBEDDING, FINAL_NORM, HEAD, MLP_NORM, layer_name
from dist_spin.model.weights import ModelFiles
from dist_spin.storage.atomic import write_json

COPIED = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
    "generation_config.json",
)


def write_checkpoint(
    directory: Path,
    files: ModelFiles,
    dtype: torch.dtype,
    *,
    layer: Callable[[int], dict[str, Tensor]],
    embedding: Callable[[], Tensor],
    head: Callable[[], Tensor],
    extra: dict[str, Any],
    shard_bytes: float,
    before_layer: Callable[[int], None],
) -> None:
    """Weights, config.json, tokenizer and generation config; norm gains are folded into the linears, so they are one.

    Args:
        layer: tensors of decoder layer i by their names within it; a layer norm that it leaves out gets gains of one, one
            that it has is a learned scale. embedding, head: [vocab, h].
        extra: entries of config.json that replace the model's own. before_layer: called before each layer, with its number.
    """
    shards = Shards(directory, shard_bytes)
    ones = torch.ones(files.shape.hidden, dtype=dtype)
    shards.add(f"{EMBEDDING}.weight", embedding())
    for index in range(files.shape.layers):
        before_layer(index)
        gains = {f"{norm}.weight": ones.clone() for norm in (ATTENTION_NORM, MLP_NORM)}
        for name, tensor in (gains | layer(index)).items():
            shards.add(f"{layer_name(index)}.{name}", tensor)
    shards.add(f"{FINAL_NORM}.weight", ones)
    shards.add(f"{HEAD}.weight", head())
    shards.finish()
    config = copy.deepcopy(files.config)
    config.tie_word_embeddings = False  # the final norm's gain is in lm_head alone
    config.dtype = dtype
    config.save_pretrained(directory)
    content = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", content | extra)
    copy_tokenizer(files, directory)


def copy_tokenizer(files: ModelFiles, directory: Path) -> None:
    """Copy the tokenizer's files and the generation config of the original model."""
    copied = {path for pattern in COPIED for path in files.directory.glob(pattern)}
    for path in sorted(copied):
        shutil.copyfile(path, directory / path.name)
