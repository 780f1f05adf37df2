"""A learning run: what it consists of, how it is built, saved and continued."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dist_spin.config.checks import SELF
from dist_spin.config.loader import dump_config
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.run import RunConfig
from dist_spin.data import fingerprint, load_tokens
from dist_spin.errors import UserError
from dist_spin.model.architecture import layer_name
from dist_spin.model.fake_quant_model import LearningModel
from dist_spin.model.rotation import Rotations
from dist_spin.model.scales_and_clips import Transforms
from dist_spin.model.weight_quant import WeightGrid
from dist_spin.model.weights import ModelFiles
from dist_spin.optimize.adam_optimizer import EuclideanOptimizer
from dist_spin.optimize.best_state import Guard
from dist_spin.optimize.cayley_optimizer import RotationOptimizer
from dist_spin.optimize.sharding.engine import Engine, chosen
from dist_spin.optimize.sharding.memory_planner import Workload, layers_to_offload, passes_and_levels
from dist_spin.pipeline.fingerprints import ENDS_SETTINGS, WEIGHT_SETTINGS, flat
from dist_spin.pipeline.initial_rotations import fits_start, starting_rotations
from dist_spin.pipeline.model import check_vocabulary, model_dtype, open_configured_model
from dist_spin.pipeline.quant_sites import learned_transforms, sites_for, while_learning
from dist_spin.pipeline.range_init import make_start
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.runtime.distributed import World, on_leader, together
from dist_spin.runtime.progress import say
from dist_spin.storage.atomic import read_lines, write_json, write_text
from dist_spin.storage.checkpoints import checkpoint_path, newest_checkpoint, prune_checkpoints
from dist_spin.storage.run_directory import RunDir, check_fingerprint, run_dir
from dist_spin.storage.tensor_file import save_tensors
from dist_spin.version import __version__

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
    work = Workload(
        shape,
        sequences=-(-settings.batch_size // world.size),
        seq_len=settings.seq_len,
        dtype=dtype,
        shards=engine.shards(world),
        w_bits=settings.w_bits,
        compiled=compiled,
        transformed=transforms is not None,
        micro=settings.micro_batch_size,
        recompute=settings.recompute,
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
