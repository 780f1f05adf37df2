"""Perplexity: the mean cross entropy of windows of text that pass through the model layer by layer, and its exponential."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.data import load_tokens, tokens_fingerprint
from dist_spin.errors import Interrupted, NumericsError
from dist_spin.evaluate.layerwise_model import LayerwiseModel
from dist_spin.evaluate.measurements import load_rows, save_rows
from dist_spin.evaluate.targets import EvalTarget, describe, target_identity
from dist_spin.model.architecture import Shape
from dist_spin.model.context import check_context
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.finite import dtype_remedy
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.model import check_vocabulary, model_dtype
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure, sum_over_ranks_
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import RunDir, run_dir
from dist_spin.storage.tensor_file import identity_hash

TOKENS_AT_ONCE = 4096  # of hidden states that go through a layer together, at least
LARGEST_LOSS = 700.0  # nats; e^709 leaves the range of fp64
BYTES_PER_CHANNEL = 32  # of the MLP for each token on its way through: copies, some of them in the quantiser's fp32


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
    stop: StopRequest,
) -> dict[str, Any]:
    """The row of one target on one source, from its file if it was measured before.

    Raises:
        Interrupted, NumericsError: as `window_losses`.
    """
    row = described(config, files, target, source, tokens)
    before = measured_before(run, row)
    if before is not None:
        return before
    began = time.monotonic()
    what = f"measure {source}, {target.label}, {target.weights} weights"
    (losses,) = window_losses(config, world, files, target, [(target.variant.sites, tokens)], what, stop)
    return recorded(run, row, losses, time.monotonic() - began)


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


def recorded(run: RunDir, row: dict[str, Any], losses: Tensor, seconds: float) -> dict[str, Any]:
    """`row` with its figures, kept in a file.

    Raises:
        NumericsError: the mean of `losses` is not finite, or too large for a perplexity.
    """
    mean = float(losses.mean())
    if not mean < LARGEST_LOSS:
        raise NumericsError(
            f"{row['method']} on {row['dataset']}: the loss is {mean}", "check the model's dtype and the quantisers"
        )
    row = row | {"ppl": math.exp(mean), "seconds": round(seconds, 2), "losses": losses.tolist()}
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

    The jobs, (sites, tokens [n, T]), share the target's weights, so that a layer is read or merged once for all of them.
    Windows are shared out over ranks. `what` is shown while it goes on. stop: the stage's, asked after every layer.

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
    head = model.head()
    out = []
    for (_, tokens), ids, parts in zip(jobs, batches, hidden, strict=True):
        losses = torch.zeros(len(tokens), dtype=torch.float64)
        if parts:
            mean = [head.loss(h, batch.to(world.device)) for h, batch in zip(parts, ids, strict=True)]
            losses[world.rank :: world.size] = torch.cat(mean).double().cpu()
        out.append(sum_over_ranks_(losses))
    return out


def tokens_at_once(device: torch.device, shape: Shape) -> int:
    """Tokens that go through a layer together: on a GPU as many as an eighth of its memory has room for."""
    if device.type != "cuda":
        return TOKENS_AT_ONCE
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(TOKENS_AT_ONCE, memory // 8 // (BYTES_PER_CHANNEL * shape.intermediate))
