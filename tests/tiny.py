"""Tiny random models of each supported shape, written as real checkpoints to a temporary directory, and short runs on them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# name -> config; between them: with and without GQA, tied and untied, biases, q/k norms, head size apart from hidden / heads
SHAPES = {
    "mha": LlamaConfig(**COMMON, num_key_value_heads=4, tie_word_embeddings=False),
    "gqa_tied": LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "biases": LlamaConfig(
        **COMMON, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "mistral_window": MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=7, head_dim=16),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16),
}


def write_model(
    kind: str | PreTrainedConfig,
    directory: Path,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Path:
    """A seeded random checkpoint of one of SHAPES or a config; norm gains and biases are far from their trivial values."""
    import copy

    config = copy.deepcopy(SHAPES[kind] if isinstance(kind, str) else kind)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (list(config.layer_types) * layers)[:layers]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


def tiny_run(
    directory: Path,
    *overrides: str,
    model: Path | None = None,
    kind: str = "gqa_tied",
    layers: int = 2,
    sequences: int = 30,
    split: str = "",
) -> list[str]:
    """Settings of a short run on the CPU, as `load_config(None, …)` and `main([VERB, *…])` take them; one step of learning.

    overrides: `key.sub=value`, which win over what is here. model: its directory, by default `directory`/model; the checkpoint
    (`kind` of `SHAPES`) and tokens.npy, ids [sequences, 20], are written there where they are missing. split: "#all" makes every
    stage read all of the ids, instead of the train part for learning and the test part for measuring.
    """
    model = model or directory / "model"
    if not (model / "config.json").exists():
        write_model(kind, model, layers=layers)
    if not (model / "tokens.npy").exists():
        np.save(model / "tokens.npy", np.random.default_rng(0).integers(3, 97, (sequences, 20)))
    source = f"tokens:{model / 'tokens.npy'}{split}"
    return [
        f"output_dir={directory}",
        f"model.path={model}",
        "model.dtype=float64",
        *(f"{stage}.seq_len=20" for stage in ("optimize", "quantize", "evaluate")),
        *(f"{stage}.source={source}" for stage in ("optimize", "quantize")),
        f"evaluate.sources=[{source}]",
        "optimize.batch_size=2",
        "optimize.steps=1",
        "quantize.n_sequences=12",
        "distributed.device=cpu",
        "distributed.threads=1",
        *overrides,
    ]


def terminate_when(ready: Callable[[], bool]) -> threading.Thread:
    """Send this process SIGTERM as soon as ready() is true, which a thread asks; returns the thread."""

    def wait_and_send() -> None:
        while not ready():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=wait_and_send, daemon=True)
    watcher.start()
    return watcher


def write_letters(directory: Path) -> None:
    """A tokenizer of single characters for the vocabulary of `SHAPES`; it puts BOS first, as Llama's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = {mark: i for i, mark in enumerate(marks)} | {chr(32 + i): 4 + i for i in range(93)}
    characters = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=characters, **names).save_pretrained(directory)
