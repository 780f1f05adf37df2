"""Measured rows as plain text tables: what `evaluate` and `compare` print when they are done."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from dist_spin.runtime.text_table import aligned
from dist_spin.storage.results import PERPLEXITY, Figure, bits_label, measured_fidelity, system_label


def system_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """System, clips and rounding of the weights of a row: each combination has a line of the comparison's table."""
    return row["system"], row["clips"], row["weights"]


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one row of a comparison from all others: its system, bits, seed and text."""
    return *system_of(row), bits_label(row), row["seed"], row["dataset"]


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Tables for each text, of perplexity and fidelity; the best mean of each column is marked with *, full precision apart."""
    tables = []
    for name in _unique(rows, "dataset"):
        here = [row for row in rows if row["dataset"] == name]
        tables += [_table(name, figure, here) for figure in (PERPLEXITY, *measured_fidelity(here))]
    return "\n\n".join(tables)


def _unique(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _table(dataset: str, figure: Figure, rows: list[dict[str, Any]]) -> str:
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}  # system -> bits -> one for each seed
    title = f"{dataset}: {figure.title}"
    if figure is PERPLEXITY:
        title += f", {rows[0]['tokens']} tokens in windows of {rows[0]['seq_len']}"
        title += "".join(f"; full precision {r['ppl']:.3f}" for r in rows if r["system"] == "full precision")
    for row in rows:
        if row["system"] != "full precision" and figure.name in row:
            values.setdefault(system_of(row), {}).setdefault(bits_label(row), []).append(row[figure.name])
    # A rounding of 16-bit weights is none: such figures stand in lines of their own.
    all_bits = list(dict.fromkeys(bits for by_bits in values.values() for bits in by_bits))
    best = {
        bits: figure.best(fmean(by_bits[bits]) for by_bits in values.values() if bits in by_bits) for bits in all_bits
    }
    lines = [["method", "weights", *all_bits]]
    for (system, clips, weights), by_bits in values.items():
        cells = [_entry(figure, by_bits.get(bits), best[bits]) for bits in all_bits]
        lines.append([system_label(system, clips), weights, *cells])
    return "\n".join([title, *aligned(lines)])


def _entry(figure: Figure, values: list[float] | None, best: float) -> str:
    if values is None:
        return "-"
    return figure.spread(values) + (" *" if math.isclose(fmean(values), best) else "")


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    """Perplexities as a plain text table, the best quantised one of each bit width and source marked with *."""
    rows = [r for r in rows if "ppl" in r]
    best: dict[tuple[str, str], float] = {}
    for r in rows:
        text_and_bits = (r["dataset"], bits_label(r))
        best[text_and_bits] = min(best.get(text_and_bits, math.inf), r["ppl"])
    fidelity = measured_fidelity(rows)
    lines: list[tuple[str, ...]] = [
        ("text", "bits", "method", "weights", "perplexity", *(figure.head for figure in fidelity))
    ]
    for r in rows:
        mark = " *" if r["ppl"] == best[(r["dataset"], bits_label(r))] and r["method"] != "full precision" else ""
        figures = [f"{r['ppl']:.3f}{mark}", *(f.text(r[f.name]) if f.name in r else "-" for f in fidelity)]
        lines.append((r["dataset"], bits_label(r), r["method"], r["weights"], *figures))
    return _under_header(lines)


def task_table(rows: list[dict[str, Any]]) -> str:
    """Zero-shot figures as a plain text table, each with its standard error."""
    lines = [("task", "bits", "method", "weights", "metric", "value", "items")]
    for r in (r for r in rows if "task" in r):
        value = f"{r['value']:.4f}" + (f" ± {r['stderr']:.4f}" if r["stderr"] is not None else "")
        lines.append((r["task"], bits_label(r), r["method"], r["weights"], r["metric"], value, str(r["n"])))
    return _under_header(lines)


def prompt_table(rows: list[dict[str, Any]]) -> str:
    """Agreement of greedy continuations with full precision as a plain text table."""
    lines = [("prompts", "bits", "method", "weights", "tokens before the first other one", "equal, %", "number")]
    for r in (r for r in rows if "prompts" in r):
        figures = f"{r['greedy_first']:.1f} of {r['prompt_tokens']}", f"{100 * r['greedy_equal']:.1f}", str(r["n"])
        lines.append((r["prompts"], bits_label(r), r["method"], r["weights"], *figures))
    return _under_header(lines)


def _under_header(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines under a header line as aligned columns; nothing if there is only the header."""
    return "\n".join(aligned(lines)) if len(lines) > 1 else ""
