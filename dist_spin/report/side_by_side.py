"""Several runs side by side, a column each: how they stand, the settings that differ, results, time and memory."""

import os
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from dist_spin.config.run import LOCATION
from dist_spin.report.run_summary import RunSummary, stages
from dist_spin.report.sentence import PREFERRED, numbers
from dist_spin.report.style import BLUE, GREEN, PURPLE, VERMILLION, Drawing, legend, one_axes, short, whole_numbers
from dist_spin.report.tables import CLOSENESS, FULL, Cell, Table, is_share, meaning, task_text
from dist_spin.runtime.progress import clock
from dist_spin.storage.results import bits_label, measured_fidelity, system_label, without_blocks

COLOURS, LINES, MARKERS = (GREEN, BLUE, VERMILLION, PURPLE), ("-", "--", "-.", ":"), ("o", "s", "x", "^")
NOTHING = "–"
Row = tuple[str, str, str, str]  # text or task and metric, bits, method, weights


def run_names(summaries: list[RunSummary]) -> list[str]:
    """A name for each run: its own, with the directories above it where several have the same."""
    names = [summary.name for summary in summaries]
    again = Counter(names)
    return [name if again[name] == 1 else str(s.run.path) for name, s in zip(names, summaries, strict=True)]


def tables_side_by_side(summaries: list[RunSummary], states: list[str]) -> list[Table]:
    """Every table that has a row. states: where each run stands."""
    made = [_standing(summaries, states), _results(summaries), _fidelity(summaries)]
    made += [_settings(summaries), _times(summaries)]
    return [table for table in made if table.rows]


def sentence_side_by_side(summaries: list[RunSummary]) -> str:
    """Which run has the lowest perplexity among those that were measured alike."""
    lines = _measurements(summaries)
    shared = {
        row: by_run for row, by_run in lines.items() if row[2] != FULL and len(by_run) > 1 and not is_share(row[0])
    }
    texts = [row for row in shared if row[0].startswith(PREFERRED)] or list(shared)
    methods = ("learned rotation", "ours", "given rotation")
    learned = [row for row in texts if without_blocks(row[2]) in methods] or texts
    if not learned:
        return f"{len(summaries)} runs; no quantised model is measured alike in two of them."
    row = min(learned, key=lambda row: min(shared[row].values()))
    (best, lowest), (second, next_one) = sorted(shared[row].items(), key=lambda item: item[1])[:2]
    names = run_names(summaries)
    text, bits, method, _ = row
    if lowest == next_one:
        same = numbers(lowest, lowest)[0]
        return f"{names[best]} and {names[second]} have the same perplexity on {text} ({bits}, {method}): {same}."
    ours, theirs = numbers(lowest, next_one)
    of = f"Of {len(shared[row])} runs, " if len(shared[row]) > 2 else ""
    if len(shared[row]) < sum(bool(summary.rows) for summary in summaries):  # no figure of the others compares
        of = f"Of the {len(shared[row])} runs that are measured alike, "
    said = f"{of}{names[best]} has the lowest perplexity on {text} ({bits}, {method}): {ours}"
    return f"{said}, against {theirs} of {names[second]}."


def _table(summaries: list[RunSummary], title: str, heads: list[str], note: str = "") -> Table:
    return Table(title, [*heads, *run_names(summaries)], len(heads), note=note)


def _standing(summaries: list[RunSummary], states: list[str]) -> Table:
    table = _table(summaries, "Where they stand", [""])
    table.add("state", *states)
    last = [summary.metrics[-1] if summary.metrics else None for summary in summaries]
    if any(last):
        table.add("loss at the last step, nats", *(f"{x['loss']:.4f}" if x else NOTHING for x in last))
    jobs = [summary.job for summary in summaries]
    table.add("last worked on by", *(f"{j['ranks']} × {', '.join(j['devices'])}" if j else NOTHING for j in jobs))
    return table


def _settings(summaries: list[RunSummary]) -> Table:
    """The settings that are not the same in all runs."""
    table = _table(
        summaries, "Settings that differ", ["setting"], "Every other setting is the same in all runs that read it."
    )
    flat = [dict(_flattened({k: v for k, v in s.config.items() if k not in _unused(s)})) for s in summaries]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        if key not in LOCATION and len({settings[key] for settings in flat if key in settings}) > 1:
            table.add(key, *(settings.get(key, NOTHING) for settings in flat))
    if not table.rows:
        table.note = ""
    return table


def _unused(summary: RunSummary) -> tuple[str, ...]:
    """Groups of settings that the run has not read."""
    return () if summary.planned_rows or summary.of_stage("compare") else ("compare", "methods")


def _flattened(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out = []
    for key, value in config.items():
        if isinstance(value, dict):
            out += _flattened(value, f"{prefix}{key}.")
        else:
            text = f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
            out.append((prefix + key, "null" if value is None else text))
    return out


def _measurements(summaries: list[RunSummary], figure: str = "ppl") -> dict[Row, dict[int, float]]:
    """Row -> run (by number) -> a figure of each text, or that of a task, a mean where a comparison has several seeds.

    Texts that were read in windows of another length or up to another token do not compare, and stand in rows of their own.
    """
    values: dict[tuple[Row, tuple[int, int]], dict[int, list[float]]] = {}
    for number, summary in enumerate(summaries):
        for row in (r for r in summary.rows if figure in r or (figure == "ppl" and "task" in r)):
            method = system_label(row.get("system", row["method"]), row.get("clips", "none"))
            text = row["dataset"] if "ppl" in row else f"{row['task']} {row['metric']}"
            windows = (row["seq_len"], row["tokens"]) if "ppl" in row else (0, row["n"])
            key = ((text, bits_label(row), method, row["weights"]), windows)
            values.setdefault(key, {}).setdefault(number, []).append(row[figure if "ppl" in row else "value"])
    alike = {text: len({w for (row, w) in values if row[0] == text}) == 1 for (text, *_), _ in values}
    lines: dict[Row, dict[int, float]] = {}
    for ((text, *rest), (seq_len, count)), by_run in values.items():
        apart = f", {count:,} tokens in windows of {seq_len}" if seq_len else f", {count:,} items"
        bits, method, weights = rest
        line = (text if alike[text] else text + apart, bits, method, weights)
        lines[line] = {number: mean(figures) for number, figures in by_run.items()}
    return lines


def _results(summaries: list[RunSummary]) -> Table:
    note = "Perplexities (lower is better), zero-shot accuracies in percent; bold: best run of the row."
    table = _table(summaries, "Results", ["measured on", "method"], note)
    for row, by_run in _measurements(summaries).items():
        share = is_share(row[0].partition(",")[0])
        best = (max if share else min)(by_run.values())
        bold = len(set(by_run.values())) > 1 and row[2] != FULL
        task = " " in row[0].partition(",")[0]
        cells = []
        for number in range(len(summaries)):
            value = by_run.get(number)
            shown = NOTHING if value is None else task_text(row[0], {"value": value}) if task else f"{value:.3f}"
            cells.append(Cell(shown, bold and value == best))
        text, bits, method, weights = row
        table.add(text, ", ".join([method, bits, *([weights] if weights != "none" else [])]), *cells)
    return table


def _fidelity(summaries: list[RunSummary]) -> Table:
    figures = measured_fidelity(row for summary in summaries for row in summary.rows)
    table = _table(summaries, CLOSENESS, ["measured on", "method"], f"{meaning(figures)} Bold: best run of the row.")
    for figure in figures:
        for (text, bits, method, weights), by_run in _measurements(summaries, figure.name).items():
            best = figure.best(by_run.values()) if len(set(by_run.values())) > 1 else None
            values = [by_run.get(number) for number in range(len(summaries))]
            cells = [Cell(NOTHING) if v is None else Cell(figure.text(v), v == best) for v in values]
            named = ", ".join([method, bits, *([weights] if weights != "none" else [])])
            table.add(f"{text}: {figure.head}", named, *cells)
    return table


def _times(summaries: list[RunSummary]) -> Table:
    note = "Time of all starts and jobs together; peak memory of the process that used most, on the host and on a GPU."
    table = _table(summaries, "Time and memory", ["stage"], note)
    by_stage = [{row["stage"]: row for row in stages(summary)} for summary in summaries]
    for stage in dict.fromkeys(stage for rows in by_stage for stage in rows):
        table.add(stage, *(_time(rows[stage]) if stage in rows else NOTHING for rows in by_stage))
    return table


def _time(row: dict[str, Any]) -> str:
    gpu = f", GPU {row['gpu'] / 2**30:.1f} GiB" if row["gpu"] else ""
    return f"{clock(row['seconds'])}, {row['host'] / 2**30:.1f} GiB{gpu}"


def losses(summaries: list[RunSummary]) -> Drawing | None:
    """The training loss of every run by step."""
    curves = [(name, s.metrics) for name, s in zip(run_names(summaries), summaries, strict=True) if s.metrics]
    if len(curves) < 2:
        return None

    def draw() -> Figure:
        figure, axes = one_axes()
        for number, (name, lines) in enumerate(curves):
            style: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": LINES[(number + number // len(COLOURS)) % len(LINES)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            every = (0, max(1, len(lines) // 8))
            axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], **style, markevery=every, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats")
        whole_numbers(axes)
        legend(figure, axes, columns=2)
        return figure

    ends = "; ".join(f"{name}: {short(lines[-1]['loss'])} at step {lines[-1]['step']}" for name, lines in curves)
    return Drawing("losses", "learning", "Loss", f"Training loss by step, in nats. {ends}.", draw)


def links(summaries: list[RunSummary], page: Path) -> list[tuple[str, str]]:
    """(name, address) of the report of each run that has one, as seen from the file `page`."""
    found = zip(run_names(summaries), (s.run.path / "report.html" for s in summaries), strict=True)
    return [(name, os.path.relpath(report, page.parent)) for name, report in found if report.exists()]
