"""A report as one HTML page without scripts or addresses to load, and as Markdown."""

import dataclasses
import functools
import importlib.resources
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dist_spin.model.rotation import Blocks
from dist_spin.report.experts import expert_table
from dist_spin.report.figures import drawings
from dist_spin.report.run_summary import RunSummary, stages
from dist_spin.report.sentence import sentence
from dist_spin.report.side_by_side import links, losses, run_names, sentence_side_by_side, tables_side_by_side
from dist_spin.report.style import NAMES, Drawing, as_svg, short
from dist_spin.report.tables import Table, outlier_table, result_tables, stage_table
from dist_spin.runtime.progress import clock
from dist_spin.storage.results import bits_label
from dist_spin.version import __version__


@dataclass(frozen=True)
class Section:
    """A part of the page. text: what its figures show. open: whether it is unfolded when the page is opened."""

    title: str
    text: str
    open: bool = False


SECTIONS = {
    "surface": Section(
        "Activations before and after rotation",
        "Magnitude by token and channel, both on one scale; at each site the layer with the highest peak before rotation.",
        open=True,
    ),
    "seeds": Section(
        "Random rotations",
        "How much the perplexity of random rotations varies, and where the learned one stands.",
        open=True,
    ),
    "learning": Section(
        "Learning",
        "The rotations R1 and R2 are learned by gradient steps on the group of orthogonal matrices.",
        open=True,
    ),
    "peak": Section(
        "Peak over RMS", "How far the largest channel of a token stands out; what a 4-bit grid has to span."
    ),
    "kurtosis": Section("Kurtosis", "How heavy the tails of a token are; 3 for a Gaussian, which rotation approaches."),
    "channels": Section("Magnitude by channel", "The largest magnitude of each channel, in every layer."),
    "surfaces": Section(
        "Every layer by token and channel", "Tokens downwards, channels across, one pair of maps for each layer."
    ),
    "rounding": Section(
        "Rounding error of each layer", "Relative error of each linear layer's output on the calibration text."
    ),
}


def html_page(summary: RunSummary) -> str:
    """The whole page."""
    return template("report.html.jinja", autoescape=True).render(**_content(summary), draw=svg)


def markdown_page(summary: RunSummary) -> str:
    """Tables, captions and how to reproduce the run; the figures are in the page and in `dist-spin plot`."""
    return template("report.md.jinja", autoescape=False).render(**_content(summary), table=markdown_table)


def runs_pages(summaries: list[RunSummary], page: Path) -> tuple[str, str]:
    """Several runs side by side, as HTML and as Markdown. page: where the HTML will lie, which links count from."""
    figure = losses(summaries)
    content = {
        "names": run_names(summaries),
        "sentence": sentence_side_by_side(summaries),
        "tables": tables_side_by_side(summaries, [progress(summary) for summary in summaries]),
        "links": links(summaries, page),
        "figures": [] if figure is None else [figure],
    }
    html = template("runs.html.jinja", autoescape=True).render(**content, draw=svg)
    return html, template("runs.md.jinja", autoescape=False).render(**content, table=markdown_table)


@functools.cache
def template(name: str, *, autoescape: bool) -> jinja2.Template:
    """One of the templates beside this file; what they import or extend is looked for there too."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _source(name: str) -> str:
    return importlib.resources.files("dist_spin.report").joinpath(name).read_text(encoding="utf-8")


def _content(summary: RunSummary) -> dict[str, Any]:
    figures = drawings(summary)
    sections = [
        {"id": key, **dataclasses.asdict(section), "figures": [d for d in figures if d.section == key]}
        for key, section in SECTIONS.items()
    ]
    results, experts = result_tables(summary), expert_table(summary)
    settings = headline(summary)
    times = stages(summary)
    return {
        "summary": summary,
        "sentence": sentence(summary),
        "headline": settings,
        "settings_line": "; ".join(text for _, text in settings[:2]),
        "progress": progress(summary),
        "results": results if experts is None else [*results, experts],
        "sections": [section for section in sections if section["figures"]],
        "outliers": outlier_table(summary, NAMES),
        "stages": stage_table(summary, clock),
        "all_stages": f"{clock(sum(row['seconds'] for row in times))} in all",
        "orthogonality": {
            name.upper(): short(value)
            for name, value in summary.orthogonality.items()
            if name != "r1" or _has_r1(summary.config)
        },
        "command": command(summary),
        "versions": summary.job.get("versions", {"dist-spin": __version__}),
        "job": summary.job,
        "commit": summary.job.get("commit"),
    }


def _has_r1(config: dict[str, Any]) -> bool:
    """Whether a run's settings, which may be missing or older than `rotation.r1`, rotate by R1."""
    return bool(config.get("rotation", {}).get("r1", True))


def headline(summary: RunSummary) -> list[tuple[str, str]]:
    """Model, bits and rotations in a line each."""
    config = summary.config
    if not config:
        return []
    q, optimize, quantize = config["quant"], config["optimize"], config["quantize"]
    rotation = config["rotation"]
    start = rotation["load"] or f"{rotation['init']}, seed {rotation['seed']}"
    whole = _has_r1(config)
    blocks = Blocks(rotation.get("block", 0), shared=rotation.get("block_shared", False)).label if whole else ""
    merged = "R1, R2" if whole else "R2"
    bits = f"{bits_label(q)}, weights by {quantize['method']}"
    if summary.only_compared:
        compared = config["compare"]
        bits = f"{', '.join(compared['bits'])}; weights by {' and '.join(compared['weights'])}"
        bits += f"; seeds {', '.join(map(str, compared['seeds']))}"
    return [
        ("Model", f"{config['model']['path']} ({config['model']['dtype']})"),
        ("Bits", bits),
        ("Rotations", f"{merged}{', online R3, R4' if rotation['online'] else ''}{blocks}; start: {start}"),
        (
            "Learning",
            f"{optimize['steps']} steps of {optimize['batch_size']} × {optimize['seq_len']} tokens, {optimize['source']}",
        ),
        ("Calibration", f"{quantize['n_sequences']} × {quantize['seq_len']} tokens, {quantize['source']}"),
    ]


def progress(summary: RunSummary) -> str:
    """Where the run stands, in one line."""
    if summary.only_compared:
        rows = len(summary.of_stage("compare"))
        return (
            f"comparison: {rows} of {summary.planned_rows} rows"
            if rows < summary.planned_rows
            else "comparison complete"
        )
    if not summary.metrics and not summary.learned:
        return "not begun"
    if not summary.learned:
        return f"learning: step {summary.metrics[-1]['step']} of {summary.steps}"
    return "complete" if not summary.missing else "rotations learned; parts of the report are still missing"


def command(summary: RunSummary) -> str:
    """What repeats the run with the configuration that the report holds, a line for each verb."""
    verbs = ["run"] * (not summary.only_compared) + ["compare"] * (summary.only_compared or summary.planned_rows > 0)
    return "\n".join(f"dist-spin {verb} {shlex.quote(f'{summary.name}.yaml')}" for verb in verbs)


def svg(drawing: Drawing) -> Markup:
    """A drawing as a part of a page."""
    # Drawn by matplotlib from our own titles and numbers, which it escapes.
    return Markup(as_svg(drawing.draw, drawing.caption))


def markdown_table(table: Table) -> str:
    """A table in Markdown; the best entries are bold."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---"] * table.left + ["---:"] * (len(table.heads) - table.left)
    rows = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in table.rows]
    return "\n".join([line(table.heads), line(rule), *map(line, rows)])
