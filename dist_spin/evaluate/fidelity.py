"""Fidelity: how close a quantised model stays to the full-precision one, on the same windows of text as its perplexity.

Perplexity compares a model with the text: one that is further from the original may still predict a text better. Three figures
compare it with the original instead, over every predicted token of the text: the Kullback-Leibler divergence of its next-token
distribution from the original's (mean and 99th percentile, in nats), and how often both find the same token most probable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.evaluate.teacher import KeptStates, Teacher
from dist_spin.evaluate.windows import FinalStates, final_states, mean_losses
from dist_spin.model.fidelity import compare_predictions
from dist_spin.model.rotated_weights import Head
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.runtime.distributed import World, raise_on_any_failure, sum_over_ranks_
from dist_spin.runtime.progress import say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import RunDir


@dataclass
class WindowFigures:
    """What is measured of a model on n windows of T tokens.

    losses: mean next-token cross entropy of each window, nats, fp64 [n]. fidelity: the entries that `fidelity_figures` gives;
    empty where the model was compared with nothing.
    """

    losses: Tensor
    fidelity: dict[str, float]


def fidelity_figures(divergence: Tensor, same: Tensor) -> dict[str, float]:
    """The entries of a row, from KL(full precision || quantised) and agreement of every predicted token.

    Args:
        divergence: nats, fp64. same: 1 where both models find the same token most probable, else 0; fp64.

    Returns:
        kl: mean divergence, nats per token. kl_p99: its 99th percentile over tokens. top1: the share of tokens that agree.
    """
    p99 = float(np.quantile(divergence.numpy(), 0.99))
    return {"kl": float(divergence.mean()), "kl_p99": p99, "top1": float(same.mean())}


def window_figures(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    target: EvalTarget,
    jobs: Sequence[tuple[Sites, str]],
    texts: dict[str, Tensor],
    what: str,
    teacher: Teacher | None,
    stop: StopRequest | None = None,
) -> list[WindowFigures]:
    """Figures of every job, (sites, text), on the windows [n, T] of its text; windows are shared out over ranks.

    With a teacher, the target is compared with it, or is it: then the texts' hidden states are kept for the other targets.
    Errors: as `windows.final_states`, and those of `Teacher`.
    """
    if teacher is not None and target.full_precision:
        read = {source: texts[source] for _, source in jobs}
        return [WindowFigures(losses, {}) for losses in teacher.losses(read, what)]
    kept = [] if teacher is None else teacher.states({source: texts[source] for _, source in jobs})
    states = dict(zip(dict.fromkeys(source for _, source in jobs), kept, strict=False))
    pairs = [(sites, texts[source]) for sites, source in jobs]
    head, finals = final_states(config, world, files, target, pairs, what, stop)
    if teacher is None:
        alone = zip(pairs, finals, strict=True)
        return [WindowFigures(mean_losses(head, final, len(tokens), world), {}) for (_, tokens), final in alone]
    teacher_head = teacher.head()
    return [
        _compared(head, final, teacher_head, states[source], texts[source], world)
        for (_, source), final in zip(jobs, finals, strict=True)
    ]


def _compared(
    head: Head, final: FinalStates, teacher_head: Head, states: KeptStates, tokens: Tensor, world: World
) -> WindowFigures:
    count, T = tokens.shape
    losses = torch.zeros(count, dtype=torch.float64)
    divergence, same = torch.zeros(2, count, T - 1, dtype=torch.float64)
    mine = torch.arange(world.rank, count, world.size)

    def compare() -> None:
        done = 0
        for index, (ids, hidden) in enumerate(zip(final.ids, final.hidden, strict=True)):
            here = mine[done : done + len(ids)]
            teacher = states.load(index).to(world.device)
            figures = compare_predictions(head, hidden, teacher_head, teacher, ids.to(world.device))
            for all_windows, found in zip((losses, divergence, same), figures, strict=True):
                all_windows[here] = found.double().cpu()
            done += len(ids)

    raise_on_any_failure(compare)
    for figures in (losses, divergence, same):
        sum_over_ranks_(figures)
    return WindowFigures(losses, fidelity_figures(divergence, same))


def say_what_is_not_compared(run: RunDir, rows: list[dict[str, Any]]) -> None:
    """One line if some of the rows of quantised models were measured by a version, or under a setting, without fidelity."""
    if old := sum("kl" not in row for row in rows):
        again = f"remove {run.path / 'evaluations'} to measure them again"
        say(f"{old} rows were measured before without their divergence from full precision; {again}")
