"""Learn the rotations. Start it again, with any number of ranks, and it continues.

dist-spin optimize configs/quickstart.yaml
torchrun --nproc_per_node 2 -m dist_spin optimize configs/quickstart.yaml optimize.steps=50
"""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.data import batch_indices, rank_share
from dist_spin.errors import Interrupted, NumericsError
from dist_spin.numerics.cayley import nearest_orthogonal, orthogonality_error
from dist_spin.optimize.setup import Learning, learning_tokens, set_up, write_checkpoint
from dist_spin.pipeline.initial_rotations import fits_start
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.preset_rotations import keep_given, refuse_given
from dist_spin.pipeline.quant_sites import clips_at, site_bits, while_learning
from dist_spin.pipeline.range_init import make_start
from dist_spin.runtime.distributed import World, agree, any_rank, on_leader, sum_over_ranks_, together
from dist_spin.runtime.progress import Progress, say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import append_line
from dist_spin.storage.checkpoints import CheckpointWriter
from dist_spin.storage.rotations import save_final
from dist_spin.storage.tensorboard import Scalars


def optimize(config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
    """Learn R1 and R2 from where the run directory stands, and write rotations/final.safetensors and R.bin.

    stop: of the stage that this is a part of; alone it has its own.

    Raises:
        Interrupted: a signal came; the state is saved.
        NumericsError: loss or gradient is not finite; the checkpoints before it are kept.
        UserError: something in the configuration or the run directory is in the way.
    """
    if config.optimize.steps == 0:
        files = open_configured_model(config)
        if fits_start(config):
            make_start(config, world, files, learning_tokens(config, files))
        keep_given(config, files.shape)
        say("optimize.steps=0: rotations stay as they are given")
        return
    refuse_given(config)
    stop = StopRequest() if stop is None else stop
    learning = set_up(config, world)
    settings = config.optimize
    scalars = Scalars(learning.run.path / "tensorboard", learning.step, config.report.tensorboard and world.leads, say)
    progress = Progress("learn rotations: step", settings.steps, learning.step, show=world.leads)
    writer = CheckpointWriter(lambda state, step: write_checkpoint(learning, state, step))
    stall = 0.0  # seconds that the checkpoint before this step held it up
    if learning.step == 0 and learning.guard is not None:
        judge(learning)
    while learning.step < settings.steps:
        began = time.monotonic()
        try:
            figures = one_step(learning)
        except NumericsError:
            together(writer.close)
            raise
        # Before the checkpoint, so that none lacks its line; a resumed run drops lines that have no checkpoint.
        seconds = time.monotonic() - began + stall
        line = {**figures, "stall": stall, "seconds": seconds}
        log(learning, line)
        scalars.add("optimize", learning.step, line)
        # Rank 0 alone writes; a write that failed stops every rank.
        stall = on_leader(lambda: writer.submit(learning.state(), learning.step))
        progress.advance(f"loss {figures['loss']:.4f}")
        if learning.step < settings.steps and any_rank(bool(stop)):
            together(writer.close)
            if world.leads:
                learning.run.event("interrupted", stage="optimize", step=learning.step, signal=stop.name)
            raise Interrupted(f"stopped by a signal after step {learning.step}", "the same command continues")
    together(writer.close)
    finish(learning)


def one_step(learning: Learning) -> dict[str, float]:
    """Loss, backward, reduce, step, and the guard's judgement where it is due; returns the figures to log.

    Raises:
        NumericsError: loss or gradient is not finite, and no guard knows a state from which they were.
    """
    settings, guard, optimizer = learning.config.optimize, learning.guard, learning.optimizer
    loss = backward(learning)
    norm = optimizer.reduce_gradients()
    reduced = bits_of(*gradients(learning))
    if not math.isfinite(loss + norm):
        if guard is None or guard.at_best:
            raise NumericsError(
                f"step {learning.step + 1}: loss {loss} and gradient norm {norm} are not finite",
                f"the state after step {learning.step} is kept; lower optimize.lr or check the data",
            )
        guard.back_off()
        learning.step += 1
        optimizer.forget(learning.step)
        note_back_off(learning, loss)
        return {"loss": loss, "grad_norm": norm, "lr": 0.0, "held_out": guard.best_loss}
    lr = learning_rate(learning.config, learning.step) * (1.0 if guard is None else guard.factor)
    figures = optimizer.step(lr, norm, lr / settings.lr)
    learning.step += 1
    if guard is not None:
        guard.moved()
    assert_same_rotations(learning, reduced)
    if guard is not None and (learning.step % settings.guard_every == 0 or learning.step == settings.steps):
        figures["held_out"] = judge(learning)
    return {"loss": loss, "grad_norm": norm, "lr": lr, **figures}


def judge(learning: Learning) -> float:
    """Measure the held-out loss and let the guard act on it; after the last step the best state is taken.

    Raises:
        NumericsError: it is not finite where learning starts.
    """
    guard, last = learning.guard, learning.step == learning.config.optimize.steps
    assert guard is not None
    loss = held_out_loss(learning)
    if learning.step == 0 and not math.isfinite(loss):
        raise NumericsError(f"the held-out loss is {loss} at the start", "check the model's dtype and the data")
    if guard.judge(loss):
        learning.optimizer.forget(learning.step)
        note_back_off(learning, loss)
    elif last and not guard.at_best:
        guard.restore()
        learning.optimizer.forget(learning.step)
    if learning.world.leads and (last or not learning.step):
        learning.run.event("held_out", step=learning.step, loss=loss, best=guard.best_loss)
    return loss


def note_back_off(learning: Learning, loss: float) -> None:
    """Tell of a jump."""
    guard = learning.guard
    assert guard is not None
    if learning.world.leads:
        learning.run.event("back_off", step=learning.step, loss=loss, best=guard.best_loss, factor=guard.factor)
        say(
            f"step {learning.step}: loss {loss:.4f} against {guard.best_loss:.4f} at best: back to it, "
            f"learning rates times {guard.factor:g}"
        )


def backward(learning: Learning) -> float:
    """Forward and backward of this rank's share of the global batch; returns the loss of the whole batch."""
    settings = learning.config.optimize
    indices = batch_indices(learning.step, settings.batch_size, len(learning.tokens), settings.seed)
    total = torch.zeros((), device=learning.world.device, dtype=torch.float64)
    learning.engine.fit_grids(learning.model, learning.optimizer.rotations)
    for ids, weights in passes(learning.world, learning.micro_batch_size, learning.tokens, indices):
        losses = learning.model(ids)  # [micro]
        loss = (losses * weights.to(losses.dtype)).sum()
        loss.backward()
        total += loss.detach()
    learning.engine.assert_sharded(learning.model, learning.world)
    return float(sum_over_ranks_(total))


@torch.no_grad()
def held_out_loss(learning: Learning) -> float:
    """The objective on the held-out sequences, their mean over all ranks."""
    assert learning.held_out is not None
    total = torch.zeros((), device=learning.world.device, dtype=torch.float64)
    learning.engine.fit_grids(learning.model, learning.optimizer.rotations)
    everything = list(range(len(learning.held_out)))
    for ids, weights in passes(learning.world, learning.micro_batch_size, learning.held_out, everything):
        total += (learning.model(ids) * weights).sum()
    return float(sum_over_ranks_(total))


def passes(world: World, micro: int, tokens: Tensor, indices: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a batch in forward passes: ids [micro, seq_len] and the sequences' weights [micro] in the mean.

    Every rank makes the same number of passes, since sharded layers are gathered by all; a rank with fewer sequences
    repeats one with weight zero. So the result does not depend on how the batch divides.
    """
    mine = rank_share(indices, world.rank, world.size)
    count = -(-len(rank_share(indices, 0, world.size)) // micro)
    padded = mine + [indices[0]] * (count * micro - len(mine))
    weights = torch.tensor([1.0] * len(mine) + [0.0] * (len(padded) - len(mine)), device=world.device) / len(indices)
    for i in range(0, len(padded), micro):
        yield tokens[padded[i : i + micro]].to(world.device), weights[i : i + micro]


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then cosine, linear or constant to the last step."""
    settings = config.optimize
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.lr * shape[settings.schedule]


def bits_of(*tensors: Tensor) -> int:
    """A number that differs wherever any bit of floating-point tensors does, all but surely: the sum of their words."""
    words = (t.view(torch.int64 if t.dtype == torch.float64 else torch.int32).sum(dtype=torch.int64) for t in tensors)
    return sum(int(word) for word in words) % (1 << 62)


def assert_same_rotations(learning: Learning, reduced: int) -> None:
    """Every rank holds the same bits of what is learned and of the gradient (`reduced`) that moved it.

    The gradient is asked for too, because shares of R are gathered: a reduction that did not happen would not show in R.
    """
    if not agree((bits_of(*learning.optimizer.masters().values()) + reduced) % (1 << 62)):
        raise AssertionError(f"rotations or their gradients differ between ranks after step {learning.step}")


def gradients(learning: Learning) -> list[Tensor]:
    """The packed gradients of everything that is learned."""
    euclidean = learning.optimizer.euclidean
    own = learning.optimizer.rotations.gradient
    return [own] if euclidean is None else [own, euclidean.transforms.gradient]


def log(learning: Learning, figures: dict[str, float]) -> None:
    """One line per step in metrics.jsonl."""
    if learning.world.leads:
        append_line(learning.run.path / "metrics.jsonl", {"step": learning.step, **figures})


def finish(learning: Learning) -> None:
    """Re-orthogonalise in fp64 and write the files that other stages and other tools read."""
    rotations = learning.optimizer.rotations

    def write() -> None:
        dtype = rotations.r1.dtype
        r1, r2 = (nearest_orthogonal(r).to(dtype) for r in (rotations.r1, rotations.r2))
        about = {"step": str(learning.step), "seed": str(learning.config.rotation.seed)}
        euclidean, config = learning.optimizer.euclidean, learning.config
        transforms = {} if euclidean is None else euclidean.transforms.values()
        bits = None
        if "clip" in transforms:
            bits = site_bits(config)
            transforms["clip"] = clips_at(config, site_bits(while_learning(config)), transforms["clip"])
        save_final(learning.run, r1, r2, about, transforms, bits)
        errors = {
            "orthogonality_r1": float(orthogonality_error(r1)),
            "orthogonality_r2": float(orthogonality_error(r2)),
        }
        learning.run.event("done", stage="optimize", step=learning.step, **errors)
        say(f"wrote {learning.run.rotations / 'final.safetensors'} and R.bin")

    if learning.world.leads and (learning.run.rotations / "final.safetensors").exists():
        say(f"rotations of run {learning.config.name} are complete")
    on_leader(lambda: None if (learning.run.rotations / "final.safetensors").exists() else write())
