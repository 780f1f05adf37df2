"""Perplexity: the mean cross entropy of windows of text that pass through the model layer by layer, and its exponential."""

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.data import load_tokens, tokens_fingerprint
from dist_spin.errors import NumericsError
from dist_spin.evaluate.fidelity import WindowFigures, window_figures
from dist_spin.evaluate.measurements import load_rows, save_rows
from dist_spin.evaluate.targets import EvalTarget, describe, target_identity
from dist_spin.evaluate.teacher import Teacher
from dist_spin.evaluate.windows import final_states, mean_losses
from dist_spin.model.context import check_context
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.model import check_vocabulary
from dist_spin.runtime.distributed import World, on_rank0
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import identity_hash

LARGEST_LOSS = 700.0  # nats; e^709 leaves the range of fp64


def measuring_tokens(config: RunConfig, files: ModelFiles, source: str) -> Tensor:
    """The windows [n, T] of one source."""
    e = config.evaluate
    check_context("evaluate.seq_len", e.seq_len, files.config)
    tokenizer = None if source.startswith("tokens:") else files.tokenizer()
    tokens = on_rank0(lambda: load_tokens(config.source(source), e.split, e.seq_len, tokenizer))
    check_vocabulary(tokens, files.shape, source)
    return tokens[: e.max_sequences] if e.max_sequences else tokens


def measure(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    run: RunDir,
    target: EvalTarget,
    source: str,
    tokens: Tensor,
    teacher: Teacher | None,
    stop: StopRequest,
) -> dict[str, Any]:
    """The row of one target on one source, from its file if it was measured before.

    teacher: what it is compared with (`fidelity.window_figures`).

    Raises:
        Interrupted, NumericsError: as `window_losses`.
    """
    row = described(config, files, target, source, tokens)
    before = measured_before(run, row)
    if before is not None:
        return before
    began = time.monotonic()
    what = f"measure {source}, {target.label}, {target.weights} weights"
    jobs = [(target.variant.sites, source)]
    (figures,) = window_figures(config, world, files, target, jobs, {source: tokens}, what, teacher, stop)
    return recorded(run, row, figures, time.monotonic() - began)


def described(config: RunConfig, files: ModelFiles, target: EvalTarget, source: str, tokens: Tensor) -> dict[str, Any]:
    """What is known of a row before it is measured, with the `identity` that names its file."""
    row = {k: v for k, v in describe(config, target).items() if k != "method"} | {
        "dataset": source,
        "seq_len": config.evaluate.seq_len,
    }
    identity = identity_hash(
        {
            **row,
            "layers": target.fingerprint,
            "tokens": tokens_fingerprint(tokens),
            **target_identity(config, files, target),
        }
    )
    layers = (
        {"layers": target.fingerprint} if target.fingerprint else {}
    )  # an export says which rows are of its own weights
    return {"method": target.label, **row, "tokens": tokens.numel(), "identity": identity, **layers, **target.about}


def measured_before(run: RunDir, row: dict[str, Any]) -> dict[str, Any] | None:
    """`row` with its figures if it was measured before, under whatever name."""
    rows = load_rows(run, row["identity"])
    return None if rows is None else rows[0] | row


def recorded(run: RunDir, row: dict[str, Any], figures: WindowFigures, seconds: float) -> dict[str, Any]:
    """`row` with its figures, kept in a file.

    Raises:
        NumericsError: the mean loss or a figure is not finite, or the loss too large for a perplexity.
    """
    mean = float(figures.losses.mean())
    if not (mean < LARGEST_LOSS and all(map(math.isfinite, figures.fidelity.values()))):
        figures_text = ", ".join(f"{name} {value}" for name, value in {"loss": mean, **figures.fidelity}.items())
        raise NumericsError(
            f"{row['method']} on {row['dataset']}: {figures_text}", "check the model's dtype and the quantisers"
        )
    row = row | {"ppl": math.exp(mean), **figures.fidelity}
    row |= {"seconds": round(seconds, 2), "losses": figures.losses.tolist()}
    save_rows(run, row["identity"], [row])
    return row


def window_losses(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    target: EvalTarget,
    jobs: Sequence[tuple[Sites, Tensor]],
    what: str,
    stop: StopRequest | None = None,
) -> list[Tensor]:
    """Mean next-token cross entropy of every window of each job's tokens, each fp64 [n] on the CPU.

    Windows are shared out over ranks. Arguments and errors: as `windows.final_states`.
    """
    head, finals = final_states(config, world, files, target, jobs, what, stop)
    return [mean_losses(head, final, len(tokens), world) for (_, tokens), final in zip(jobs, finals, strict=True)]
