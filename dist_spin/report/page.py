"""A report as one HTML page without scripts or addresses to load, and as Markdown."""

import importlib.resources
import shlex
from typing import Any

import jinja2
from markupsafe import Markup

from dist_spin.report.facts import Facts
from dist_spin.report.figures import drawings
from dist_spin.report.style import NAMES, Drawing, as_svg, short
from dist_spin.report.tables import Table, outlier_table, result_tables, stage_table
from dist_spin.runtime.progress import clock
from dist_spin.version import __version__

# section -> heading and what its figures show.
SECTIONS = {
    "learning": (
        "Learning",
        "The rotations R1 and R2 are learned by gradient steps on the group of orthogonal matrices.",
    ),
    "seeds": (
        "Random rotations",
        "How much the perplexity of random rotations varies, and where the learned one stands.",
    ),
    "peak": ("Peak over RMS", "How far the largest channel of a token stands out; what a 4-bit grid has to span."),
    "kurtosis": ("Kurtosis", "How heavy the tails of a token are; 3 for a Gaussian, which rotation approaches."),
    "channels": ("Magnitude by channel", "The largest magnitude of each channel, in every layer."),
    "surface": (
        "Magnitude by token and channel",
        "The layer with the highest peak at each site, before and after rotation.",
    ),
    "surfaces": ("The same for every layer", "Tokens downwards, channels across, one pair of maps for each layer."),
    "rounding": (
        "Rounding error of each layer",
        "Relative error of each linear layer's output on the calibration text.",
    ),
}


def html_page(facts: Facts) -> str:
    """The whole page."""
    return _template("report.html.jinja", autoescape=True).render(**_content(facts), draw=_svg)


def markdown_page(facts: Facts) -> str:
    """Tables, captions and how to reproduce the run; the figures are in the page and in `dist-spin plot`."""
    return _template("report.md.jinja", autoescape=False).render(**_content(facts), table=_markdown_table)


def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = importlib.resources.files("dist_spin.report").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(source)


def _content(facts: Facts) -> dict[str, Any]:
    found = drawings(facts)
    sections = [
        {"id": key, "title": title, "text": text, "figures": [d for d in found if d.section == key]}
        for key, (title, text) in SECTIONS.items()
    ]
    results = result_tables(facts)
    return {
        "facts": facts,
        "headline": headline(facts),
        "progress": progress(facts),
        "results": results,
        "sections": [section for section in sections if section["figures"]],
        "outliers": outlier_table(facts, NAMES),
        "stages": stage_table(facts, clock),
        "orthogonality": {name.upper(): short(value) for name, value in facts.orthogonality.items()},
        "command": command(facts),
        "versions": facts.job.get("versions", {"dist-spin": __version__}),
        "job": facts.job,
        "commit": facts.job.get("commit"),
    }


def headline(facts: Facts) -> list[tuple[str, str]]:
    """Model, bits and rotations in a line each."""
    config = facts.config
    if not config:
        return []
    q, optimize, quantize = config["quant"], config["optimize"], config["quantize"]
    kv = f"KV{q['k_bits']}" if q["k_bits"] == q["v_bits"] else f"K{q['k_bits']}V{q['v_bits']}"
    rotation = config["rotation"]
    start = rotation["load"] or f"{rotation['init']}, seed {rotation['seed']}"
    bits = f"W{q['w_bits']}A{q['a_bits']}{kv}, weights by {quantize['method']}"
    if facts.only_compared:
        compared = config["compare"]
        bits = f"{', '.join(compared['bits'])}; weights by {' and '.join(compared['weights'])}"
        bits += f"; seeds {', '.join(map(str, compared['seeds']))}"
    return [
        ("Model", f"{config['model']['path']} ({config['model']['dtype']})"),
        ("Bits", bits),
        ("Rotations", f"R1, R2{', online R3, R4' if rotation['online'] else ''}; start: {start}"),
        (
            "Learning",
            f"{optimize['steps']} steps of {optimize['batch_size']} × {optimize['seq_len']} tokens, {optimize['source']}",
        ),
        ("Calibration", f"{quantize['n_sequences']} × {quantize['seq_len']} tokens, {quantize['source']}"),
    ]


def progress(facts: Facts) -> str:
    """Where the run stands, in one line."""
    if facts.only_compared:
        rows = len(facts.of_stage("compare"))
        return (
            f"comparison: {rows} of {facts.planned_rows} rows" if rows < facts.planned_rows else "comparison complete"
        )
    if not facts.metrics and not facts.learned:
        return "not begun"
    if not facts.learned:
        return f"learning: step {facts.metrics[-1]['step']} of {facts.steps}"
    return "complete" if not facts.missing else "rotations learned; parts of the report are still missing"


def command(facts: Facts) -> str:
    """What repeats the run with the configuration that the report holds, a line for each verb."""
    verbs = ["run"] * (not facts.only_compared) + ["compare"] * (facts.only_compared or facts.planned_rows > 0)
    return "\n".join(f"dist-spin {verb} {shlex.quote(f'{facts.name}.yaml')}" for verb in verbs)


def _svg(drawing: Drawing) -> Markup:
    # Drawn by matplotlib from our own titles and numbers, which it escapes.
    return Markup(as_svg(drawing.draw, drawing.words))


def _markdown_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---"] * table.left + ["---:"] * (len(table.heads) - table.left)
    rows = [[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in table.rows]
    return "\n".join([line(table.heads), line(rule), *map(line, rows)])
