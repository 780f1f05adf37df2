"""A learning run: what it consists of, how it is built, saved and continued."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.config.checks import SELF
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.config.run import RunConfig
from dist_spin.data import batch_indices, load_tokens, tokens_fingerprint
from dist_spin.errors import UserError
from dist_spin.model.architecture import layer_name
from dist_spin.model.context import check_context
from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations
from dist_spin.model.scales_and_clips import ScalesAndClips
from dist_spin.model.sites_config import Sites
from dist_spin.model.weight_quant import WeightQuantizer
from dist_spin.model.weights import ModelFiles
from dist_spin.optimize.adam_optimizer import AdamOptimizer
from dist_spin.optimize.best_state import BestState
from dist_spin.optimize.cayley_optimizer import CayleyOptimizer
from dist_spin.optimize.sharding.engine import Engine, choose_engine
from dist_spin.optimize.sharding.memory_planner import Workload, layers_to_offload, micro_batch_and_levels
from dist_spin.optimize.stored_teacher import StoredTeacher, make_targets
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.export_limits import check_export_target, tell_exportable
from dist_spin.pipeline.fingerprints import EMBEDDING_SETTINGS, WEIGHT_SETTINGS, flat
from dist_spin.pipeline.initial_rotations import fits_start, starting_rotations
from dist_spin.pipeline.model import check_stored_teacher, check_vocabulary, model_dtype, open_configured_model
from dist_spin.pipeline.quant_sites import (
    check_learning_formats,
    learned_transforms,
    sites_for,
    tell_key_bias,
    while_learning,
)
from dist_spin.pipeline.range_init import make_start
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import long_step, say, warn
from dist_spin.storage.checkpoints import checkpoint_path, newest_checkpoint, prune_checkpoints
from dist_spin.storage.metrics import drop_metrics_after, set_metrics_aside
from dist_spin.storage.rotations import learned_steps
from dist_spin.storage.run_directory import RunDir, check_fingerprint, run_dir
from dist_spin.storage.run_records import write_settings
from dist_spin.storage.tensor_file import identity_hash, save_tensors
from dist_spin.version import LEARNS_AS

# Settings that change how fast or where a run computes, not what: they may differ when it is continued.
FREE_SETTINGS = {"micro_batch_size", "keep_checkpoints", "recompute", "compile"}


@dataclass
class TrainState:
    """Everything the loop works on."""

    config: RunConfig
    world: World
    run: RunDir
    engine: Engine
    model: FakeQuantModel
    optimizer: CayleyOptimizer
    tokens: Tensor  # [blocks, seq_len]
    fingerprint: dict[str, object]
    micro_batch_size: int  # sequences of one forward pass on one rank
    offloaded: int  # layers whose weights stay on the host
    step: int = 0
    best_state: BestState | None = None
    started: bool = False  # whether this process has taken a step
    held_out: Tensor | None = None  # [sequences, seq_len] that the best state is chosen by
    teacher: StoredTeacher | None = None  # what full precision predicts, where it is stored

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        return {**self.optimizer.state(), **({} if self.best_state is None else self.best_state.state())}


def build_training(config: RunConfig, world: World) -> TrainState:
    """Model, data, rotations and optimiser, at the newest whole checkpoint if there is one.

    Raises:
        UserError: the settings, the model, the data or the run directory do not fit each other.
    """
    settings, quant, device = config.optimize, config.quant, world.device
    offload_dir = config.path(config.distributed.offload_dir) if config.distributed.offload_dir else None
    run, engine = run_dir(config), choose_engine(config.distributed, offload_dir)

    # open the model
    files = open_configured_model(config)
    check_export_target(config, files.config)
    check_stored_teacher(config, files.shape)
    shape, dtype = files.shape, model_dtype(config)

    # build sites
    check_learning_formats(config)
    sites = sites_for(while_learning(config), shape)

    # load data
    all_tokens = learning_tokens(config, files)
    # A file of rotations that cannot be used is refused here, before anything is written into the run directory.
    initial_rotations = None if fits_start(config) else starting_rotations(config, shape)
    if settings.w_bits == 16 and not any(spec.enabled for spec in (sites.a, sites.o, sites.k, sites.v)):
        raise UserError(
            "every activation quantiser is off, so rotations have nothing to learn",
            "set optimize.a_bits=4 to learn at 4 bits what 16 will use too, or optimize.w_bits=4 to learn from rounded weights",
        )
    fingerprint = run_fingerprint(config, files, all_tokens)
    tokens, held_out = split_held_out(all_tokens, settings)

    # open the run directory
    def check_run_directory() -> None:
        check_fingerprint(run.path / "fingerprint.json", fingerprint, f"run {config.name}")
        write_settings(run.path, config)

    on_rank0(check_run_directory)

    # build rotations, and the scales and clips that are learned beside them
    if initial_rotations is None:
        make_start(config, world, files, tokens)
    r1, r2 = initial_rotations or starting_rotations(config, shape)
    weight_quantizer = None
    if settings.w_bits < 16:
        weight_quantizer = WeightQuantizer(
            settings.w_bits,
            quant.w_symmetric,
            quant.weights_per_scale,
            mse_clip=quant.w_mse_clip,
            format=quant.w_format,
        )
    rotations = Rotations(r1, r2, device, dtype, learn=True, euclidean=weight_quantizer is not None)
    transforms = build_transforms(config, files, sites, device) if settings.scales or settings.clips else None

    # build the fake-quantised model
    compiled = compiles(config, world)
    model = FakeQuantModel(
        files.config,
        rotations,
        sites,
        device=device,
        dtype=dtype,
        compile=compiled,
        weight_quantizer=weight_quantizer,
        transforms=transforms,
        teacher_share={"cross_entropy": 0.0, "kl": 1.0, "mixed": settings.kl_share}[settings.objective],
    )

    # shard, and load the weights
    workload = Workload(
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
        block=config.rotation.block,
    )
    offloaded = layers_to_offload(config.distributed.offload_layers, workload, world, to_disk=bool(offload_dir))
    if offloaded and world.is_rank0:
        say(f"the weights of {len(offloaded)} of {shape.layers} layers stay in {offload_dir or 'host memory'}")
    with long_step(
        f"load the weights of {shape.layers} layers" + (", and pin those in host memory" if offloaded else "")
    ):
        engine.shard(model, world, offloaded)
        raise_on_any_failure(lambda: engine.load(model, files.weights, () if settings.scales else sites.r4))

    # plan memory: sequences of a micro-batch and what each layer keeps, from what the device has left now
    micro_batch_size, levels = micro_batch_and_levels(workload, world, len(offloaded))
    if engine.keeps_gathered and not compiled and settings.recompute == "auto":
        levels = ["sites" if level == "none" else level for level in levels]  # or it would keep every layer's weights
    model.set_levels(levels)

    # build optimizer
    optimizer = CayleyOptimizer(
        rotations,
        world,
        kind=settings.optimizer,
        momentum=settings.momentum,
        max_grad_norm=settings.max_grad_norm,
        reproject_every=settings.reproject_every,
        adam=None if transforms is None else build_adam(transforms, settings),
    )

    # resume
    train_state = TrainState(
        config, world, run, engine, model, optimizer, tokens, fingerprint, micro_batch_size, len(offloaded)
    )
    if held_out is not None:
        train_state.best_state, train_state.held_out = BestState(optimizer.masters()), held_out
    resume(train_state)
    if settings.teacher_top_k:
        store_teacher(train_state, files, all_tokens)
    if compiled and train_state.step < settings.steps:
        say("the first step compiles the layers' graphs, which takes a minute or more")
    if train_state.step == 0:
        tell_exportable(config, files.config)
        tell_key_bias(config, files)
    return train_state


def store_teacher(train_state: TrainState, files: ModelFiles, all_tokens: Tensor) -> None:
    """Store what full precision predicts on every sequence that a step or the guard takes, unless it is there or none is left.

    all_tokens: the learning text [n, T], at whose end the held-out sequences stand.

    Raises:
        UserError: the disk has no room for them.
    """
    config, settings, count = train_state.config, train_state.config.optimize, len(train_state.tokens)
    identity = {
        "model": files.weights.fingerprint(),
        "dtype": dtype_name(config),
        "tokens": tokens_fingerprint(all_tokens),
        "top_k": settings.teacher_top_k,
    }
    teacher = StoredTeacher(train_state.run.path / "teacher", identity_hash(identity), settings.teacher_top_k)
    taken = set(batch_indices(0, settings.steps * settings.batch_size, count, settings.seed))
    wanted = [*sorted(taken), *range(count, len(all_tokens))]
    train_state.teacher = teacher  # of a finished run too, which may have been stopped before it removed the files
    if train_state.step < settings.steps:
        itemsize, micro = model_dtype(config).itemsize, train_state.micro_batch_size
        make_targets(teacher, train_state.model, train_state.world, all_tokens, wanted, micro, itemsize)


def compiles(config: RunConfig, world: World) -> bool:
    """Whether layers are compiled; GPUs older than Ada have no E4M3 that compiled kernels could use, which is said.

    Uncompiled, torch converts to E4M3 on every device, with the same results.
    """
    if config.optimize.compile != "auto" or world.device.type != "cuda":
        return config.optimize.compile == "on"
    q = config.quant
    used = (q.a_format, q.kv_format, q.w_format if config.optimize.w_bits < 16 else "int")
    e4m3 = {name for name in used if name in ("fp8", "mxfp8", "nvfp4")}
    if e4m3 and torch.cuda.get_device_capability(world.device) < (8, 9):
        if world.is_rank0:
            say(
                f"{', '.join(sorted(e4m3))} is emulated without compiling on this GPU, which is older than Ada: steps take longer"
            )
        return False
    return True


def split_held_out(tokens: Tensor, settings: OptimizeConfig) -> tuple[Tensor, Tensor | None]:
    """The sequences [n, T] to learn from, and those at the end that the held-out loss is measured on, if there are any.

    Raises:
        UserError: too few sequences.
    """
    if not settings.guard_every:
        return tokens, None
    if len(tokens) <= settings.guard_sequences:
        raise UserError(
            f"{settings.source} has {len(tokens)} sequences, and {settings.guard_sequences} are to be held out",
            "give more text, or set optimize.guard_sequences lower or optimize.guard_every=0",
        )
    return tokens[: -settings.guard_sequences], tokens[-settings.guard_sequences :]


def build_transforms(config: RunConfig, files: ModelFiles, sites: Sites, device: torch.device) -> ScalesAndClips:
    """The scales and clips that are learned beside the rotations, at their start or as `rotation.load` holds them."""
    settings, k_norm = config.optimize, f"{layer_name(0)}.self_attn.k_norm.weight"
    transforms = ScalesAndClips(
        files.shape,
        device,
        model_dtype(config),
        scales=settings.scales,
        clips=settings.clips,
        shared_keys=files.weights.has(k_norm) and files.weights.row_count(k_norm) == files.shape.head_dim,
        bits=sites.bits,
    )
    if config.rotation.load:
        transforms.start_from(learned_transforms(Path(config.path(config.rotation.load)), while_learning(config)))
    return transforms


def learning_tokens(config: RunConfig, files: ModelFiles) -> Tensor:
    """The sequences [n, T] to learn from; of the model's own text as many as the steps take."""
    settings = config.optimize
    check_context("optimize.seq_len", settings.seq_len, files.config)
    if settings.source == SELF:
        count = max(1, settings.steps * settings.batch_size)
        return on_rank0(lambda: self_text(config, files, count, settings.seq_len, settings.seed))
    tokenizer = None if settings.source.startswith("tokens:") else files.tokenizer()
    tokens = on_rank0(lambda: load_tokens(config.source(settings.source), settings.split, settings.seq_len, tokenizer))
    return check_vocabulary(tokens, files.shape, settings.source)


def build_adam(transforms: ScalesAndClips, settings: OptimizeConfig) -> AdamOptimizer:
    """The optimiser of scales and clips at the configured rates."""
    rates = {name: settings.clip_lr if name == "clip" else settings.scale_lr for name in transforms.shapes}
    return AdamOptimizer(transforms, rates)


def run_fingerprint(config: RunConfig, files: ModelFiles, tokens: Tensor) -> dict[str, object]:
    """What must not change between the starts of one run, field by field."""
    learned = {k: v for k, v in flat(config.optimize, "optimize").items() if k.split(".")[1] not in FREE_SETTINGS}
    decides_nothing = (
        WEIGHT_SETTINGS if config.optimize.w_bits == 16 else ("quant.w_bits", "quant.down_bits", *EMBEDDING_SETTINGS)
    )
    sites = {k: v for k, v in flat(config.quant, "quant").items() if not k.startswith(decides_nothing)}
    return {
        "model weights": files.weights.fingerprint(),
        "model.dtype": dtype_name(config),
        "learning data": tokens_fingerprint(tokens),
        **flat(config.rotation, "rotation"),
        **sites,
        **learned,
        "dist_spin": LEARNS_AS,
    }


def write_checkpoint(train_state: TrainState, state: dict[str, Tensor], step: int) -> None:
    """One state on disk, atomically; called in the writer's thread."""
    settings = train_state.config.optimize
    path = checkpoint_path(train_state.run, step)
    metadata = {"step": str(step), "seed": str(train_state.config.rotation.seed), "optimizer": settings.optimizer}
    save_tensors(path, state, metadata)
    prune_checkpoints(train_state.run, settings.keep_checkpoints)


def resume(train_state: TrainState) -> None:
    """Continue from the newest whole checkpoint, read by rank 0 and handed to all; start at step 0 without one.

    A run whose final rotations are whole is at its last step, and its checkpoints may have been deleted.

    Raises:
        UserError: the checkpoint is of another optimiser.
    """
    identity = {"ranks": train_state.world.size, "engine": train_state.engine.name}
    steps = train_state.config.optimize.steps
    finished = on_rank0(lambda: learned_steps(train_state.run, warn) == steps)
    checkpoint = None if finished else on_rank0(lambda: newest_checkpoint(train_state.run, warn))
    if checkpoint is None and not finished:

        def note_start() -> None:
            begin_again(train_state.run)
            train_state.run.event("start", stage="optimize", **identity)

        on_rank0(note_start)
        return
    if checkpoint is not None:
        state, metadata = checkpoint
        try:
            train_state.optimizer.load(state, int(metadata["step"]))
            if train_state.best_state is not None:
                train_state.best_state.load(state)
        except KeyError as error:
            raise UserError(
                f"the newest checkpoint lacks {error}", "it was written with another optimize.optimizer"
            ) from error
    train_state.step = steps if checkpoint is None else int(metadata["step"])

    def note_resume() -> None:
        # Lines of steps that were never saved would otherwise stand twice.
        drop_metrics_after(train_state.run.path, train_state.step)
        train_state.run.event("resume", stage="optimize", step=train_state.step, **identity)
        if train_state.step < steps:
            say(f"continuing after step {train_state.step} of {steps}")

    on_rank0(note_resume)


def begin_again(run: RunDir) -> None:
    """Take away the lines of steps that no checkpoint holds: of one that was killed before it, or of lost ones, said so."""
    # A step is logged before the checkpoint of the one before it is known to be on disk.
    if aside := set_metrics_aside(run.path, least=3):
        problem = f"{run.rotations} holds no checkpoint of the steps in metrics.jsonl"
        warn(f"{problem}: learning begins again; their lines are kept in {aside.name}")
    drop_metrics_after(run.path, 0)
