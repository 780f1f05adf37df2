"""LLM-QAT as a whole: the model writes its text, is trained on it, and leaves a file per layer.

    RUN/methods/llm_qat/KEY/training.safetensors        masters and moments, now and then and when a signal comes
    RUN/methods/llm_qat/KEY/000.safetensors ...         a layer each once training is over, and one more for the ends

Every rank holds the whole model and takes its share of each batch: the one method here that does not go layer by layer.
"""

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.compare.methods import llm_qat
from dist_spin.compare.methods.transformed_layer import State
from dist_spin.config.run import RunConfig
from dist_spin.data import batch_indices, rank_share
from dist_spin.errors import Interrupted, NumericsError, UserError
from dist_spin.model.activation_checkpoint import kept_bytes
from dist_spin.model.architecture import Shape
from dist_spin.model.layer_inputs import TOKENS_AT_ONCE
from dist_spin.model.layers import LayerRunner
from dist_spin.model.loss import LOGITS_AT_ONCE
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.optimize.sharding.memory_planner import device_bytes_free, layer_bytes
from dist_spin.pipeline.model import model_dtype
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.runtime.distributed import World, any_rank, on_rank0, raise_on_any_failure, sum_over_ranks_
from dist_spin.runtime.host_memory import host_bytes_free
from dist_spin.runtime.progress import Progress, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.tensor_file import CorruptFile, load_tensors, save_tensors

SAVE_EVERY = 300.0  # seconds between states on disk: one has three wide numbers for every weight


def train(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    sites: Sites,
    options: dict[str, GPTQOptions],
    directory: Path,
    save: Callable[[int, State, dict[str, float]], None],
    stop: StopRequest,
) -> None:
    """Train, from where `directory` stands, and hand every state to `save` on rank 0; called by all ranks together.

    options: how each linear's weight is rounded; empty for 16-bit weights.

    Raises:
        Interrupted: a signal came; the state is saved.
        NumericsError: the loss is not finite.
        UserError: the model does not fit on the device with what training needs.
    """
    q, m, dtype = config.quantize, config.methods, model_dtype(config)
    raise_on_any_failure(
        lambda: check_room(files.shape, dtype, min(m.qat_batch_size * q.seq_len, TOKENS_AT_ONCE), world)
    )
    tokens = on_rank0(lambda: self_text(config, files, q.n_sequences, q.seq_len, q.seed))
    plain = RotatedWeights(files.weights, files.shape, None, (), world.device, dtype)
    exact, rounding = (
        LayerRunner(files.config, s, device=world.device, dtype=dtype, rotated=False) for s in (Sites(), sites)
    )
    targets = llm_qat.predictions(exact, plain, tokens)
    student = llm_qat.Student(rounding, plain, options, files.config.tie_word_embeddings)
    path = directory / "training.safetensors"
    done, losses = resume(student, path)
    progress = Progress("LLM-QAT: step", m.qat_steps, done, show=world.is_rank0)
    saved = time.monotonic()
    for step in range(done, m.qat_steps):
        indices = batch_indices(step, m.qat_batch_size, len(tokens), q.seed)
        losses.append(backward(student, world, tokens, targets, indices))
        if not math.isfinite(losses[-1]):
            raise NumericsError(f"LLM-QAT, step {step + 1}: the loss is {losses[-1]}", "lower methods.qat_lr")
        student.step(m.qat_lr * (1 + math.cos(math.pi * step / m.qat_steps)) / 2)
        progress.advance(f"loss {losses[-1]:.4f}")
        asked = any_rank(bool(stop)) and step + 1 < m.qat_steps
        if asked or any_rank(time.monotonic() - saved > SAVE_EVERY):
            about = {"steps": str(step + 1), "losses": json.dumps(losses)}
            on_rank0(functools.partial(save_tensors, path, student.state(), about))
            saved = time.monotonic()
        if asked:
            raise Interrupted(f"stopped by a signal after step {step + 1} (llm_qat)", "the same command continues")
    tenth = -(-len(losses) // 10)
    figures = {"first_loss": sum(losses[:tenth]) / tenth, "last_loss": sum(losses[-tenth:]) / tenth}

    def finish() -> None:
        for index in range(files.shape.layers + 1):
            save(index, student.trained(index), figures)
        path.unlink(missing_ok=True)

    on_rank0(finish)


def backward(student: llm_qat.Student, world: World, tokens: Tensor, targets: Tensor, indices: list[int]) -> float:
    """Gradients of the mean loss over a batch, reduced over ranks; that loss."""
    mine = rank_share(indices, world.rank, world.size)
    at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for lo in range(0, len(mine), at_once):
        some = mine[lo : lo + at_once]
        loss = student.loss(tokens[some].to(world.device), targets[some].to(world.device)) * (len(some) / len(indices))
        loss.backward()
        total += loss.detach()
    for gradient in student.gradients():
        sum_over_ranks_(gradient)
    return float(sum_over_ranks_(total))


def resume(student: llm_qat.Student, path: Path) -> tuple[int, list[float]]:
    """Steps done before and their losses, from the file that rank 0 finds."""

    def find() -> tuple[dict[str, Tensor], dict[str, str]] | None:
        try:
            return load_tensors(path) if path.exists() else None
        except CorruptFile as error:
            warn(f"{error}; training starts again")
            return None

    found = on_rank0(find)
    if found is None:
        return 0, []
    state, about = found
    steps = int(about["steps"])
    student.load(state, steps)
    return steps, json.loads(about["losses"])


def check_room(shape: Shape, dtype: torch.dtype, tokens: int, world: World) -> None:
    """Refuse a model whose training does not fit into the free memory of this rank's device.

    tokens: of one pass.

    Raises:
        UserError: it does not.
    """
    wide = accumulation_dtype(dtype).itemsize
    weights = shape.layers * (layer_bytes(shape, dtype) // dtype.itemsize) + 2 * shape.vocab * shape.hidden
    activations = shape.layers * kept_bytes(shape, tokens, dtype.itemsize, "layer")
    activations += kept_bytes(shape, tokens, dtype.itemsize, "none", compiled=False) + 4 * wide * LOGITS_AT_ONCE
    need = weights * (dtype.itemsize + llm_qat.WIDE_COPIES * wide) + activations
    if world.device.type == "cuda":
        free, where = device_bytes_free(world.device), "GPU"
    else:
        free, where = host_bytes_free() // world.local_size, "host"
    if need > free:
        raise UserError(
            f"LLM-QAT trains all weights at once, which takes {need / 2**30:.1f} GiB, and the {where} has "
            f"{free / 2**30:.1f} GiB free for each process",
            "leave llm_qat out, or use a smaller model",
        )
