"""Measure perplexity of the full-precision model and of every quantised variant, layer by layer.

    dist-spin evaluate configs/quickstart.yaml

Perplexity is over non-overlapping windows, cross entropy in fp32. Each measured cell is a file of its own, so that a second
start measures only what is missing.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.data import fingerprint, load_tokens
from dist_spin.distributed import World, any_rank, on_leader, sum_over_ranks_
from dist_spin.errors import Interrupted, NumericsError, UserError
from dist_spin.layer_files import finished_layer, identity_hash, layer_path
from dist_spin.model.architecture import Shape
from dist_spin.model.layers import Head
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.progress import Progress
from dist_spin.rundir import RunDir, write_json
from dist_spin.settings import RunConfig
from dist_spin.signals import StopRequest
from dist_spin.stages.common import check_vocabulary, model_dtype, open_configured_model, run_dir, say
from dist_spin.stages.results import public, update_results
from dist_spin.stages.variants import (
    LEARNED,
    Variant,
    calibration_tokens,
    ends_of,
    layer_identity,
    model_identity,
    site_settings,
    variant,
)

TOKENS_AT_ONCE = 4096  # of hidden states that go through a layer together, at least
BYTES_PER_CHANNEL = 32  # of the MLP for each token on its way through: copies, some of them in the quantiser's fp32


@dataclass
class Cell:
    """One row of the results: a variant with its weights as they are or quantised."""

    chosen: Variant
    weights: str  # none, rtn or gptq
    full_precision: bool = False
    made_under: str = ""  # fingerprint of its layer files; empty where weights are as they are
    given: bool = False  # its rotations were not learned here
    about: dict[str, Any] = field(default_factory=dict)  # further entries of its row, which decide no figure

    @property
    def label(self) -> str:
        """The method's name in tables."""
        if "system" in self.about:
            return self.about["system"]
        if self.full_precision:
            return "full precision"
        learned = "given rotation" if self.given else "learned rotation"
        return {"none": "no rotation", LEARNED: learned}.get(
            self.chosen.name, f"random {self.chosen.name.capitalize()}"
        )


def evaluate(config: RunConfig, world: World) -> list[dict[str, Any]]:
    """Measure every cell on every source and write results.json; returns its rows.

    Raises:
        Interrupted: a signal came; finished cells are kept.
        UserError: layers are missing, or a source cannot be read.
    """
    stop = StopRequest()
    run, files = run_dir(config), open_configured_model(config)
    measured = cells(config, files, world.device)
    quantised = [cell for cell in measured if cell.weights != "none"]
    calibration = calibration_tokens(config, files) if quantised else torch.empty(0)
    for cell in quantised:
        missing = [i for i in range(files.shape.layers) if not cell_layer(run, cell, i).exists()]
        if missing:
            problem = f"layer {missing[0]} of '{cell.chosen.name}' is not quantised"
            raise UserError(problem, "run `dist-spin quantize` first")
        cell.made_under = identity_hash(layer_identity(config, files, cell.chosen, calibration))
    rows = []
    for source in config.evaluate.sources:
        tokens = measuring_tokens(config, files, source)
        for cell in measured:
            row = measure(config, world, files, run, cell, source, tokens)
            rows.append(row)
            if any_rank(bool(stop)):
                raise Interrupted("stopped by a signal between two measurements", "the same command continues")
    if config.evaluate.tasks:
        from dist_spin.stages.zero_shot import zero_shot  # late: the harness is an extra

        rows += zero_shot(config, world, files, run, measured, stop)
    shown = [public(row) for row in rows]
    on_leader(lambda: update_results(run, "evaluate", shown))
    if world.leads:
        print("\n".join(filter(None, [table(shown), task_table(shown)])))
        say(f"wrote {run.path / 'results.json'}")
    return shown


def cells(config: RunConfig, files: ModelFiles, device: torch.device) -> list[Cell]:
    """What is measured: full precision, each baseline and the learned rotations, the latter also with 16-bit weights."""
    unrotated = variant(config, files, "none", device)
    off = QuantSpec()
    out = [Cell(dataclasses.replace(unrotated, sites=Sites(off, off, off, off)), "none", full_precision=True)]
    quantised = config.quantize.method if config.quant.w_bits < 16 else "none"
    names, given = [*config.quantize.baselines, LEARNED], config.optimize.steps == 0
    rotated = {name: variant(config, files, name, device) for name in names}
    if quantised != "none" and config.evaluate.unquantized_weights:
        out += [Cell(rotated[name], "none", given=given) for name in names]
    return out + [Cell(rotated[name], quantised, given=given) for name in names]


def measuring_tokens(config: RunConfig, files: ModelFiles, source: str) -> Tensor:
    """The windows [n, T] of one source."""
    e = config.evaluate
    tokenizer = None if source.startswith("tokens:") else files.tokenizer()
    tokens = on_leader(lambda: load_tokens(source, e.split, e.seq_len, tokenizer))
    check_vocabulary(tokens, files.shape, source)
    return tokens[: e.max_sequences] if e.max_sequences else tokens


def measure(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    run: RunDir,
    cell: Cell,
    source: str,
    tokens: Tensor,
) -> dict[str, Any]:
    """One cell on one source, from its file if it was measured before."""
    row = described(config, files, cell, source, tokens)
    before = measured_before(run, row)
    if before is not None:
        return before
    began = time.monotonic()
    what = f"measure {source}, {cell.label}, {cell.weights} weights"
    (losses,) = window_losses(config, world, files, cell, [(cell.chosen.sites, tokens)], what)
    return recorded(run, row, losses, time.monotonic() - began)


def described(config: RunConfig, files: ModelFiles, cell: Cell, source: str, tokens: Tensor) -> dict[str, Any]:
    """What is known of a row before it is measured, with the `identity` that names its file."""
    row = {k: v for k, v in describe(config, cell).items() if k != "method"} | {
        "dataset": source,
        "seq_len": config.evaluate.seq_len,
    }
    identity = identity_hash(
        {**row, "layers": cell.made_under, "tokens": fingerprint(tokens), **cell_identity(config, files, cell)}
    )
    return {"method": cell.label, **row, "tokens": tokens.numel(), "identity": identity, **cell.about}


def measurement_path(run: RunDir, row: dict[str, Any]) -> Path:
    """The file of a measurement."""
    return run.path / "evaluations" / f"{row['identity']}.json"


def measured_before(run: RunDir, row: dict[str, Any]) -> dict[str, Any] | None:
    """`row` with its figures if it was measured before, under whatever name."""
    path = measurement_path(run, row)
    before = on_leader(lambda: json.loads(path.read_text()) if path.exists() else None)
    return None if before is None else before | row


def recorded(run: RunDir, row: dict[str, Any], losses: Tensor, seconds: float) -> dict[str, Any]:
    """`row` with its figures, kept in a file.

    Raises:
        NumericsError: the mean of `losses` is not finite.
    """
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise NumericsError(
            f"{row['method']} on {row['dataset']}: the loss is {mean}", "check the model's dtype and the quantisers"
        )
    row = row | {"ppl": math.exp(mean), "seconds": round(seconds, 2), "losses": losses.tolist()}
    on_leader(lambda: write_json(measurement_path(run, row), row))
    return row


def describe(config: RunConfig, cell: Cell) -> dict[str, Any]:
    """What every row says of the model that was measured: method, rotation, weights, bits, group size and seed."""
    q, off = config.quant, cell.full_precision
    return {
        "method": cell.label,
        "rotation": cell.chosen.name,
        "weights": cell.weights,
        "w_bits": q.w_bits if cell.weights != "none" else 16,
        **{f"{s}_bits": 16 if off else getattr(q, f"{s}_bits") for s in "akv"},
        "group_size": q.w_group_size if cell.weights != "none" else 0,
        "seed": config.rotation.seed,
    }


def cell_identity(config: RunConfig, files: ModelFiles, cell: Cell) -> dict[str, Any]:
    """What decides a measurement beside its row and layers: model, rotations, site settings and quantised ends."""
    found = model_identity(config, files, cell.chosen)
    if not cell.full_precision:
        found |= site_settings(config)
    ends = ends_of(config, files, cell.chosen)
    return found if cell.weights == "none" or not ends.bits else found | {"ends": ends.made_under}


def window_losses(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    cell: Cell,
    jobs: Sequence[tuple[Sites, Tensor]],
    what: str,
) -> list[Tensor]:
    """Mean next-token cross entropy of every window of each job's tokens, each fp64 [n] on the CPU.

    The jobs, (sites, tokens [n, T]), share the cell's weights, so that a layer is read or merged once for all of them.
    Windows are shared out over ranks. `what` is shown while it goes on.
    """
    walk = Walk(config, world, files, run_dir(config), cell)
    together = tokens_at_once(world.device, files.shape)
    mine = [tokens[world.rank :: world.size] for _, tokens in jobs]
    batches = [ids.split(max(1, together // ids.shape[1])) if len(ids) else () for ids in mine]
    states = iter(walk.embed(ids for parts in batches for ids in parts))
    hidden = [[next(states) for _ in parts] for parts in batches]  # for each job: [batch, T, h], ...
    for layers in walk.layers_at(what, [sites for sites, _ in jobs]):
        for layer, parts in zip(layers, hidden, strict=True):
            parts[:] = [layer(h) for h in parts]
    head = walk.head()
    out = []
    for (_, tokens), ids, parts in zip(jobs, batches, hidden, strict=True):
        losses = torch.zeros(len(tokens), dtype=torch.float64)
        if parts:
            mean = [head.loss(h, some.to(world.device)) for h, some in zip(parts, ids, strict=True)]
            losses[world.rank :: world.size] = torch.cat(mean).double().cpu()
        out.append(sum_over_ranks_(losses))
    return out


def tokens_at_once(device: torch.device, shape: Shape) -> int:
    """Tokens that go through a layer together: on a GPU as many as an eighth of its memory has room for."""
    if device.type != "cuda":
        return TOKENS_AT_ONCE
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(TOKENS_AT_ONCE, memory // 8 // (BYTES_PER_CHANNEL * shape.intermediate))


class Walk:
    """A cell's model taken one layer at a time: embed, then every layer in order, then the head."""

    def __init__(self, config: RunConfig, world: World, files: ModelFiles, run: RunDir, cell: Cell) -> None:
        self._world, self._files, self._run, self._cell = world, files, run, cell
        self._dtype, self._weights = model_dtype(config), cell.chosen.weights
        self._runner = cell.chosen.runner(files.config, cell.chosen.sites, world.device, self._dtype)
        quantised = cell.weights != "none"
        self._ends = ends_of(config, files, cell.chosen).load(self._dtype, world.device, say) if quantised else {}

    def embed(self, batches: Iterable[Tensor], place: torch.device | None = None) -> list[Tensor]:
        """Hidden states [batch, T, h] of token ids, each [batch, T], kept on `place` (default: the rank's device)."""
        embedding = self._ends.pop("embedding") if "embedding" in self._ends else self._weights.embedding()
        return [embedding[ids.to(embedding.device)].to(place or embedding.device) for ids in batches]

    def layers(self, what: str) -> Iterator[Callable[[Tensor], Tensor]]:
        """Each decoder layer in order, as a function of hidden states [batch, T, h] on the rank's device."""
        for (layer,) in self.layers_at(what, [self._cell.chosen.sites]):
            yield layer

    def layers_at(self, what: str, sites: Sequence[Sites]) -> Iterator[list[Callable[[Tensor], Tensor]]]:
        """Each decoder layer in order, once for each of `sites`, with the same weights."""
        placed = [each.to(self._world.device, self._dtype) for each in sites]
        count = self._files.shape.layers
        progress = Progress(f"{what}: layer", count, show=self._world.leads)
        for index in range(count):
            quantised = quantized_weights(self._run, self._cell, index, self._dtype, self._world)
            weights = quantised or self._weights.layer(index)
            modules = [self._runner.build(index, weights, each) for each in placed]
            yield [functools.partial(self._runner.run, module, index) for module in modules]
            progress.advance()

    def head(self) -> Head:
        """Final norm and lm_head."""
        return self._weights.head(self._files.config.rms_norm_eps, self._ends.get("head"))


def quantized_weights(
    run: RunDir, cell: Cell, index: int, dtype: torch.dtype, world: World
) -> dict[str, Tensor] | None:
    """Dequantised parameters of a layer from its file; None where the cell keeps 16-bit weights."""
    if cell.weights == "none":
        return None
    path = cell_layer(run, cell, index)
    layer = finished_layer(path, cell.made_under, say)
    if layer is None:
        raise UserError(f"layer {index} of '{cell.chosen.name}' is not quantised", "run `dist-spin quantize` first")
    return layer.weights(dtype, world.device)


def cell_layer(run: RunDir, cell: Cell, index: int) -> Path:
    """The file of a quantised layer of a cell's variant."""
    return layer_path(run.layers("" if cell.chosen.name == LEARNED else cell.chosen.name), index)


def bits_label(row: dict[str, Any]) -> str:
    """Bits as tables name them: W4A4KV4, or W4A4K4V8 where keys and values differ."""
    k, v = row["k_bits"], row["v_bits"]
    return f"W{row['w_bits']}A{row['a_bits']}" + (f"KV{k}" if k == v else f"K{k}V{v}")


def table(rows: list[dict[str, Any]]) -> str:
    """Perplexities as a plain text table, the best quantised one of each bit width and source marked with *."""
    rows = [r for r in rows if "ppl" in r]
    best: dict[tuple[str, str], float] = {}
    for r in rows:
        key = (r["dataset"], bits_label(r))
        best[key] = min(best.get(key, math.inf), r["ppl"])
    lines = [("text", "bits", "method", "weights", "perplexity")]
    for r in rows:
        mark = " *" if r["ppl"] == best[(r["dataset"], bits_label(r))] and r["method"] != "full precision" else ""
        lines.append((r["dataset"], bits_label(r), r["method"], r["weights"], f"{r['ppl']:.3f}{mark}"))
    return columns(lines)


def task_table(rows: list[dict[str, Any]]) -> str:
    """Zero-shot figures as a plain text table, each with its standard error."""
    lines = [("task", "bits", "method", "weights", "metric", "value", "items")]
    for r in (r for r in rows if "task" in r):
        value = f"{r['value']:.4f}" + (f" ± {r['stderr']:.4f}" if r["stderr"] is not None else "")
        lines.append((r["task"], bits_label(r), r["method"], r["weights"], r["metric"], value, str(r["n"])))
    return columns(lines)


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines under a header line as aligned columns; nothing if there is only the header."""
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(aligned) if len(lines) > 1 else ""
