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
from dist_spin.data import load_tokens, tokens_fingerprint
from dist_spin.errors import UserError
from dist_spin.model.architecture import layer_name
from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations
from dist_spin.model.scales_and_clips import ScalesAndClips
from dist_spin.model.weight_quant import WeightQuantizer
from dist_spin.model.weights import ModelFiles
from dist_spin.optimize.adam_optimizer import AdamOptimizer
from dist_spin.optimize.best_state import BestState
from dist_spin.optimize.cayley_optimizer import CayleyOptimizer
from dist_spin.optimize.sharding.engine import Engine, choose_engine
from dist_spin.optimize.sharding.memory_planner import Workload, layers_to_offload, micro_batch_and_levels
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.fingerprints import EMBEDDING_SETTINGS, WEIGHT_SETTINGS, flat
from dist_spin.pipeline.initial_rotations import fits_start, starting_rotations
from dist_spin.pipeline.model import check_vocabulary, model_dtype, open_configured_model
from dist_spin.pipeline.quant_sites import learned_transforms, sites_for, while_learning
from dist_spin.pipeline.range_init import make_start
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import say
from dist_spin.storage.atomic import read_lines, write_json, write_text
from dist_spin.storage.checkpoints import checkpoint_path, newest_checkpoint, prune_checkpoints
from dist_spin.storage.run_directory import RunDir, check_fingerprint, run_dir
from dist_spin.storage.tensor_file import save_tensors
from dist_spin.version import __version__

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
    micro_batch_size: int  # sequences of one pass on one rank
    offloaded: int  # layers whose weights stay on the host
    step: int = 0
    best_state: BestState | None = None
    held_out: Tensor | None = None  # [sequences, seq_len] that the guard measures on

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        return {**self.optimizer.state(), **({} if self.best_state is None else self.best_state.state())}


def build_training(config: RunConfig, world: World) -> TrainState:
    """Model, data, rotations and optimiser, at the newest whole checkpoint if there is one."""
    run, engine = run_dir(config), choose_engine(config.distributed)
    files = open_configured_model(config)
    check_export_target(config, files.config)
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

    on_rank0(check)
    if start is None:
        make_start(config, world, files, tokens)
    r1, r2 = start or starting_rotations(config, shape)
    q = config.quant
    weight_quantizer = None
    if settings.w_bits < 16:
        weight_quantizer = WeightQuantizer(settings.w_bits, q.w_symmetric, q.w_group_size, q.w_mse_clip)
    rotations = Rotations(r1, r2, world.device, dtype, learn=True, euclidean=weight_quantizer is not None)
    transforms = None
    if settings.scales or settings.clips:
        shared_keys = files.weights.has(f"{layer_name(0)}.self_attn.k_norm.weight")
        transforms = ScalesAndClips(
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
    model = FakeQuantModel(
        files.config,
        rotations,
        sites,
        device=world.device,
        dtype=dtype,
        compile=compiled,
        weight_quantizer=weight_quantizer,
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
    offloaded = layers_to_offload(place.offload_layers, work, bool(place.offload_dir), world)
    if offloaded and world.is_rank0:
        say(f"the weights of {len(offloaded)} of {shape.layers} layers stay in {place.offload_dir or 'host memory'}")
    engine.shard(model, world, offloaded)
    raise_on_any_failure(lambda: engine.load(model, files.weights, () if settings.scales else sites.r4))
    micro, levels = micro_batch_and_levels(work, world, len(offloaded))
    if engine.keeps_gathered and not compiled and settings.recompute == "auto":
        levels = ["sites" if level == "none" else level for level in levels]  # or it would keep every layer's weights
    model.set_levels(levels)
    optimizer = CayleyOptimizer(
        rotations,
        world,
        kind=settings.optimizer,
        momentum=settings.momentum,
        max_grad_norm=settings.max_grad_norm,
        reproject_every=settings.reproject_every,
        adam=None if transforms is None else build_adam(transforms, settings),
    )
    train_state = TrainState(config, world, run, engine, model, optimizer, tokens, identity, micro, len(offloaded))
    if held_out is not None:
        train_state.best_state, train_state.held_out = BestState(optimizer.masters()), held_out
    resume(train_state)
    return train_state


def learning_tokens(config: RunConfig, files: ModelFiles) -> Tensor:
    """The sequences [n, T] to learn from; of the model's own text as many as the steps take."""
    o = config.optimize
    if o.source == SELF:
        return on_rank0(lambda: self_text(config, files, max(1, o.steps * o.batch_size), o.seq_len, o.seed))
    tokenizer = None if o.source.startswith("tokens:") else files.tokenizer()
    tokens = on_rank0(lambda: load_tokens(o.source, o.split, o.seq_len, tokenizer))
    return check_vocabulary(tokens, files.shape, o.source)


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
        "model.dtype": config.model.dtype,
        "learning data": tokens_fingerprint(tokens),
        **flat(config.rotation, "rotation"),
        **sites,
        **learned,
        "dist_spin": __version__,
    }


def write_checkpoint(train_state: TrainState, state: dict[str, Tensor], step: int) -> None:
    """One state on disk, atomically; called in the writer's thread."""
    settings = train_state.config.optimize
    path = checkpoint_path(train_state.run, step)
    metadata = {"step": str(step), "seed": str(train_state.config.rotation.seed), "optimizer": settings.optimizer}
    save_tensors(path, state, metadata)
    write_json(train_state.run.rotations / "latest.json", {"step": step, "file": path.name})
    prune_checkpoints(train_state.run, settings.keep_checkpoints)


def resume(train_state: TrainState) -> None:
    """Continue from the newest whole checkpoint, read by rank 0 and handed to all; start at step 0 without one."""
    who = {"ranks": train_state.world.size, "engine": train_state.engine.name}
    found = on_rank0(lambda: newest_checkpoint(train_state.run, say))
    if found is None:
        on_rank0(lambda: train_state.run.event("start", stage="optimize", **who))
        return
    state, metadata = found
    try:
        train_state.optimizer.load(state, int(metadata["step"]))
        if train_state.best_state is not None:
            train_state.best_state.load(state)
    except KeyError as error:
        raise UserError(
            f"the newest checkpoint lacks {error}", "it was written with another optimize.optimizer"
        ) from error
    train_state.step = int(metadata["step"])

    def note() -> None:
        # Lines of steps that were never saved would otherwise stand twice.
        metrics = train_state.run.path / "metrics.jsonl"
        with contextlib.suppress(FileNotFoundError):
            kept = [json.dumps(line) + "\n" for line in read_lines(metrics) if line["step"] <= train_state.step]
            write_text(metrics, "".join(kept))
        train_state.run.event("resume", stage="optimize", step=train_state.step, **who)
        if train_state.step < train_state.config.optimize.steps:
            say(f"continuing after step {train_state.step} of {train_state.config.optimize.steps}")

    on_rank0(note)
