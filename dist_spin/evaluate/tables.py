"""Measured rows as plain text tables: what `evaluate` and `compare` print when they are done."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from dist_spin.runtime.text_table import aligned
from dist_spin.storage.results import bits_label, system_label


def system_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """System, clips and rounding of the weights of a row: each combination has a line of the comparison's table."""
    return row["system"], row["clips"], row["weights"]


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one row of a comparison from all others: its system, bits, seed and text."""
    return *system_of(row), bits_label(row), row["seed"], row["dataset"]


def spread(values: list[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one value) and how many."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """A table for each text; the best mean of each column of bits is marked with *, full precision apart."""
    return "\n\n".join(_table(name, [r for r in rows if r["dataset"] == name]) for name in _unique(rows, "dataset"))


def _unique(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _table(dataset: str, rows: list[dict[str, Any]]) -> str:
    perplexities: dict[tuple[str, str, str], dict[str, list[float]]] = {}  # system -> bits -> one for each seed
    title = f"{dataset}: perplexity, {rows[0]['tokens']} tokens in windows of {rows[0]['seq_len']}"
    for row in rows:
        if row["system"] == "full precision":
            title += f"; full precision {row['ppl']:.3f}"
        else:
            perplexities.setdefault(system_of(row), {}).setdefault(bits_label(row), []).append(row["ppl"])
    # A rounding of 16-bit weights is none: such figures stand in lines of their own.
    all_bits = list(dict.fromkeys(bits for by_bits in perplexities.values() for bits in by_bits))
    best = {
        bits: min(spread(by_bits[bits])[0] for by_bits in perplexities.values() if bits in by_bits) for bits in all_bits
    }
    lines = [["method", "weights", *all_bits]]
    for (system, clips, weights), by_bits in perplexities.items():
        lines.append(
            [system_label(system, clips), weights, *(_figure(by_bits.get(bits), best[bits]) for bits in all_bits)]
        )
    return "\n".join([title, *aligned(lines)])


def _figure(values: list[float] | None, best: float) -> str:
    if values is None:
        return "-"
    mean, deviation, n = spread(values)
    digits = 3 if mean < 1000 else 0
    text = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f} ({n})" if n > 1 else "")
    return text + (" *" if math.isclose(mean, best) else "")


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    """Perplexities as a plain text table, the best quantised one of each bit width and source marked with *."""
    rows = [r for r in rows if "ppl" in r]
    best: dict[tuple[str, str], float] = {}
    for r in rows:
        text_and_bits = (r["dataset"], bits_label(r))
        best[text_and_bits] = min(best.get(text_and_bits, math.inf), r["ppl"])
    lines = [("text", "bits", "method", "weights", "perplexity")]
    for r in rows:
        mark = " *" if r["ppl"] == best[(r["dataset"], bits_label(r))] and r["method"] != "full precision" else ""
        lines.append((r["dataset"], bits_label(r), r["method"], r["weights"], f"{r['ppl']:.3f}{mark}"))
    return _under_header(lines)


def task_table(rows: list[dict[str, Any]]) -> str:
    """Zero-shot figures as a plain text table, each with its standard error."""
    lines = [("task", "bits", "method", "weights", "metric", "value", "items")]
    for r in (r for r in rows if "task" in r):
        value = f"{r['value']:.4f}" + (f" ± {r['stderr']:.4f}" if r["stderr"] is not None else "")
        lines.append((r["task"], bits_label(r), r["method"], r["weights"], r["metric"], value, str(r["n"])))
    return _under_header(lines)


def _under_header(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines under a header line as aligned columns; nothing if there is only the header."""
    return "\n".join(aligned(lines)) if len(lines) > 1 else ""
