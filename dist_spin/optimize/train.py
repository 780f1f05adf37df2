"""Learn the rotations. Start it again, with any number of ranks, and it continues.

dist-spin optimize configs/quickstart.yaml
torchrun --nproc_per_node 2 -m dist_spin optimize configs/quickstart.yaml optimize.steps=50
"""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.data import batch_indices, rank_share
from dist_spin.errors import Interrupted, NumericsError
from dist_spin.model.architecture import Shape
from dist_spin.model.loss import Targets
from dist_spin.model.rotation import stored_rotations
from dist_spin.numerics.cayley import nearest_orthogonal, orthogonality_error
from dist_spin.optimize.overflow import overflow_at_start
from dist_spin.optimize.setup import TrainState, build_training, learning_tokens, write_checkpoint
from dist_spin.optimize.stored_teacher import stacked
from dist_spin.pipeline.export_limits import check_export_target, tell_exportable
from dist_spin.pipeline.initial_rotations import fits_start
from dist_spin.pipeline.model import model_dtype, open_configured_model
from dist_spin.pipeline.preset_rotations import check_not_preset, save_preset_rotations
from dist_spin.pipeline.quant_sites import check_learning_formats, clips_at, site_bits, tell_key_bias, while_learning
from dist_spin.pipeline.range_init import make_start
from dist_spin.runtime.distributed import (
    World,
    all_ranks_equal,
    any_rank,
    on_rank0,
    raise_on_any_failure,
    sum_over_ranks_,
)
from dist_spin.runtime.progress import Progress, long_step, say, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.checkpoints import CheckpointWriter
from dist_spin.storage.metrics import append_metrics
from dist_spin.storage.rotations import finished_rotations, save_final
from dist_spin.storage.tensorboard import Scalars


def train(config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
    """Learn R1 and R2, from the run's newest checkpoint if it has one, and write rotations/final.safetensors and R.bin.

    stop: the signals that the calling stage watches; by default this one watches them itself.

    Raises:
        Interrupted: a signal came; the state is saved.
        NumericsError: loss or gradient is not finite; the checkpoints before it are kept.
        UserError: something in the configuration or the run directory is in the way.
    """
    if config.optimize.steps == 0:
        keep_initial_rotations(config, world)
        return
    check_not_preset(config)
    train_state = build_training(config, world)
    stop = StopRequest() if stop is None else stop  # not earlier: until here there is nothing to save
    steps = config.optimize.steps
    tensorboard = config.report.tensorboard and world.is_rank0
    scalars = Scalars(train_state.run.path / "tensorboard", train_state.step, warn, wanted=tensorboard)
    progress = Progress("learn rotations: step", steps, train_state.step, show=world.is_rank0)
    writer = CheckpointWriter(lambda state, step: write_checkpoint(train_state, state, step))
    checkpoint_wait = 0.0  # seconds that the step before waited for the writer of checkpoints
    try:
        if train_state.step == 0 and train_state.best_state is not None:
            check_held_out(train_state, stop)
        while train_state.step < steps:
            began = time.monotonic()
            with first_step(train_state):
                loss = forward_backward(train_state, stop)
            grad_norm = train_state.optimizer.reduce_gradients()
            metrics = optimizer_step(train_state, loss, grad_norm)
            # Logged before the checkpoint, so that none lacks its line; a resumed run drops lines that have no checkpoint.
            seconds = time.monotonic() - began + checkpoint_wait
            log_step(train_state, {**metrics, "checkpoint_wait_s": checkpoint_wait, "seconds": seconds}, scalars)
            # Rank 0 alone writes; a write that failed stops every rank.
            checkpoint_wait = on_rank0(lambda: writer.submit(train_state.state(), train_state.step))
            progress.advance(f"loss {loss:.4f}")
            if train_state.step < steps and any_rank(bool(stop)):
                raise interrupted(train_state.step)
    except (Interrupted, NumericsError) as reason:
        raise_on_any_failure(writer.close)
        if isinstance(reason, Interrupted) and world.is_rank0:
            train_state.run.event("interrupted", stage="optimize", step=train_state.step, signal=stop.name)
        raise
    finally:
        scalars.close()
    raise_on_any_failure(writer.close)
    finish(train_state)


def first_step(train_state: TrainState) -> contextlib.AbstractContextManager[None]:
    """Around the first step of this process, which is slower than the others: tells the user if it is long."""
    first, train_state.started = not train_state.started, True
    return long_step("take the first step") if first else contextlib.nullcontext()


def keep_initial_rotations(config: RunConfig, world: World) -> None:
    """With optimize.steps=0 nothing is learned: other stages read the rotations that learning would start from."""
    files = open_configured_model(config)
    check_export_target(config, files.config)
    check_learning_formats(config)
    if fits_start(config):
        make_start(config, world, files, learning_tokens(config, files))
    save_preset_rotations(config, files.shape)
    tell_exportable(config, files.config)
    tell_key_bias(config, files)
    say("optimize.steps=0: the initial rotations are used as they are")


def optimizer_step(train_state: TrainState, loss: float, grad_norm: float) -> dict[str, float]:
    """Step everything that is learned, and measure the held-out loss where it is due; returns the metrics to log.

    A loss or gradient that is not finite goes back to the best state instead.

    Raises:
        NumericsError: loss or gradient is not finite, and there is no earlier state from which they were.
    """
    settings, best_state, optimizer = train_state.config.optimize, train_state.best_state, train_state.optimizer
    reduced = bitwise_checksum(*gradients(train_state))
    if not math.isfinite(loss + grad_norm):
        if train_state.step == 0:
            raise overflow_error(
                train_state, f"loss {loss}, gradient norm {grad_norm}", train_state.tokens, step_indices(train_state)
            )
        if best_state is None or best_state.at_best:
            raise NumericsError(
                f"step {train_state.step + 1}: loss {loss} and gradient norm {grad_norm} are not finite",
                f"the state after step {train_state.step} is kept; lower optimize.lr or check the data",
            )
        best_state.rollback()
        train_state.step += 1
        optimizer.reset(train_state.step)
        report_spike(train_state, loss)
        return {"loss": loss, "grad_norm": grad_norm, "lr": 0.0, "held_out": best_state.best_loss}
    lr = learning_rate(train_state.config, train_state.step) * (1.0 if best_state is None else best_state.factor)
    metrics = optimizer.step(lr, grad_norm, lr / settings.lr)
    train_state.step += 1
    if best_state is not None:
        best_state.moved()
    assert_same_rotations(train_state, reduced)
    if best_state is not None and (train_state.step % settings.guard_every == 0 or train_state.step == settings.steps):
        metrics["held_out"] = check_held_out(train_state)
    return {"loss": loss, "grad_norm": grad_norm, "lr": lr, **metrics}


def check_held_out(train_state: TrainState, stop: StopRequest | None = None) -> float:
    """Measure the held-out loss; return to the best state after a loss spike, and take it after the last step.

    Raises:
        Interrupted: as `until_stopped`.
        NumericsError: it is not finite where learning starts.
    """
    best_state, is_last = train_state.best_state, train_state.step == train_state.config.optimize.steps
    assert best_state is not None
    loss = held_out_loss(train_state, stop)
    if train_state.step == 0 and not math.isfinite(loss):
        assert train_state.held_out is not None
        held_out = train_state.held_out
        raise overflow_error(train_state, f"held-out loss {loss}", held_out, list(range(len(held_out))))
    if best_state.update(loss):
        train_state.optimizer.reset(train_state.step)
        report_spike(train_state, loss)
    elif is_last and not best_state.at_best:
        best_state.restore()
        train_state.optimizer.reset(train_state.step)
    if train_state.world.is_rank0 and (is_last or not train_state.step):
        train_state.run.event("held_out", step=train_state.step, loss=loss, best=best_state.best_loss)
    return loss


def overflow_error(train_state: TrainState, observed: str, tokens: Tensor, indices: list[int]) -> NumericsError:
    """The error for what is not finite before the first step on sequences `indices` of `tokens`; every rank calls it.

    observed: loss and gradient norm, in words.
    """
    world = train_state.world
    batches = (tokens[picked].to(world.device) for picked, _ in passes(train_state, indices))
    return overflow_at_start(train_state.model, batches, model_dtype(train_state.config), observed)


def report_spike(train_state: TrainState, loss: float) -> None:
    """Tell the user, and events.jsonl, of a loss spike after which learning went back to the best state."""
    best_state = train_state.best_state
    assert best_state is not None
    if train_state.world.is_rank0:
        train_state.run.event(
            "back_off", step=train_state.step, loss=loss, best=best_state.best_loss, factor=best_state.factor
        )
        warn(
            f"step {train_state.step}: loss {loss:.4f} against the best {best_state.best_loss:.4f}: returned to the best state, "
            f"with learning rates times {best_state.factor:g}"
        )


def forward_backward(train_state: TrainState, stop: StopRequest | None = None) -> float:
    """Forward and backward of this rank's share of the global batch; returns the loss of the whole batch.

    Raises:
        Interrupted: as `until_stopped`; the step is abandoned, and nothing of it was applied.
    """
    indices = step_indices(train_state)
    total = torch.zeros((), device=train_state.world.device, dtype=torch.float64)
    train_state.engine.requantize_weights(train_state.model, train_state.optimizer.rotations)
    for losses, weights in until_stopped(sequence_losses(train_state, indices), train_state.step, stop):
        loss = (losses * weights.to(losses.dtype)).sum()
        loss.backward()
        total += loss.detach()
    train_state.engine.assert_sharded(train_state.model, train_state.world)
    return float(sum_over_ranks_(total))


def step_indices(train_state: TrainState) -> list[int]:
    """Which sequences make up the global batch of this step."""
    settings = train_state.config.optimize
    return batch_indices(train_state.step, settings.batch_size, len(train_state.tokens), settings.seed)


@torch.no_grad()
def held_out_loss(train_state: TrainState, stop: StopRequest | None = None) -> float:
    """The objective on the held-out sequences, their mean over all ranks."""
    assert train_state.held_out is not None
    total = torch.zeros((), device=train_state.world.device, dtype=torch.float64)
    train_state.engine.requantize_weights(train_state.model, train_state.optimizer.rotations)
    indices = list(range(len(train_state.held_out)))
    for losses, weights in until_stopped(sequence_losses(train_state, indices, held_out=True), train_state.step, stop):
        total += (losses * weights).sum()
    return float(sum_over_ranks_(total))


def sequence_losses(
    train_state: TrainState, indices: list[int], *, held_out: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The losses [micro] of this rank's share of some sequences, pass after pass, and their weights [micro] in the mean.

    held_out: whether `indices` are of the held-out sequences, which follow the others in the text.
    """
    tokens = train_state.held_out if held_out else train_state.tokens
    assert tokens is not None
    teacher, device, own_passes = train_state.teacher, train_state.world.device, passes(train_state, indices)
    targets: list[Targets] = []
    if teacher is not None:  # all before the first pass, so that no rank waits for one that finds a damaged file
        first = len(train_state.tokens) if held_out else 0
        stored = [[first + index for index in picked] for picked, _ in own_passes]
        raise_on_any_failure(lambda: targets.extend(stacked(teacher.load(part), device) for part in stored))
    for number, (picked, weights) in enumerate(own_passes):
        yield train_state.model(tokens[picked].to(device), targets[number] if targets else None), weights


def passes(train_state: TrainState, indices: list[int]) -> list[tuple[list[int], Tensor]]:
    """This rank's share of a batch in forward passes: the sequences of each, and their weights [micro] in the mean.

    Every rank makes the same number of passes, since sharded layers are gathered by all; a rank with fewer sequences
    repeats one with weight zero. So the result does not depend on how the batch divides.
    """
    world, micro = train_state.world, train_state.micro_batch_size
    mine = rank_share(indices, world.rank, world.size)
    count = -(-len(rank_share(indices, 0, world.size)) // micro)
    padded = mine + [indices[0]] * (count * micro - len(mine))
    weights = torch.tensor([1.0] * len(mine) + [0.0] * (len(padded) - len(mine)), device=world.device) / len(indices)
    return [(padded[i : i + micro], weights[i : i + micro]) for i in range(0, len(padded), micro)]


def until_stopped(
    batches: Iterator[tuple[Tensor, Tensor]], step: int, stop: StopRequest | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same micro-batches; between two of them the ranks ask each other whether one was told to stop.

    Raises:
        Interrupted: one was; every rank raises. step: the last one that was taken.
    """
    for index, batch in enumerate(batches):
        if stop is not None and index and any_rank(bool(stop)):
            raise interrupted(step)
        yield batch


def interrupted(step: int) -> Interrupted:
    """The error of a run that a signal stops after `step`."""
    return Interrupted(f"stopped by a signal after step {step}", "the same command continues")


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then cosine, linear or constant to the last step."""
    settings = config.optimize
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.lr * shape[settings.schedule]


def bitwise_checksum(*tensors: Tensor) -> int:
    """The sum of floating-point tensors' bits as integers: if any bit differs, this almost surely differs, too."""
    words = (t.view(torch.int64 if t.dtype == torch.float64 else torch.int32).sum(dtype=torch.int64) for t in tensors)
    return sum(int(word) for word in words) % (1 << 62)


def assert_same_rotations(train_state: TrainState, reduced: int) -> None:
    """Every rank holds the same bits of what is learned and of the gradient (`reduced`) that moved it.

    The gradient is compared too, because ranks gather their shares of R: a missing reduction would not show in R.
    """
    if not all_ranks_equal((bitwise_checksum(*train_state.optimizer.masters().values()) + reduced) % (1 << 62)):
        raise AssertionError(f"rotations or their gradients differ between ranks after step {train_state.step}")


def gradients(train_state: TrainState) -> list[Tensor]:
    """The packed gradients of everything that is learned."""
    adam = train_state.optimizer.adam
    own = train_state.optimizer.rotations.gradient
    return [own] if adam is None else [own, adam.transforms.gradient]


def log_step(train_state: TrainState, metrics: dict[str, float], scalars: Scalars) -> None:
    """One line per step in metrics.jsonl, and the same numbers for TensorBoard."""
    if train_state.world.is_rank0:
        append_metrics(train_state.run.path, train_state.step, metrics)
    scalars.add("optimize", train_state.step, metrics)


def finish(train_state: TrainState) -> None:
    """Re-orthogonalise in fp64 and write the files that other stages and other tools read."""

    def write() -> None:
        rotations, adam, config = train_state.optimizer.rotations, train_state.optimizer.adam, train_state.config
        r1, r2 = (nearest_orthogonal(r).to(rotations.r1.dtype) for r in (rotations.r1, rotations.r2))
        r1, r2 = stored_rotations(r1, r2, Shape.of(train_state.model.config))
        metadata = {"step": str(train_state.step), "seed": str(config.rotation.seed)}
        transforms = {} if adam is None else adam.transforms.values()
        bits = None
        if "clip" in transforms:
            bits = site_bits(config)
            transforms["clip"] = clips_at(config, site_bits(while_learning(config)), transforms["clip"])
        save_final(train_state.run, r1, r2, metadata, transforms, bits)
        errors = {
            "orthogonality_r1": float(orthogonality_error(r1)),
            "orthogonality_r2": float(orthogonality_error(r2)),
        }
        train_state.run.event("done", stage="optimize", step=train_state.step, **errors)
        say(f"wrote {train_state.run.rotations / 'final.safetensors'} and R.bin")

    if on_rank0(lambda: finished_rotations(train_state.run, warn)):
        if train_state.world.is_rank0:
            say(f"rotations of run {train_state.config.name} are complete")
    else:
        on_rank0(write)
    if train_state.teacher is not None:
        on_rank0(train_state.teacher.remove)
