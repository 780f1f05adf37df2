"""Results as plain text tables."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from dist_spin.runtime.text_table import aligned
from dist_spin.storage.results import bits_label

Key = tuple[Any, ...]


def system_key(row: dict[str, Any]) -> Key:
    """What decides a line of the table."""
    return row["system"], row["clips"], row["weights"]


def row_key(row: dict[str, Any]) -> Key:
    """What tells one row of a comparison from all others."""
    return *system_key(row), bits_label(row), row["seed"], row["dataset"]


def spread(values: list[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one value) and how many."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """A table for each text; the best mean of each column of bits is marked with *, full precision apart."""
    return "\n\n".join(_table(name, [r for r in rows if r["dataset"] == name]) for name in _unique(rows, "dataset"))


def _unique(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _table(dataset: str, rows: list[dict[str, Any]]) -> str:
    cells: dict[Key, dict[str, list[float]]] = {}
    title = f"{dataset}: perplexity, {rows[0]['tokens']} tokens in windows of {rows[0]['seq_len']}"
    for row in rows:
        if row["system"] == "full precision":
            title += f"; full precision {row['ppl']:.3f}"
        else:
            cells.setdefault(system_key(row), {}).setdefault(bits_label(row), []).append(row["ppl"])
    # A rounding of 16-bit weights is none: such figures stand in lines of their own.
    columns = list(dict.fromkeys(bits for found in cells.values() for bits in found))
    best = {bits: min(spread(found[bits])[0] for found in cells.values() if bits in found) for bits in columns}
    lines = [["method", "weights", *columns]]
    for (system, clips, weights), found in cells.items():
        name = system if clips == "none" else f"{system}, clipped" if clips == "quarot" else f"{system}, {clips}"
        lines.append([name, weights, *(_figure(found.get(bits), best[bits]) for bits in columns)])
    return "\n".join([title, *aligned(lines)])


def _figure(values: list[float] | None, best: float) -> str:
    if values is None:
        return "-"
    mean, deviation, n = spread(values)
    digits = 3 if mean < 1000 else 0
    text = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f} ({n})" if n > 1 else "")
    return text + (" *" if math.isclose(mean, best) else "")


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
    return "\n".join(aligned(lines)) if len(lines) > 1 else ""
