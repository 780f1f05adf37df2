"""The training loop of LLM-QAT: the model writes its text and is trained on it as a whole.

    RUN/methods/llm_qat/KEY/training.safetensors        masters and moments, every `SAVE_EVERY` seconds and upon a signal
    RUN/methods/llm_qat/KEY/000.safetensors ...         once training is over: each layer, then embedding, norm and head

Every rank holds the whole model and takes its share of each batch.
"""

import functools
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.compare.methods.base import SaveState
from dist_spin.compare.methods.llm_qat_student import WIDE_COPIES, Student, predictions
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
from dist_spin.optimize.sharding.memory_planner import layer_bytes
from dist_spin.pipeline.model import model_dtype
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.runtime.device_memory import device_bytes_free
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
    save: SaveState,
    stop: StopRequest,
) -> None:
    """Train, from the state in `directory` if there is one, and `save` the result on rank 0; called by all ranks together.

    sites: what is quantised at run time. options: how the weight of each linear is quantised; empty for 16-bit weights.

    Raises:
        Interrupted: a signal came; the state is saved.
        NumericsError: the loss is not finite.
        UserError: the model does not fit on the device with what training needs.
    """
    q, m, dtype = config.quantize, config.methods, model_dtype(config)
    raise_on_any_failure(
        lambda: check_memory(files.shape, dtype, min(m.qat_batch_size * q.seq_len, TOKENS_AT_ONCE), world)
    )
    tokens = on_rank0(lambda: self_text(config, files, q.n_sequences, q.seq_len, q.seed))
    plain = RotatedWeights(files.weights, files.shape, None, (), world.device, dtype)
    teacher, quantized = (
        LayerRunner(files.config, s, device=world.device, dtype=dtype, rotated=False) for s in (Sites(), sites)
    )
    targets = predictions(teacher, plain, tokens)
    student = Student(quantized, plain, options, tied=files.config.tie_word_embeddings)
    path = directory / "training.safetensors"
    done, losses = resume(student, path)
    progress = Progress("LLM-QAT: step", m.qat_steps, done, show=world.is_rank0)
    last_save = time.monotonic()
    for step in range(done, m.qat_steps):
        indices = batch_indices(step, m.qat_batch_size, len(tokens), q.seed)
        losses.append(backward(student, world, tokens, targets, indices))
        if not math.isfinite(losses[-1]):
            raise NumericsError(f"LLM-QAT, step {step + 1}: the loss is {losses[-1]}", "lower methods.qat_lr")
        student.step(m.qat_lr * (1 + math.cos(math.pi * step / m.qat_steps)) / 2)
        progress.advance(f"loss {losses[-1]:.4f}")
        stopping = any_rank(bool(stop)) and step + 1 < m.qat_steps
        if stopping or any_rank(time.monotonic() - last_save > SAVE_EVERY):
            metadata = {"steps": str(step + 1), "losses": json.dumps(losses)}
            on_rank0(functools.partial(save_tensors, path, student.state(), metadata))
            last_save = time.monotonic()
        if stopping:
            raise Interrupted(f"stopped by a signal after step {step + 1} (llm_qat)", "the same command continues")
    tenth = -(-len(losses) // 10)
    figures = {"first_loss": sum(losses[:tenth]) / tenth, "last_loss": sum(losses[-tenth:]) / tenth}

    def finish() -> None:
        for index in range(files.shape.layers + 1):
            save(index, student.layer_state(index), figures)
        path.unlink(missing_ok=True)

    on_rank0(finish)


def backward(student: Student, world: World, tokens: Tensor, targets: Tensor, indices: list[int]) -> float:
    """Compute the gradients of the mean loss over a batch, summed over ranks; returns that loss.

    tokens [n, T], targets [n, T, h]: of all sequences. indices: of the sequences in the batch.
    """
    own = rank_share(indices, world.rank, world.size)
    per_pass = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for first in range(0, len(own), per_pass):
        micro_batch = own[first : first + per_pass]
        loss = student.loss(tokens[micro_batch].to(world.device), targets[micro_batch].to(world.device))
        loss = loss * (len(micro_batch) / len(indices))
        loss.backward()
        total += loss.detach()
    for gradient in student.gradients():
        sum_over_ranks_(gradient)
    return float(sum_over_ranks_(total))


def resume(student: Student, path: Path) -> tuple[int, list[float]]:
    """Load the training state that rank 0 finds at `path`; returns how many steps are done, and their losses."""

    def load() -> tuple[dict[str, Tensor], dict[str, str]] | None:
        try:
            return load_tensors(path) if path.exists() else None
        except CorruptFile as error:
            warn(f"{error}; training starts again")
            return None

    saved = on_rank0(load)
    if saved is None:
        return 0, []
    state, metadata = saved
    steps = int(metadata["steps"])
    student.load(state, steps)
    return steps, json.loads(metadata["losses"])


def check_memory(shape: Shape, dtype: torch.dtype, tokens: int, world: World) -> None:
    """Check that training fits into the free memory of this rank's device. tokens: how many go through in one pass.

    Raises:
        UserError: it does not fit.
    """
    wide = accumulation_dtype(dtype).itemsize
    weights = shape.layers * (layer_bytes(shape, dtype) // dtype.itemsize) + 2 * shape.vocab * shape.hidden
    activations = shape.layers * kept_bytes(shape, tokens, dtype.itemsize, "layer")
    activations += kept_bytes(shape, tokens, dtype.itemsize, "none", compiled=False) + 4 * wide * LOGITS_AT_ONCE
    need = weights * (dtype.itemsize + WIDE_COPIES * wide) + activations
    if world.device.type == "cuda":
        free, memory = device_bytes_free(world.device), "GPU"
    else:
        free, memory = host_bytes_free() // world.local_size, "host"
    if need > free:
        raise UserError(
            f"LLM-QAT trains all weights at once, which takes {need / 2**30:.1f} GiB, and the {memory} has "
            f"{free / 2**30:.1f} GiB free for each process",
            "leave llm_qat out, or use a smaller model",
        )
