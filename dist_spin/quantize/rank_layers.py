"""Whole ranges of layers on each rank: ranks agree after every layer, and stay in touch within one."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Generator, Sequence

import torch

from dist_spin.errors import Interrupted
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.layer_range import LayerRange, quantize_layers
from dist_spin.quantize.parallel import assign
from dist_spin.runtime.distributed import World, any_rank, raise_on_any_failure, sum_over_ranks_, work_apart
from dist_spin.runtime.progress import Progress


def begun_by(ranges: Sequence[LayerRange], ranks: int) -> dict[int, LayerRange]:
    """The range that each rank takes first in `quantize_apart`; ranks without any are left out."""
    assigned = assign([layers.missing for layers in ranges], ranks)
    return {rank: ranges[numbers[0]] for rank, numbers in enumerate(assigned) if numbers}


def quantize_apart(ranges: Sequence[LayerRange], world: World) -> None:
    """Quantise `ranges`, the same list on every rank, each by one rank alone.

    Ranks agree after every layer, so that a mistake or a signal on one of them ends all of them within a layer. A layer may
    take longer than the group's timeout, with all that comes before it: layers to be run again, hidden states to be made.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the mistake of any rank.
    """
    own = [ranges[number] for number in assign([layers.missing for layers in ranges], world.size)[world.rank]]
    steps = _layers_alone(own, World(0, 1, world.local_rank, world.local_size, world.device))
    every = min(10.0, ranges[0].job.config.distributed.timeout_s / 10)
    total = sum(len(layers.finished) for layers in ranges)
    done = total - sum(layers.missing for layers in ranges)
    progress = Progress(f"quantise on {world.size} ranks: layer", total, done, show=world.is_rank0)
    working = True
    with contextlib.closing(steps):
        while any_rank(working):
            if not progress.complete and any_rank(any(layers.job.stop for layers in ranges)):
                raise Interrupted("stopped by a signal while layers were quantised", "the same command continues")
            errors: list[float] = []

            def step(errors: list[float] = errors) -> None:
                errors += itertools.islice(steps, 1)

            raise_on_any_failure(functools.partial(work_apart, step, every))
            working = bool(errors)
            for _ in range(int(sum_over_ranks_(torch.tensor([float(len(errors))])))):
                progress.advance()


def _layers_alone(ranges: Sequence[LayerRange], alone: World) -> Generator[float, None, None]:
    """The layers of `ranges`, one after the other; jobs are made anew, since what they hold depends on the ranks."""
    jobs: dict[int, QuantizeJob] = {}
    for layers in ranges:
        job = jobs.setdefault(id(layers.job), dataclasses.replace(layers.job, world=alone))
        yield from quantize_layers(dataclasses.replace(layers, job=job))
