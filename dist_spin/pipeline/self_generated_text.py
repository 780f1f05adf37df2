"""Calibration text that the model writes itself (Liu et al. 2023, LLM-QAT): no data are needed, and they suit the model.

Every sequence starts with a token drawn at random from the vocabulary; the next few are the most likely ones, which gives it a
plausible beginning, and the rest is sampled from the model's distribution as it is. Written in batches, a file each, so that
an interrupted start goes on. The model has to fit on one device, for every token needs all of its layers.
"""

from typing import Any

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.weights import DummyWeights, ModelFiles
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.model import model_dtype
from dist_spin.runtime.progress import Progress, warn
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import identity_hash, load_if_current, load_tensors, save_tensors

BATCH = 16  # sequences written together
GREEDY = (3, 6)  # how many most likely tokens follow the first: from 3 up to, but not including, 6


def self_text(config: RunConfig, files: ModelFiles, n: int, seq_len: int, seed: int) -> Tensor:
    """`n` sequences [n, seq_len] int64 on the CPU, the same for the same model, seed and kind of device; stored in the run.

    Called by one rank.

    Raises:
        UserError: the model has random weights, or does not fit on the device.
    """
    if isinstance(files.weights, DummyWeights):
        raise UserError(
            "a model of random weights writes no text", "name another source, or set model.dummy_weights=false"
        )
    identity = {"model": files.weights.fingerprint(), "dtype": dtype_name(config), "seq_len": seq_len, "seed": seed}
    directory = run_dir(config).path / "self_text" / identity_hash(identity)[:12]
    model, out = None, []
    batches = range(-(-n // BATCH))
    progress = Progress("the model writes: batch", len(batches))
    for number in batches:
        path = directory / f"{number:04d}.safetensors"
        stored = load_if_current(path, load_tensors, lambda metadata: True, "writing it again", warn)
        if stored is None:
            model = _model(config, files) if model is None else model
            stored = {"tokens": write(model, BATCH, seq_len, seed * 1_000_003 + number)}
            save_tensors(path, stored, {})
        out.append(stored["tokens"])
        progress.advance()
    return torch.cat(out)[:n].long()


def _model(config: RunConfig, files: ModelFiles) -> Any:
    from transformers import AutoModelForCausalLM

    cuda = config.distributed.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    trust = files.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(files.directory, dtype=model_dtype(config), trust_remote_code=trust)
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError("the model does not fit on the device, as writing text needs", "name another source") from error


@torch.no_grad()
def write(model: Any, batch: int, seq_len: int, seed: int) -> Tensor:
    """Token ids [batch, seq_len] int64 on the CPU that a transformers model makes up."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (batch, 1), generator=generator)
    greedy = torch.randint(*GREEDY, (batch, 1), generator=generator)
    cache = None
    while tokens.shape[1] < seq_len:
        made = model(tokens[:, -1:].to(model.device), past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        logits = made.logits[:, -1].float().cpu()
        likely = logits.argmax(-1, keepdim=True)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, torch.where(tokens.shape[1] <= greedy, likely, drawn)], dim=1)
    return tokens
