"""Learn the rotations. Start it again, with any number of ranks, and it continues.

dist-spin optimize configs/quickstart.yaml
torchrun --nproc_per_node 2 -m dist_spin optimize configs/quickstart.yaml optimize.steps=50
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin import __version__
from dist_spin.checkpoint_writer import CheckpointWriter
from dist_spin.config import dump_config
from dist_spin.data import batch_indices, fingerprint, load_tokens, rank_share
from dist_spin.distributed import World, agree, any_rank, on_leader, sum_over_ranks_, together
from dist_spin.engine.choice import Engine, chosen
from dist_spin.engine.euclidean_optimizer import EuclideanOptimizer
from dist_spin.engine.guard import Guard
from dist_spin.engine.memory import Work, layers_to_offload, passes_and_levels
from dist_spin.engine.rotation_optimizer import RotationOptimizer
from dist_spin.errors import Interrupted, NumericsError, UserError
from dist_spin.model.architecture import layer_name
from dist_spin.model.learning import LearningModel
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Rotations
from dist_spin.model.transforms import Transforms
from dist_spin.model.weight_learning import WeightGrid
from dist_spin.numerics.cayley import nearest_orthogonal, orthogonality_error
from dist_spin.progress import Progress
from dist_spin.rotation_files import save_final
from dist_spin.rundir import (
    RunDir,
    append_line,
    check_fingerprint,
    checkpoint_path,
    newest_checkpoint,
    prune_checkpoints,
    read_lines,
    save_tensors,
    write_json,
    write_text,
)
from dist_spin.scalars import Scalars
from dist_spin.settings import SELF, OptimizeConfig, RunConfig
from dist_spin.signals import StopRequest
from dist_spin.stages.common import (
    ENDS_SETTINGS,
    WEIGHT_SETTINGS,
    check_vocabulary,
    clips_at,
    fits_start,
    flat,
    learned_transforms,
    model_dtype,
    open_configured_model,
    run_dir,
    say,
    site_bits,
    sites_for,
    starting_rotations,
    while_learning,
)
from dist_spin.stages.given import keep_given, refuse_given
from dist_spin.stages.self_text import self_text
from dist_spin.stages.start import make_start

# Settings that change how fast or where a run computes, not what: they may differ when it is continued.
FREE_SETTINGS = {"micro_batch_size", "keep_checkpoints", "recompute", "compile"}


@dataclass
class Learning:
    """Everything the loop works on."""

    config: RunConfig
    world: World
    run: RunDir
    engine: Engine
    model: LearningModel
    optimizer: RotationOptimizer
    tokens: Tensor  # [blocks, seq_len]
    fingerprint: dict[str, object]
    micro_batch_size: int  # sequences of one pass on one rank
    offloaded: int  # layers whose weights stay on the host
    step: int = 0
    guard: Guard | None = None
    held_out: Tensor | None = None  # [sequences, seq_len] that the guard measures on

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        return {**self.optimizer.state(), **({} if self.guard is None else self.guard.state())}


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


def set_up(config: RunConfig, world: World) -> Learning:
    """Model, data, rotations and optimiser, at the newest whole checkpoint if there is one."""
    run, engine = run_dir(config), chosen(config.distributed)
    files = open_configured_model(config)
    shape, dtype, settings = files.shape, model_dtype(config), config.optimize
    sites = sites_for(while_learning(config), shape)
    tokens = learning_tokens(config, files)
    # A file that cannot be used stops here, before the run leaves a mark.
    start = None if fits_start(config) else starting_rotations(config, shape)
    if settings.w_bits == 16 and not any(spec.enabled for spec in (sites.a, sites.o, sites.k, sites.v)):
        raise UserError(
            "every activation quantiser is off, so rotations have nothing to learn",
            "set optimize.a_bits=4 to learn at 4 bits what 16 will use too, or optimize.w_bits=4 to learn from rounded weights",
        )
    identity = run_fingerprint(config, files, tokens)
    held_out = None
    if settings.guard_every:
        if len(tokens) <= settings.guard_sequences:
            raise UserError(
                f"{settings.source} has {len(tokens)} sequences, and the guard holds out {settings.guard_sequences}",
                "give more text or set optimize.guard_every=0",
            )
        tokens, held_out = tokens[: -settings.guard_sequences], tokens[-settings.guard_sequences :]

    def check() -> None:
        check_fingerprint(run.path / "fingerprint.json", identity, f"run {config.name}")
        write_text(run.path / "config.yaml", dump_config(config))

    on_leader(check)
    if start is None:
        make_start(config, world, files, tokens)
    r1, r2 = start or starting_rotations(config, shape)
    q = config.quant
    grid = None
    if settings.w_bits < 16:
        grid = WeightGrid(settings.w_bits, q.w_symmetric, q.w_group_size, q.w_mse_clip)
    rotations = Rotations(r1, r2, world.device, dtype, learn=True, euclidean=grid is not None)
    transforms = None
    if settings.scales or settings.clips:
        shared_keys = files.weights.has(f"{layer_name(0)}.self_attn.k_norm.weight")
        transforms = Transforms(
            shape,
            world.device,
            dtype,
            scales=settings.scales,
            clips=settings.clips,
            shared_keys=shared_keys,
            bits=sites.bits,
        )
        if config.rotation.load:
            transforms.start_from(learned_transforms(Path(config.rotation.load), while_learning(config)))
    compiled = settings.compile == "on" or (settings.compile == "auto" and world.device.type == "cuda")
    model = LearningModel(
        files.config,
        rotations,
        sites,
        device=world.device,
        dtype=dtype,
        compile=compiled,
        grid=grid,
        transforms=transforms,
        teacher_share={"cross_entropy": 0.0, "kl": 1.0, "mixed": settings.kl_share}[settings.objective],
    )
    place = config.distributed
    work = Work(
        shape,
        -(-settings.batch_size // world.size),
        settings.seq_len,
        dtype,
        engine.shards(world),
        settings.w_bits,
        compiled,
        transforms is not None,
        settings.micro_batch_size,
        settings.recompute,
    )
    away = layers_to_offload(place.offload_layers, work, bool(place.offload_dir), world)
    if away and world.leads:
        say(f"the weights of {len(away)} of {shape.layers} layers stay in {place.offload_dir or 'host memory'}")
    engine.shard(model, world, away)
    together(lambda: engine.load(model, files.weights, () if settings.scales else sites.r4))
    micro, levels = passes_and_levels(work, world, len(away))
    if engine.keeps_gathered and not compiled and settings.recompute == "auto":
        levels = ["sites" if level == "none" else level for level in levels]  # or it would keep every layer's weights
    model.set_levels(levels)
    optimizer = RotationOptimizer(
        rotations,
        world,
        kind=settings.optimizer,
        momentum=settings.momentum,
        max_grad_norm=settings.max_grad_norm,
        reproject_every=settings.reproject_every,
        euclidean=None if transforms is None else euclidean_optimizer(transforms, settings),
    )
    learning = Learning(config, world, run, engine, model, optimizer, tokens, identity, micro, len(away))
    if held_out is not None:
        learning.guard, learning.held_out = Guard(optimizer.masters()), held_out
    resume(learning)
    return learning


def learning_tokens(config: RunConfig, files: ModelFiles) -> Tensor:
    """The sequences [n, T] to learn from; of the model's own text as many as the steps take."""
    o = config.optimize
    if o.source == SELF:
        return on_leader(lambda: self_text(config, files, max(1, o.steps * o.batch_size), o.seq_len, o.seed))
    tokenizer = None if o.source.startswith("tokens:") else files.tokenizer()
    tokens = on_leader(lambda: load_tokens(o.source, o.split, o.seq_len, tokenizer))
    return check_vocabulary(tokens, files.shape, o.source)


def euclidean_optimizer(transforms: Transforms, settings: OptimizeConfig) -> EuclideanOptimizer:
    """The optimiser of scales and clips at the configured rates."""
    rates = {name: settings.clip_lr if name == "clip" else settings.scale_lr for name in transforms.shapes}
    return EuclideanOptimizer(transforms, rates)


def run_fingerprint(config: RunConfig, files: ModelFiles, tokens: Tensor) -> dict[str, object]:
    """What must not change between the starts of one run, field by field."""
    learned = {k: v for k, v in flat(config.optimize, "optimize").items() if k.split(".")[1] not in FREE_SETTINGS}
    decides_nothing = (
        WEIGHT_SETTINGS if config.optimize.w_bits == 16 else ("quant.w_bits", "quant.down_bits", *ENDS_SETTINGS)
    )
    sites = {k: v for k, v in flat(config.quant, "quant").items() if not k.startswith(decides_nothing)}
    return {
        "model weights": files.weights.fingerprint(),
        "model.dtype": config.model.dtype,
        "learning data": fingerprint(tokens),
        **flat(config.rotation, "rotation"),
        **sites,
        **learned,
        "dist_spin": __version__,
    }


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


def write_checkpoint(learning: Learning, state: dict[str, Tensor], step: int) -> None:
    """One state on disk, atomically; called in the writer's thread."""
    settings = learning.config.optimize
    path = checkpoint_path(learning.run, step)
    metadata = {"step": str(step), "seed": str(learning.config.rotation.seed), "optimizer": settings.optimizer}
    save_tensors(path, state, metadata)
    write_json(learning.run.rotations / "latest.json", {"step": step, "file": path.name})
    prune_checkpoints(learning.run, settings.keep_checkpoints)


def resume(learning: Learning) -> None:
    """Continue from the newest whole checkpoint, read by rank 0 and handed to all; start at step 0 without one."""
    who = {"ranks": learning.world.size, "engine": learning.engine.name}
    found = on_leader(lambda: newest_checkpoint(learning.run, say))
    if found is None:
        on_leader(lambda: learning.run.event("start", stage="optimize", **who))
        return
    state, metadata = found
    try:
        learning.optimizer.load(state, int(metadata["step"]))
        if learning.guard is not None:
            learning.guard.load(state)
    except KeyError as error:
        raise UserError(
            f"the newest checkpoint lacks {error}", "it was written with another optimize.optimizer"
        ) from error
    learning.step = int(metadata["step"])

    def note() -> None:
        # Lines of steps that were never saved would otherwise stand twice.
        metrics = learning.run.path / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            kept = [json.dumps(line) + "\n" for line in read_lines(metrics) if line["step"] <= learning.step]
            write_text(metrics, "".join(kept))
        learning.run.event("resume", stage="optimize", step=learning.step, **who)
        if learning.step < learning.config.optimize.steps:
            say(f"continuing after step {learning.step} of {learning.config.optimize.steps}")

    on_leader(note)


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
