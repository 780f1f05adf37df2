"""A learning pass after quantisation: norm gains and the scales of weight rows, by the network's own loss, codes fixed.

Part of `dist-spin quantize` where quantize.tune_steps is set; writes baselines/tuned/layers beside the layers it starts from.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_spin.data import batch_indices, load_tokens
from dist_spin.distributed import agree, any_rank, on_leader, sum_over_ranks_
from dist_spin.engine import fsdp
from dist_spin.engine.euclidean_optimizer import EuclideanOptimizer
from dist_spin.engine.guard import Guard
from dist_spin.engine.memory import passes_and_levels
from dist_spin.errors import Interrupted, NumericsError
from dist_spin.layer_files import finished_layer, layer_path, save_layer
from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM
from dist_spin.model.transforms import Packed
from dist_spin.model.tuning import TuningModel, place_of, tunable_shapes
from dist_spin.progress import Progress
from dist_spin.stages.common import check_vocabulary, model_dtype
from dist_spin.stages.optimize import bits_of, passes

if TYPE_CHECKING:
    from dist_spin.stages.quantize import Work

JUDGEMENTS = 10  # of the guard during one pass


def tune(work: "Work", made_under: str) -> None:
    """Learn and write the tuned layers, unless they are there.

    Raises:
        Interrupted: a signal came; the pass is short, and starts again.
        NumericsError: the loss is not finite.
        UserError: the learning text cannot be read.
    """
    config, world, shape = work.config, work.world, work.files.shape
    settings = config.optimize
    directory = work.run.layers("tuned")
    paths = [layer_path(directory, index) for index in range(shape.layers)]
    if on_leader(lambda: all(finished_layer(path, made_under, work.warn) is not None for path in paths)):
        return
    tokenizer = None if settings.source.startswith("tokens:") else work.files.tokenizer()
    tokens = on_leader(lambda: load_tokens(settings.source, settings.split, settings.seq_len, tokenizer))
    check_vocabulary(tokens, shape, settings.source)
    held = min(settings.guard_sequences, len(tokens) // 2)
    tokens, held_out = tokens[: len(tokens) - held], tokens[len(tokens) - held :]

    dtype = model_dtype(config)
    tunables = Packed(tunable_shapes(shape), world.device, dtype)
    compiled = settings.compile == "on" or (settings.compile == "auto" and world.device.type == "cuda")
    model = TuningModel(
        work.files.config, work.chosen.sites, tunables, device=world.device, dtype=dtype, compile=compiled
    )
    fsdp.shard(model, world)
    load(model, work, tunables)
    share = -(-settings.batch_size // world.size)
    micro, levels = passes_and_levels(
        settings.micro_batch_size,
        settings.recompute,
        shape,
        share,
        settings.seq_len,
        dtype,
        world,
        offloaded=False,
        compiled=False,  # the bound, since what a compiled layer keeps was measured for rotations alone
    )
    model.set_levels(levels)
    optimizer = EuclideanOptimizer(tunables, dict.fromkeys(tunables.shapes, config.quantize.tune_lr))
    guard = Guard({"tunables": tunables.parameters})

    def loss_of(ids: Tensor, indices: list[int], learn: bool) -> float:
        total = torch.zeros((), device=world.device, dtype=torch.float64)
        with torch.set_grad_enabled(learn):
            for part, weights in passes(world, micro, ids, indices):
                losses = model(part)
                loss = (losses * weights.to(losses.dtype)).sum()
                if learn:
                    loss.backward()
                total += loss.detach()
        return float(sum_over_ranks_(total))

    def judge() -> float:
        loss = loss_of(held_out, list(range(len(held_out))), learn=False)
        if guard.judge(loss):
            optimizer.forget(optimizer.step_count)
        return loss

    steps = config.quantize.tune_steps
    first = judge()
    progress = Progress("tune: step", steps, 0, show=world.leads)
    for step in range(steps):
        loss = loss_of(tokens, batch_indices(step, settings.batch_size, len(tokens), settings.seed), learn=True)
        norm = optimizer.reduce_gradients()
        if not math.isfinite(loss + norm):
            raise NumericsError(f"tuning step {step + 1}: the loss is {loss}", "lower quantize.tune_lr")
        optimizer.step(guard.factor * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if not agree(bits_of(tunables.parameters)):
            raise AssertionError(f"tuned scales differ between ranks after step {step + 1}")
        guard.moved()
        if (step + 1) % max(1, steps // JUDGEMENTS) == 0 or step + 1 == steps:
            judge()
        progress.advance(f"loss {loss:.4f}")
        if any_rank(bool(work.stop)):
            raise Interrupted(
                f"stopped by a signal after tuning step {step + 1}", "the same command starts the pass again"
            )
    guard.restore()

    def write() -> None:
        factors = {name: t.double().cpu() for name, t in tunables.values().items()}
        for index, path in enumerate(paths):
            layer = work.load(index)
            assert layer is not None
            for role in LAYER_LINEARS:
                factor = factors[role][index]
                solution = layer.solutions[role]
                layer.solutions[role] = solution._replace(scale=_times(solution.scale, factor[:, None]))
                if f"{role}.bias" in layer.others:
                    layer.others[f"{role}.bias"] = _times(layer.others[f"{role}.bias"], factor)
            for norm in (ATTENTION_NORM, MLP_NORM):
                layer.others[f"{norm}.weight"] = factors[norm][index].to(dtype)
            save_layer(path, layer, made_under)
        work.run.event("tuned", steps=steps, held_out_before=first, held_out_after=guard.best_loss)

    on_leader(write)


def load(model: TuningModel, work: "Work", tunables: Packed) -> None:
    """Give every rank its rows of the dequantised weights, a layer in memory at a time, and the tunables their gains."""
    dtype, device = model_dtype(work.config), work.world.device
    gains = tunables.named(tunables.parameters)
    within: dict[int, dict[str, DTensor]] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        index, rest = place_of(name)
        within.setdefault(index, {})[rest] = parameter
    ends = {"embed.weight": work.chosen.weights.embedding, "head.lm_head.weight": work.chosen.weights.head_weight}
    for rest, end in within.pop(-1).items():
        _fill(end, ends[rest]())
    for index, parameters in within.items():
        layer = work.load(index)
        assert layer is not None, f"layer {index} is not there"
        weights = layer.weights(dtype, device)
        for norm in (ATTENTION_NORM, MLP_NORM):
            if f"{norm}.weight" in weights:
                gains[norm][index].copy_(weights[f"{norm}.weight"].log())
        for rest, target in parameters.items():
            _fill(target, weights[rest])


def _fill(parameter: DTensor, whole: Tensor) -> None:
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local()
    if local.numel():
        local[: shape[0]].copy_(whole[offset[0] : offset[0] + shape[0]])


def _times(x: Tensor, factor: Tensor) -> Tensor:
    return (x.double() * factor.to(x.device)).to(x.dtype)
