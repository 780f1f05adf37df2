"""Set the step times that were measured on several numbers of GPUs beside a model of them, and predict other numbers.

    torchrun --nproc_per_node 2 -m dist_spin bench optimize configs/shapes/llama-3-70b --sequences 2,8 --json two.json
    dist-spin bench scaling two.json [four.json ...] --predict 4,8 --sequences 8,16 [--quantize layer70b.json]

All files are of one shape. The model (bench/scaling_model.py) is fitted to the fewest ranks among them, for each engine and
number of weight bits, and predicts every row from that: rows of more ranks check it.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_spin.bench import scaling_model as model
from dist_spin.bench.optimize import json_config, step_flop
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape

GIB = model.GIB
RENAMED = {"stall_s": "checkpoint_wait_s", "fit_grids_s": "requantize_s"}  # figures as earlier versions called them
HEADER = (
    *("engine", "W bits", "layers", "seqs", "GPUs", "per group", "passes", "step s", "tokens/s", "matmul %", "GiB"),
    *("efficiency %", "model s", "off %", "compute", "copies", "gather", "requantize", "reduce", "Cayley", "wait"),
    *("GiB gathered", "model GiB"),
)


def run(options: argparse.Namespace) -> int:
    """Print the table; returns the exit code."""
    machine = model.Machine(
        options.link_gb_s * 1e9, options.copy_gb_s * 1e9, options.contention, options.device_gib * GIB
    )
    if not (options.shape / "config.json").exists():
        raise UserError(
            f"{options.shape} has no config.json", "give --shape a directory like configs/shapes/llama-3-8b"
        )
    shape = Shape.of(json_config(options.shape))
    figures = [row for path in options.files for row in read(path)]
    for row in figures:
        check(row, shape)
    rows, whole_runs = [], []
    for group in grouped(figures):
        reference = Reference(group, shape, machine)
        rows += [reference.measured(row) for row in sorted(group, key=order)]
        for sequences in options.sequences or sorted({row["sequences"] for row in group}):
            for ranks in options.predict:
                for shards in dict.fromkeys(s or ranks for s in options.shard_ranks):
                    if ranks % shards == 0 and not reference.has(ranks, shards, sequences):
                        rows.append(reference.predicted(ranks, shards, sequences))
            if options.quantize and reference.w_bits == 16:
                seconds = json.loads(options.quantize.read_text())
                if (sharing := seconds.get("ranks", 1)) > 1:
                    raise UserError(
                        f"{options.quantize} is of a layer shared by {sharing} ranks", "time the layer on one GPU"
                    )
                gpus = sorted({reference.ranks, *options.predict})
                whole_runs += [reference.whole_run(ranks, sequences, seconds, options) for ranks in gpus]
    print(table(rows))
    print("\n".join(whole_runs))
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The figures in one file of `bench optimize --json`, which holds one configuration or a list of them."""
    try:
        content = json.loads(path.read_text())
        rows = content if isinstance(content, list) else [content]
        if not all({"step_s", "ranks", "tokens_per_step", "recompute"} <= row.keys() for row in rows):
            raise ValueError("figures are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no figures of bench optimize ({error})", "write it with --json FILE") from error
    for row in rows:
        for old, new in RENAMED.items():
            if old in row:
                row[new] = row.pop(old)
        row.setdefault("w_bits", 4 if "requantize_s" in row else 16)
        row.setdefault("sequences", row["tokens_per_step"] // 2048)
    return rows


def check(row: dict[str, Any], shape: Shape) -> None:
    """Refuse figures of another shape, which their own FLOP/s tell.

    Raises:
        UserError: says so.
    """
    flop = row["tflops_per_device"] * 1e12 * row["step_s"] * row["ranks"]
    cut = dataclasses.replace(shape, layers=row["layers"])
    expected = step_flop(cut, row["tokens_per_step"], row["tokens_per_step"] // row["sequences"])
    slack = 0.06e12 * row["step_s"] * row["ranks"] + 0.01 * expected  # one decimal of TFLOP/s, and the rounded seconds
    if abs(flop - expected) > slack:
        raise UserError(
            f"a step of {flop:.3g} FLOP was measured, the shape's has {expected:.3g}", "give --shape its directory"
        )


def grouped(figures: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The figures of each engine and number of weight bits."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in figures:
        groups.setdefault((row["engine"], -row["w_bits"]), []).append(row)
    return [groups[key] for key in sorted(groups)]


def order(row: dict[str, Any]) -> tuple[int, int, int]:
    """The order of a table's rows."""
    return row["layers"], row["sequences"], row["ranks"]


def point_of(row: dict[str, Any]) -> model.Point:
    """The configuration that was measured."""
    ranks, sequences, length = row["ranks"], row["sequences"], row["tokens_per_step"] // row["sequences"]
    shards = row.get("shard_ranks") or ranks
    return model.Point(
        ranks, shards, sequences, length, row["layers"], row["w_bits"], row["micro_batch_size"], row["recompute"]
    )


class Reference:
    """The rows of one engine and number of bits, and the model fitted to those of the fewest ranks."""

    def __init__(self, group: list[dict[str, Any]], shape: Shape, machine: model.Machine) -> None:
        self.shape, self.machine, self.group = shape, machine, group
        fitting = [
            row for row in group if not row["offloaded_layers"]
        ]  # visits of layers from the host are not modelled
        if not fitting:
            raise UserError(
                "layers were offloaded in every measurement", "measure on more GPUs, or with fewer --layers"
            )
        self.ranks = min(row["ranks"] for row in fitting)
        base = sorted((row for row in fitting if row["ranks"] == self.ranks), key=order)
        self.last, self.w_bits = base[-1], base[-1]["w_bits"]
        net = [(point_of(row), row["forward_backward_s"] - row.get("requantize_s", 0.0)) for row in base]
        try:
            self.fit = model.fit(shape, net, machine)
        except ValueError as error:
            raise UserError(f"the model does not fit: {error}", "give a higher --link-gb-s or --copy-gb-s") from error
        peaks = [row["peak_gib"] * GIB - model.memory(shape, point_of(row)) for row in base if row["peak_gib"]]
        self.unaccounted = sum(peaks) / len(peaks) if peaks else 0.0

    def has(self, ranks: int, shards: int, sequences: int) -> bool:
        """Whether a step of the whole shape was measured there."""
        key = (ranks, shards, sequences, self.shape.layers)
        points = map(point_of, self.group)
        return any((p.ranks, p.shards, p.sequences, p.layers) == key for p in points)

    def predict(self, point: model.Point) -> model.Prediction:
        """The model's answer, its memory shifted by what it missed where it was fitted."""
        last = self.last
        requantize = last.get("requantize_s", 0.0) * point.layers / last["layers"]
        fixed = model.Fixed(last["ranks"], last["reduce_s"], last["cayley_s"], last["checkpoint_wait_s"], requantize)
        prediction = model.predict(self.shape, point, self.fit, fixed, self.machine)
        return dataclasses.replace(prediction, memory=prediction.memory + self.unaccounted)

    def planned(self, ranks: int, shards: int, sequences: int) -> model.Point:
        """What a run of the whole shape would choose on `ranks` GPUs."""
        length, layers = self.last["tokens_per_step"] // self.last["sequences"], self.shape.layers
        return model.planned(self.shape, ranks, shards, sequences, length, layers, self.w_bits, self.machine)

    def measured(self, row: dict[str, Any]) -> list[str]:
        """A row of the table for a measurement."""
        point = point_of(row)
        shown = [f"{row['step_s']:.4g}", f"{row['tokens_per_s']:.0f}", f"{100 * row['share_of_matmul']:.1f}"]
        shown.append(f"{row['peak_gib']:.1f}")
        efficiency = self.efficiency(point, row["step_s"])
        if row["offloaded_layers"]:
            return [*self._head(point), *shown, efficiency]
        prediction = self.predict(point)
        return [*self._head(point), *shown, efficiency, *self._parts(prediction, row["step_s"])]

    def predicted(self, ranks: int, shards: int, sequences: int) -> list[str]:
        """A row of the table for what was not measured."""
        point = self.planned(ranks, shards, sequences)
        prediction = self.predict(point)
        if prediction.memory > self.machine.memory:
            return [*self._head(point), "does not fit", *[""] * (len(HEADER) - 9), f"{prediction.memory / GIB:.1f}"]
        tokens = sequences * point.seq_len
        flop = step_flop(self.shape, tokens, point.seq_len) / ranks
        share = flop / prediction.step / (self.last["matmul_tflops"] * 1e12) if self.last["matmul_tflops"] else 0.0
        shown = ["predicted", f"{tokens / prediction.step:.0f}", f"{100 * share:.1f}", ""]
        return [*self._head(point), *shown, self.efficiency(point, prediction.step), *self._parts(prediction, None)]

    def efficiency(self, point: model.Point, step: float) -> str:
        """Percent of the tokens/s per GPU that the fewest ranks reach with the same sequences and layers (~: predicted)."""
        same = {"sequences": point.sequences, "layers": point.layers, "ranks": self.ranks}
        base = [row["step_s"] for row in self.group if same.items() <= row.items()]
        if not base and point.layers != self.shape.layers:
            return ""
        seconds = base[0] if base else self.predict(self.planned(self.ranks, self.ranks, point.sequences)).step
        return f"{'' if base else '~'}{100 * seconds * self.ranks / (step * point.ranks):.1f}"

    def whole_run(self, ranks: int, sequences: int, layer: dict[str, Any], options: argparse.Namespace) -> str:
        """One line: every stage of a run of the whole shape on `ranks` GPUs."""
        shape, last = self.shape, self.last
        step = self.predict(self.planned(ranks, ranks, sequences)).step
        weights = shape.layers * model.mean_layer_bytes(shape)
        seconds = model.pipeline(
            shape.layers,
            ranks,
            step=step,
            steps=options.steps,
            loading=last["load_s"] * last["ranks"] / ranks * shape.layers / last["layers"] + last["first_step_s"],
            layer=layer["seconds"]["layer"],
            forward=layer["seconds"]["forward"],
            merge=layer["seconds"]["merge"],
            per_job=options.layers_per_job,
            states_bytes=layer["sequences"] * layer["seq_len"] * shape.hidden * model.DTYPE.itemsize,
            model_bytes=weights / 4 + 2 * shape.vocab * shape.hidden * model.DTYPE.itemsize,
            disk=options.disk_gb_s * 1e9,
            starting=options.start_s,
        )
        stages = " + ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        total = sum(seconds.values())
        return f"whole run, {ranks} GPUs, {sequences} sequences per step: {stages} = {total:.0f} s ({total / 60:.1f} minutes)"

    def _head(self, point: model.Point) -> list[str]:
        levels = ", ".join(f"{count} {level}" for level, count in sorted(point.levels.items()))
        micro_batches = f"{point.micro_batches} x {point.micro} ({levels})"
        words = (
            self.last["engine"],
            point.w_bits,
            point.layers,
            point.sequences,
            point.ranks,
            point.shards,
            micro_batches,
        )
        return [str(word) for word in words]

    def _parts(self, prediction: model.Prediction, measured: float | None) -> list[str]:
        off = "" if measured is None else f"{100 * (prediction.step / measured - 1):+.1f}"
        parts = (
            prediction.compute,
            prediction.copies,
            prediction.gather,
            prediction.requantize,
            prediction.reduce,
            prediction.cayley,
            prediction.checkpoint_wait,
        )
        sizes = (prediction.gathered, prediction.memory)
        return [f"{prediction.step:.4g}", off, *(f"{x:.4f}" for x in parts), *(f"{x / GIB:.1f}" for x in sizes)]


def table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, its columns aligned."""
    lines = [list(HEADER), *([*row, *[""] * (len(HEADER) - len(row))] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *text[1:]])
