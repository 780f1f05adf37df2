"""Measure perplexity of the full-precision model and of every quantised variant, layer by layer.

    dist-spin evaluate configs/quickstart.yaml

Perplexity is over non-overlapping windows, cross entropy in fp32. Each measured cell is a file of its own, so that a second
start measures only what is missing.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.data import fingerprint, load_tokens
from dist_spin.distributed import World, any_rank, on_leader, sum_over_ranks_
from dist_spin.errors import Interrupted, NumericsError, UserError
from dist_spin.layer_files import finished_layer, identity_hash, layer_path
from dist_spin.model.layers import LayerRunner
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.progress import Progress
from dist_spin.rundir import RunDir, write_json
from dist_spin.settings import RunConfig
from dist_spin.signals import StopRequest
from dist_spin.stages.common import WEIGHT_SETTINGS, check_vocabulary, model_dtype, open_configured_model, run_dir, say
from dist_spin.stages.quantize import (
    LEARNED,
    TUNED,
    Variant,
    calibration_tokens,
    ends_of,
    layer_identity,
    tuned_identity,
    variant,
)

TOKENS_AT_ONCE = 4096  # of hidden states that go through a layer together


@dataclass
class Cell:
    """One row of the results: a variant with its weights as they are or quantised."""

    chosen: Variant
    weights: str  # none, rtn or gptq
    full_precision: bool = False
    made_under: str = ""  # fingerprint of its layer files; empty where weights are as they are

    @property
    def label(self) -> str:
        """The method's name in tables."""
        if self.full_precision:
            return "full precision"
        return {"none": "no rotation", LEARNED: "learned rotation", TUNED: "learned rotation, tuned"}.get(
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
        if cell.chosen.name == TUNED:
            cell.made_under = identity_hash(tuned_identity(config, cell.made_under))
    rows = []
    for source in config.evaluate.sources:
        tokens = measuring_tokens(config, files, source)
        for cell in measured:
            row = measure(config, world, files, run, cell, source, tokens)
            rows.append(row)
            if any_rank(bool(stop)):
                raise Interrupted("stopped by a signal between two measurements", "the same command continues")
    public = [{k: v for k, v in row.items() if k not in ("losses", "identity")} for row in rows]
    on_leader(lambda: write_json(run.path / "results.json", public))
    if world.leads:
        print(table(public))
        say(f"wrote {run.path / 'results.json'}")
    return public


def cells(config: RunConfig, files: ModelFiles, device: torch.device) -> list[Cell]:
    """What is measured: full precision, each baseline and the learned rotations, the latter also with 16-bit weights."""
    unrotated = variant(config, files, "none", device)
    off = QuantSpec()
    out = [Cell(dataclasses.replace(unrotated, sites=Sites(off, off, off, off)), "none", full_precision=True)]
    quantised = config.quantize.method if config.quant.w_bits < 16 else "none"
    names = [*config.quantize.baselines, LEARNED]
    rotated = {name: variant(config, files, name, device) for name in names}
    if quantised != "none" and config.evaluate.unquantized_weights:
        out += [Cell(rotated[name], "none") for name in names]
    out += [Cell(rotated[name], quantised) for name in names]
    if quantised != "none" and config.quantize.tune_steps:
        out.append(Cell(dataclasses.replace(rotated[LEARNED], name=TUNED), quantised))
    return out


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
    q = config.quant
    off = cell.full_precision
    bits = {
        "w_bits": q.w_bits if cell.weights != "none" else 16,
        **{f"{s}_bits": 16 if off else getattr(q, f"{s}_bits") for s in "akv"},
    }
    row = {
        "method": cell.label,
        "rotation": cell.chosen.name,
        "weights": cell.weights,
        **bits,
        "group_size": q.w_group_size if cell.weights != "none" else 0,
        "seed": config.rotation.seed,
        "dataset": source,
        "seq_len": config.evaluate.seq_len,
    }
    identity = identity_hash(
        {**row, "layers": cell.made_under, "tokens": fingerprint(tokens), **cell_identity(config, files, cell)}
    )
    path = run.path / "evaluations" / f"{identity}.json"
    before = on_leader(lambda: json.loads(path.read_text()) if path.exists() else None)
    if before is not None:
        return before
    began = time.monotonic()
    losses = window_losses(config, world, files, run, cell, source, tokens)
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise NumericsError(
            f"{cell.label} on {source}: the loss is {mean}", "check the model's dtype and the quantisers"
        )
    row |= {
        "ppl": math.exp(mean),
        "tokens": tokens.numel(),
        "seconds": round(time.monotonic() - began, 2),
        "identity": identity,
        "losses": losses.tolist(),
    }
    on_leader(lambda: write_json(path, row))
    return row


def cell_identity(config: RunConfig, files: ModelFiles, cell: Cell) -> dict[str, Any]:
    """What decides a measurement beside its row and layers: model, rotations, site settings and quantised ends."""
    none = torch.zeros(1, 1, dtype=torch.long)
    chosen = layer_identity(config, files, cell.chosen, none)
    found = {k: v for k, v in chosen.items() if not k.startswith(("quantize.", *WEIGHT_SETTINGS))}
    ends = ends_of(config, files, cell.chosen)
    return found if cell.weights == "none" or not ends.bits else found | {"ends": ends.made_under}


def window_losses(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    run: RunDir,
    cell: Cell,
    source: str,
    tokens: Tensor,
) -> Tensor:
    """Mean next-token cross entropy of every window [n], fp64 on the CPU; windows are shared out over ranks."""
    dtype, chosen, layers = model_dtype(config), cell.chosen, files.shape.layers
    rotated = chosen.rotations is not None
    runner = LayerRunner(files.config, chosen.sites, device=world.device, dtype=dtype, rotated=rotated)
    mine = tokens[world.rank :: world.size].to(world.device)
    batch = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    ends = ends_of(config, files, chosen).load(dtype, world.device, say) if cell.weights != "none" else {}
    embedding = ends.pop("embedding") if "embedding" in ends else chosen.weights.embedding()
    hidden = [embedding[ids] for ids in mine.split(batch)] if len(mine) else []  # each [batch, T, h]
    del embedding
    progress = Progress(f"measure {source}, {cell.label}, {cell.weights} weights: layer", layers, show=world.leads)
    for index in range(layers):
        weights = quantized_weights(run, cell, index, dtype, world) or chosen.weights.layer(index)
        module = runner.build(index, weights)
        hidden = [runner.run(module, index, h) for h in hidden]
        progress.advance()
    head = chosen.weights.head(files.config.rms_norm_eps, ends.get("head"))
    losses = torch.zeros(len(tokens), dtype=torch.float64)
    if hidden:
        parts = [head.loss(h, ids) for h, ids in zip(hidden, mine.split(batch), strict=True)]
        losses[world.rank :: world.size] = torch.cat(parts).double().cpu()
    return sum_over_ranks_(losses)


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


def table(rows: list[dict[str, Any]]) -> str:
    """Results as a plain text table, best quantised perplexity of each bit width and source marked with *."""

    def bits(r: dict[str, Any]) -> str:
        k, v = r["k_bits"], r["v_bits"]
        return f"W{r['w_bits']}A{r['a_bits']}" + (f"KV{k}" if k == v else f"K{k}V{v}")

    best: dict[tuple[str, str], float] = {}
    for r in rows:
        key = (r["dataset"], bits(r))
        best[key] = min(best.get(key, math.inf), r["ppl"])
    lines = [("text", "bits", "method", "weights", "perplexity")]
    for r in rows:
        mark = " *" if r["ppl"] == best[(r["dataset"], bits(r))] and r["method"] != "full precision" else ""
        lines.append((r["dataset"], bits(r), r["method"], r["weights"], f"{r['ppl']:.3f}{mark}"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)
