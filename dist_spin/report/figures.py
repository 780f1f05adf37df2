"""The figures of a report: learning by step, rounding error by layer, perplexity over seeds; activations have their own file.

Each has a name, by which `dist-spin plot` finds it, and a caption that says in numbers what it shows, which screen readers read.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dist_spin.report import activation_figures
from dist_spin.report.run_summary import RunSummary, order
from dist_spin.report.style import (
    BLUE,
    GREEN,
    NAMES,
    PURPLE,
    Drawing,
    ink,
    legend,
    logarithmic,
    markers_every,
    one_axes,
    short,
    style_of,
    whole_numbers,
)
from dist_spin.storage.results import bits_label, without_blocks
from dist_spin.storage.run_directory import LEARNED

FEWEST_SEEDS = 3  # that make a distribution


def drawings(summary: RunSummary) -> list[Drawing]:
    """Everything that can be drawn of a run as it stands, in the order of the report."""
    return [*_learning(summary), *_rounding(summary), *_seeds(summary), *activation_figures.drawings(summary)]


# Figures of two series, R1 and R2: key in metrics.jsonl -> name, title, label of the axis, caption.
PAIRS = {
    "angle": ("turn", "Angle per step", "rms angle of a row, radians", "How far one step turns the rows of R1 and R2"),
    "alpha": ("step-size", "Step length α", "α", "The length of a Cayley step, bounded by the learning rate"),
    "orthogonality": (
        "orthogonality",
        "Orthogonality error",
        "max |RRᵀ − I|",
        "Drift from orthogonality, just before it is removed",
    ),
}


def _learning(summary: RunSummary) -> Iterator[Drawing]:
    """Loss, the figures of `PAIRS` and the gradient norm, by step."""
    lines = summary.metrics
    if not lines:
        return
    first, last = lines[0], lines[-1]
    change = f"from {first['loss']:.4f} at step {first['step']} to {last['loss']:.4f} at step {last['step']}"
    caption = f"Training loss in nats, every step on other text, {change}."
    yield Drawing("loss", "learning", "Loss", caption, _curves(lines, {"": "loss"}, "loss, nats"))
    for key, (name, title, label, text) in PAIRS.items():
        columns = {rotation: f"{key}_{rotation.lower()}" for rotation in ("R1", "R2")}
        values = {rotation: _by_step(lines, column)[1] for rotation, column in columns.items()}
        if not all(values.values()):
            continue
        changes = "; ".join(f"{rotation} from {short(y[0])} to {short(y[-1])}" for rotation, y in values.items())
        draw = _curves(lines, columns, label, limit="lr" if key == "alpha" else "")
        yield Drawing(name, "learning", title, f"{text}: {changes}.", draw)
    norms = _by_step(lines, "grad_norm")[1]
    if norms:
        caption = "Joint norm of the gradients of R1 and R2 before clipping, "
        caption += f"from {short(norms[0])} to {short(norms[-1])}."
        draw = _curves(lines, {"": "grad_norm"}, "gradient norm")
        yield Drawing("gradient-norm", "learning", "Gradient norm", caption, draw)


def _by_step(lines: list[dict[str, Any]], column: str) -> tuple[list[int], list[float]]:
    """The steps that have a figure in metrics.jsonl, and the figure."""
    points = [(line["step"], line[column]) for line in lines if column in line]
    return [step for step, _ in points], [value for _, value in points]


def _curves(
    lines: list[dict[str, Any]], columns: dict[str, str], label: str, *, limit: str = ""
) -> Callable[[], Figure]:
    """Columns of metrics.jsonl by step, named by series. limit: a column that is drawn as the others' upper limit."""

    def draw() -> Figure:
        figure, axes = one_axes()
        for number, (series, column) in enumerate(columns.items()):
            steps, values = _by_step(lines, column)
            every = markers_every(len(steps), number)
            axes.plot(steps, values, **style_of(series or LEARNED), markevery=every, label=series or None)
        if limit:
            axes.plot(*_by_step(lines, limit), color=ink(), linestyle=":", label=f"bound ({limit})")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        whole_numbers(axes)
        logarithmic(axes)
        legend(figure, axes)
        return figure

    return draw


def _rounding(summary: RunSummary) -> Iterator[Drawing]:
    if not summary.layers:
        return
    method = summary.config.get("quantize", {}).get("method", "gptq").upper()
    roles = next(iter(next(iter(summary.layers.values())).values()))
    for role in roles:
        name = role.rpartition(".")[2]

        def draw(role: str = role) -> Figure:
            figure, axes = one_axes()
            for number, variant in enumerate(order(summary.layers)):
                layers = sorted(summary.layers[variant])
                values = [summary.layers[variant][i][role]["error"] for i in layers]
                every = markers_every(len(layers), number)
                label = NAMES.get(variant, variant)
                axes.plot(layers, values, **style_of(variant), markevery=every, label=label)
            if method == "GPTQ" and LEARNED in summary.layers:
                learned = summary.layers[LEARNED]
                values = [learned[i][role]["rtn_error"] for i in sorted(learned)]
                axes.plot(sorted(learned), values, color=ink(), linewidth=0.8, alpha=0.7, label="learned, RTN instead")
            axes.set_xlabel("layer")
            axes.set_ylabel("relative output error")
            whole_numbers(axes)
            logarithmic(axes)
            legend(figure, axes, columns=2)
            return figure

        means = ", ".join(
            f"{NAMES.get(v, v)} {short(float(np.mean([figures[role]['error'] for figures in summary.layers[v].values()])))}"
            for v in order(summary.layers)
        )
        caption = f"Output error of {name} after {method}, relative, by layer. Means: {means}."
        yield Drawing(f"{method.lower()}-{name}", "rounding", name, caption, draw)


def _seeds(summary: RunSummary) -> Iterator[Drawing]:
    rows = [row for row in summary.rows if "ppl" in row and "system" in row]
    groups: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        system = without_blocks(row["system"])
        if system in ("random Hadamard", "random orthogonal", "ours"):
            key = (row["dataset"], bits_label(row), row["weights"])
            groups.setdefault(key, {}).setdefault(system, []).append(row)

    def seeds(systems: dict[str, list[dict[str, Any]]]) -> int:
        return max((len(of_system) for name, of_system in systems.items() if name != "ours"), default=0)

    # Where some bits were repeated for their spread, the few seeds of the others show none.
    enough = max([FEWEST_SEEDS, *map(seeds, groups.values())])
    for number, ((dataset, bits, weights), systems) in enumerate(groups.items()):
        if seeds(systems) < enough:
            continue
        random = {name: [row["ppl"] for row in of_system] for name, of_system in systems.items() if name != "ours"}
        ours = [row["ppl"] for row in systems.get("ours", [])]

        def draw(random: dict[str, list[float]] = random, ours: list[float] = ours) -> Figure:
            figure, axes = one_axes(height=2.2)
            colours = {"random Hadamard": (BLUE, "s"), "random orthogonal": (PURPLE, "^")}
            for y, (name, values) in enumerate(random.items()):
                colour, marker = colours[name]
                spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
                axes.plot(sorted(values), y + spread, marker, color=colour, alpha=0.85)
                axes.plot([np.median(values)] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=2)
            for value in ours:
                axes.axvline(value, color=GREEN)
            if ours:
                top = (min(ours), 1.0)
                axes.annotate("learned", top, xycoords=("data", "axes fraction"), ha="center", va="bottom")
            axes.set_yticks(range(len(random)), [name.replace(" ", "\n") for name in random])
            axes.set_ylim(-0.6, len(random) - 0.4)
            axes.set_xlabel("perplexity (bar: median)")
            return figure

        caption = "; ".join(
            f"{name}, {len(values)} seeds: {min(values):.3f} to {max(values):.3f}" for name, values in random.items()
        )
        if ours:
            caption += f"; learned: {', '.join(f'{value:.3f}' for value in ours)}"
        by = "16-bit weights" if weights == "none" else f"weights by {weights.upper()}"
        yield Drawing(f"seeds-{number}", "seeds", f"{bits}, {by}, {dataset}", f"Perplexity, {caption}.", draw)
