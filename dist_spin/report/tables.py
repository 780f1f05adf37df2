"""The tables of a report: perplexities beside published ones, comparisons, zero-shot tasks, outliers, time and memory.

A table holds text and which entries are the best of their kind; `report.page` writes it as HTML or Markdown.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from dist_spin.report.published import known_model, published, published_rows
from dist_spin.report.run_summary import RunSummary, extremes, stages
from dist_spin.storage.results import PERPLEXITY, Figure, bits_label, measured_fidelity, system_label

PUBLISHED_BITS = {"W4A4KV4", "W16A16KV16"}
FULL = "full precision"
CLOSENESS = "Closeness to full precision"


@dataclass
class Cell:
    """One entry. best: the best of what it is compared with."""

    text: str
    best: bool = False


@dataclass
class Table:
    """heads: names of the columns. left: how many of them are text; the others are numbers. note: below the table."""

    title: str
    heads: list[str]
    left: int
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    def add(self, *entries: Cell | str) -> None:
        """One more row."""
        self.rows.append([entry if isinstance(entry, Cell) else Cell(entry) for entry in entries])


def result_tables(summary: RunSummary) -> list[Table]:
    """What was measured: perplexities of this run, the comparison of systems, zero-shot tasks, and what was published."""
    tables = [_perplexities(summary), _fidelity(summary), *_comparisons(summary), _prompts(summary), _tasks(summary)]
    model = model_of(summary)
    made = [table for table in tables if table is not None]
    return [*made, _published(model)] if model and made else made


def model_of(summary: RunSummary) -> str | None:
    """The model of the published tables that the run is about, if it is one of them."""
    return known_model(str(summary.config.get("model", {}).get("path", "")))


def _perplexities(summary: RunSummary) -> Table | None:
    rows = [row for row in summary.of_stage("evaluate") if "ppl" in row]
    if not rows:
        return None
    texts = list(dict.fromkeys(row["dataset"] for row in rows))
    model = model_of(summary) if any(map(_as_published, rows)) else None
    online = summary.config.get("rotation", {}).get("online", True)
    heads = ["bits", "method", "weights", *texts] + (["published, wikitext2"] if model else [])
    table = Table("Perplexity", heads, 3, note=f"{_windows(rows)} Lower is better; bold: best of its bits.")
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((bits_label(row), row["method"], row["weights"]), {})[row["dataset"]] = row["ppl"]
    lowest = _best(((bits, text), v) for (bits, how, _), of in lines.items() if how != FULL for text, v in of.items())
    for (bits, method, weights), values in lines.items():
        cells = []
        for text in texts:
            value = values.get(text)
            best = method != FULL and value is not None and value == lowest[(bits, text)]
            cells.append(Cell("–" if value is None else f"{value:.3f}", best))
        same = bits in PUBLISHED_BITS and (online or method == FULL)
        theirs = published(model, method, weights) if same else None
        table.add(bits, method, weights, *cells, *([_number(theirs)] if model else []))
    return table


def _fidelity(summary: RunSummary) -> Table | None:
    """How close each variant stays to full precision, three columns for each text."""
    rows = [row for row in summary.of_stage("evaluate") if "ppl" in row]
    figures = measured_fidelity(rows)
    if not figures:
        return None
    compared = [row for row in rows if any(figure.name in row for figure in figures)]
    columns = [(text, figure) for text in dict.fromkeys(row["dataset"] for row in compared) for figure in figures]
    heads = ["bits", "method", "weights", *(f"{text}: {figure.head}" for text, figure in columns)]
    table = Table(CLOSENESS, heads, 3, note=meaning(figures))
    lines: dict[tuple[str, str, str], dict[tuple[str, str], float]] = {}
    for row in compared:
        line = lines.setdefault((bits_label(row), row["method"], row["weights"]), {})
        line |= {(row["dataset"], figure.name): row[figure.name] for figure in figures if figure.name in row}
    for (bits, method, weights), values in lines.items():
        found = [(figure, values.get((text, figure.name))) for text, figure in columns]
        table.add(bits, method, weights, *("–" if value is None else figure.text(value) for figure, value in found))
    return table


def meaning(figures: Iterable[Figure]) -> str:
    """What figures are, for a note below their table."""
    return "; ".join(f"{figure.head}: {figure.title}" for figure in figures) + "."


def _as_published(row: dict[str, Any]) -> bool:
    """Whether a row was measured on the text and with the windows of the published tables."""
    return row["dataset"] == "wikitext2" and row["seq_len"] == 2048


def _windows(rows: list[dict[str, Any]]) -> str:
    lengths = sorted({(row["dataset"], row["seq_len"], row["tokens"]) for row in rows})
    return "; ".join(f"{text}: {tokens:,} tokens in windows of {length}" for text, length, tokens in lengths) + "."


def _comparisons(summary: RunSummary) -> list[Table]:
    """One table for each text, and one more where weights stay at 16 bits."""
    rows = [row for row in summary.rows if "system" in row and "ppl" in row]
    tables = []
    for text in dict.fromkeys(row["dataset"] for row in rows):
        here = [row for row in rows if row["dataset"] == text]
        full = [row for row in here if row["system"] == FULL]
        for rounded, what in ((True, "Comparison"), (False, "16-bit weights")):
            compared = [row for row in here if row["system"] != FULL and (row["w_bits"] < 16) == rounded]
            for figure in (PERPLEXITY, *measured_fidelity(compared)) if compared else ():
                title = f"{what} on {text}, {figure.title}"
                tables.append(_comparison(summary, title, figure, compared, full))
    return tables


def _comparison(
    summary: RunSummary, title: str, figure: Figure, rows: list[dict[str, Any]], full: list[dict[str, Any]]
) -> Table:
    """Systems by bits, mean and sample standard deviation over seeds."""
    rows = [row for row in rows if figure.name in row]
    columns = list(dict.fromkeys(map(bits_label, rows)))
    comparable = figure is PERPLEXITY and _as_published(rows[0]) and "W4A4KV4" in columns
    model = model_of(summary) if comparable else None
    heads = ["system", "weights", *columns] + (["published W4A4KV4"] if model else [])
    table = Table(title, heads, 2)
    measured: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        key = (row["system"], row.get("clips", "none"), row["weights"])
        measured.setdefault(key, {}).setdefault(bits_label(row), []).append(row[figure.name])
    best = {
        bits: figure.best(mean(by_bits[bits]) for by_bits in measured.values() if bits in by_bits) for bits in columns
    }
    for (system, clips, weights), by_bits in measured.items():
        entries = [
            Cell(_spread(figure, by_bits[bits]), mean(by_bits[bits]) == best[bits]) if bits in by_bits else Cell("–")
            for bits in columns
        ]
        theirs = published(model, system, weights)
        table.add(system_label(system, clips), weights, *entries, *([_number(theirs)] if model else []))
    better = "More" if figure.more_is_better else "Lower"
    table.note = (
        f"{_windows(rows)} {better} is better; bold: best of the column; ±: sample standard deviation over n seeds."
    )
    if full and figure is PERPLEXITY:
        theirs = published(model_of(summary) if _as_published(full[0]) else None, FULL, "none")
        table.note += f" Full precision: {full[0]['ppl']:.3f}" + (f" (published: {theirs:.2f})." if theirs else ".")
    return table


def _spread(figure: Figure, values: list[float]) -> str:
    if figure is not PERPLEXITY:
        return figure.spread(values).replace("(", "(n=")
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {stdev(values):.3f} (n={len(values)})"


def _prompts(summary: RunSummary) -> Table | None:
    """Agreement of greedy continuations with those of full precision."""
    rows = [row for row in summary.rows if "prompts" in row]
    if not rows:
        return None
    heads = ["prompts", "bits", "method", "weights", "tokens before the first difference", "equal, %"]
    table = Table("Greedy continuations against full precision", heads, 4)
    counts = {row["prompts"]: (row["n"], row["prompt_tokens"]) for row in rows}
    table.note = "; ".join(f"{name}: {n} prompts, {tokens} tokens each" for name, (n, tokens) in counts.items())
    table.note += ". Means over prompts; equal: share of positions with the same token."
    for row in rows:
        figures = f"{row['greedy_first']:.1f}", f"{100 * row['greedy_equal']:.1f}"
        table.add(row["prompts"], bits_label(row), row["method"], row["weights"], *figures)
    return table


def _tasks(summary: RunSummary) -> Table | None:
    """Zero-shot tasks, one column each, accuracies in percent with their standard errors."""
    rows = [row for row in summary.rows if "task" in row]
    if not rows:
        return None
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (bits_label(row), row.get("system", row["method"]), row["weights"])
        lines.setdefault(key, {})[f"{row['task']} {row['metric']}"] = row
    columns = list(dict.fromkeys(name for of in lines.values() for name in of))
    shares = one_accuracy_each(columns)
    counts = ", ".join(f"{task} {n}" for task, n in {row["task"]: row["n"] for row in rows if "n" in row}.items())
    table = Table("Zero-shot tasks", ["bits", "method", "weights", *columns, "mean accuracy"], 3)
    table.note = "Accuracies in percent ± standard error; bold: best of its bits." + (
        f" Items: {counts}." * bool(counts)
    )
    best = _best(
        ((bits, name), _badness(name, row["value"]))
        for (bits, how, _), of in lines.items()
        if how != FULL
        for name, row in of.items()
    )
    for (bits, method, weights), of in lines.items():
        cells = [
            Cell(task_text(name, of[name]), method != FULL and _badness(name, of[name]["value"]) == best[(bits, name)])
            if name in of
            else Cell("–")
            for name in columns
        ]
        whole = bool(shares) and all(name in of for name in shares)
        average = f"{100 * mean(of[name]['value'] for name in shares):.2f}" if whole else "–"
        table.add(bits, method, weights, *cells, average)
    return table


def one_accuracy_each(columns: list[str]) -> list[str]:
    """The column of each task that enters the mean: its plain accuracy, or the first fraction that it has."""
    column_of_task: dict[str, str] = {}
    for name in filter(is_share, columns):
        task, _, metric = name.rpartition(" ")
        if metric == "acc" or task not in column_of_task:
            column_of_task[task] = name
    return list(column_of_task.values())


def is_share(name: str) -> bool:
    """Whether "TASK METRIC" is a fraction of items, of which more is better; others are perplexities."""
    metric = name.rpartition(" ")[2]
    return "acc" in metric or "match" in metric


def _badness(name: str, value: float) -> float:
    return -value if is_share(name) else value


def task_text(name: str, row: dict[str, Any]) -> str:
    """The figure of a task, with its standard error where that is known; fractions in percent."""
    scale, error = (100 if is_share(name) else 1), row.get("stderr")
    if not isinstance(error, int | float) or not math.isfinite(error):
        return f"{row['value'] * scale:.2f}"
    return f"{row['value'] * scale:.2f} ± {error * scale:.2f}"


def _published(model: str) -> Table:
    table = Table(f"Published for {model}", ["system", "weights", "perplexity"], 2)
    table.note = "WikiText-2, windows of 2048 tokens, W4A4KV4, as their authors report it; bold: best quantised."
    rows = published_rows(model)
    lowest = min(value for system, _, value in rows if system != FULL)
    for system, weights, value in rows:
        table.add(system, weights, Cell(f"{value:.2f}", value == lowest and system != FULL))
    return table


def outlier_table(summary: RunSummary, names: dict[str, str]) -> Table | None:
    """Peak/RMS and kurtosis of tokens at every site, per rotation."""
    rows = extremes(summary)
    if not rows:
        return None
    heads = ["site", "rotation", "peak/RMS, mean", "largest", "in layer", "kurtosis, mean", "largest", "in layer"]
    table = Table("Outliers at each site", heads, 2)
    table.note = "Mean over layers and tokens, and the worst token of any layer. A Gaussian has kurtosis 3."
    for row in rows:
        numbers = [f"{row['peak_mean']:.2f}", f"{row['peak']:.1f}", str(row["peak_layer"])]
        numbers += [f"{row['kurtosis_mean']:.2f}", f"{row['kurtosis']:.1f}", str(row["kurtosis_layer"])]
        table.add(row["site"], names.get(row["variant"], row["variant"]), *numbers)
    return table


def stage_table(summary: RunSummary, clock: Callable[[float], str]) -> Table | None:
    """Time and memory of the stages."""
    rows = stages(summary)
    if not rows:
        return None
    heads = ["stage", "devices", "ranks", "starts", "time", "peak host memory", "peak GPU memory"]
    table = Table("Time and memory", heads, 2)
    table.note = "Time of all starts and jobs together; memory of the process that used most."
    for row in rows:
        gpu = f"{row['gpu'] / 2**30:.1f} GiB" if row["gpu"] else "–"
        table.add(
            row["stage"],
            row["devices"] or "–",
            str(row["ranks"] or "–"),
            str(row["starts"]),
            clock(row["seconds"]),
            f"{row['host'] / 2**30:.1f} GiB",
            gpu,
        )
    return table


def _best(entries: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """The lowest value of each key."""
    lowest: dict[Any, float] = {}
    for key, value in entries:
        lowest[key] = min(value, lowest.get(key, math.inf))
    return lowest


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
