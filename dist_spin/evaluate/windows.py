"""Windows of text on their way through a model, a layer in memory at a time, up to its final norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, NumericsError
from dist_spin.evaluate.layerwise_model import LayerwiseModel
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.model.architecture import Shape
from dist_spin.model.rotated_weights import Head
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.finite import dtype_remedy
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.model import model_dtype
from dist_spin.runtime.distributed import World, raise_on_any_failure, sum_over_ranks_
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import run_dir

TOKENS_AT_ONCE = 4096  # of hidden states that go through a layer together, at least
BYTES_PER_CHANNEL = 32  # of the MLP for each token on its way through: copies, some of them in the quantiser's fp32


@dataclass
class FinalStates:
    """What one job's windows have become after the last layer: this rank's share, in batches.

    ids: token ids [batch, T] on the CPU. hidden: what enters the final norm, [batch, T, h] on the rank's device.
    """

    ids: Sequence[Tensor]
    hidden: list[Tensor]


def final_states(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    target: EvalTarget,
    jobs: Sequence[tuple[Sites, Tensor]],
    what: str,
    stop: StopRequest | None = None,
) -> tuple[Head, list[FinalStates]]:
    """The model's head, and the final hidden states of each job's windows that are this rank's.

    The jobs, (sites, tokens [n, T]), share the target's weights, so that a layer is read or merged once for all of them.
    Rank r has windows r, r + ranks, ...; their batches depend on the shapes alone. `what` is shown while it goes on.
    stop: the stage's, asked after every layer.

    Raises:
        Interrupted: a signal came; a measurement that is not complete is made again.
        NumericsError: names the first layer whose output is not finite.
    """
    model = LayerwiseModel(config, world, files, run_dir(config), target)
    tokens_per_batch = tokens_at_once(world.device, files.shape)
    mine = [tokens[world.rank :: world.size] for _, tokens in jobs]
    batches = [ids.split(max(1, tokens_per_batch // ids.shape[1])) if len(ids) else () for ids in mine]
    states = iter(model.embed(ids for parts in batches for ids in parts))
    hidden = [[next(states) for _ in parts] for parts in batches]  # for each job: [batch, T, h], ...
    overflows = torch.zeros(files.shape.layers, len(jobs), dtype=torch.float64, device=world.device)
    all_layers = enumerate(model.layers_at(what, [sites for sites, _ in jobs]))

    def through_next_layer() -> None:
        index, layers = next(all_layers)
        for job, (layer, parts) in enumerate(zip(layers, hidden, strict=True)):
            parts[:] = [layer(h) for h in parts]
            for h in parts:  # counted without waiting for the device
                overflows[index, job] += (~torch.isfinite(h)).any()
        if stop and index + 1 < files.shape.layers:
            problem = f"stopped by a signal after layer {index} of a measurement"
            raise Interrupted(problem, "the same command continues with that measurement")

    for _ in range(files.shape.layers):
        raise_on_any_failure(through_next_layer)
    next(all_layers, None)  # the last layer is done, which is shown when the next one is asked for
    overflowing = sum_over_ranks_(overflows.cpu()).nonzero()
    if len(overflowing):
        problem = f"{target.label}: the output of layer {int(overflowing[0, 0])} is not finite in {dtype_name(config)}"
        raise NumericsError(problem, dtype_remedy(model_dtype(config)))
    return model.head(), [FinalStates(ids, parts) for ids, parts in zip(batches, hidden, strict=True)]


def tokens_at_once(device: torch.device, shape: Shape) -> int:
    """Tokens that go through a layer together: on a GPU as many as an eighth of its memory has room for."""
    if device.type != "cuda":
        return TOKENS_AT_ONCE
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(TOKENS_AT_ONCE, memory // 8 // (BYTES_PER_CHANNEL * shape.intermediate))


def mean_losses(head: Head, final: FinalStates, count: int, world: World) -> Tensor:
    """Mean next-token cross entropy of all `count` windows, from every rank's share of them; fp64 [count] on the CPU."""
    losses = torch.zeros(count, dtype=torch.float64)
    if final.hidden:
        mean = [head.loss(h, ids.to(world.device)) for h, ids in zip(final.hidden, final.ids, strict=True)]
        losses[world.rank :: world.size] = torch.cat(mean).double().cpu()
    return sum_over_ranks_(losses)
