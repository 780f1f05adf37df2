"""A run in one sentence: what its bits cost, from its own measurements, and what is not known yet."""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from dist_spin.report.run_summary import RunSummary
from dist_spin.report.tables import FULL, one_accuracy_each
from dist_spin.storage.results import bits_label, without_blocks

LEARNED_ROWS = ("learned rotation", "ours", "given rotation")  # best first: what a run is about
HADAMARD = "random Hadamard"
WITH = {
    "learned rotation": "with learned rotations",
    "ours": "with learned rotations",
    "given rotation": "with the given rotations",
    "no rotation": "without rotations",
    HADAMARD: "with random Hadamard rotations",
    "random orthogonal": "with random orthogonal rotations",
}
PREFERRED = "wikitext2"  # of several texts, the one that papers report
SMALL, LARGE = 1.005, 2.0  # ratios of perplexities below which nothing is lost, and above which percents say little


@dataclass(frozen=True)
class Measured:
    """Perplexity of one method, a mean over `seeds` seeds."""

    method: str
    bits: str
    weights: str
    ppl: float
    seeds: int


def sentence(summary: RunSummary) -> str:
    """What the run has shown so far."""
    rows = [row for row in summary.rows if "ppl" in row]
    if not rows:
        return _before_results(summary)
    text = PREFERRED if any(row["dataset"] == PREFERRED for row in rows) else rows[0]["dataset"]
    measured = _means([row for row in rows if row["dataset"] == text])
    full = next((m for m in measured if m.method == FULL), None)
    quantised = [m for m in measured if m.method != FULL]
    if not quantised:
        assert full is not None
        return f"Full precision has perplexity {number(full.ppl)} on {text}; nothing that is quantised is measured yet."
    chosen = _chosen(quantised)
    hadamards = [m for m in quantised if without_blocks(m.method) == HADAMARD]
    others = [m for m in hadamards if (m.bits, m.weights) == (chosen.bits, chosen.weights)]
    plain = without_blocks(chosen.method)
    what = f"{chosen.bits} {WITH.get(plain, f'by {plain}')}{chosen.method.removeprefix(plain)}"
    seeds = f" (mean of {chosen.seeds} seeds)" if chosen.seeds > 1 else ""
    share = _accuracy_kept(summary, chosen)
    if full is None:
        said = f"{what} has perplexity {number(chosen.ppl)} on {text}{seeds}; full precision is not measured"
    else:
        ours, theirs = numbers(chosen.ppl, full.ppl)
        kept = chosen.ppl < SMALL * full.ppl and not share
        against = f"{ours} against {theirs}{'' if kept else ' in full precision'}{seeds}"
        said = (
            f"{what} {share}; perplexity on {text}: {against}"
            if share
            else f"{what} {_cost(chosen, full, text)}: {against}"
        )
    if others and plain != HADAMARD:
        theirs, ours = numbers(others[0].ppl, chosen.ppl)
        said += f"; a random Hadamard {'gives' if others[0].ppl > chosen.ppl else 'does no worse, with'} {theirs}"
    elif plain not in LEARNED_ROWS:
        said += "; the learned rotations are not measured yet"
    return f"{said}."


def number(value: float, digits: int = 3) -> str:
    """A perplexity in few digits."""
    return f"{value:,.0f}" if value >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def numbers(one: float, other: float) -> tuple[str, str]:
    """Two perplexities with as many digits as tell them apart, three at least."""
    digits = next((n for n in (3, 4, 5) if number(one, n) != number(other, n)), 3)
    return number(one, digits), number(other, digits)


def _means(rows: list[dict[str, Any]]) -> list[Measured]:
    """One entry for each method at each bits; those of the run's own stage `evaluate` come before those of a comparison."""
    groups: dict[tuple[str, str, str, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: row.get("stage", "evaluate") != "evaluate"):
        method = row.get("system", row["method"])
        key = (row.get("stage", "evaluate"), method, bits_label(row), row["weights"], row.get("clips", "none"))
        groups.setdefault(key, []).append(row["ppl"])
    return [Measured(m, bits, weights, mean(x), len(x)) for (_, m, bits, weights, _), x in groups.items()]


def _chosen(measured: list[Measured]) -> Measured:
    """The learned rotations at the fewest bits; where they are not measured, whatever is best there."""
    learned = [m for m in measured if without_blocks(m.method) in LEARNED_ROWS] or measured
    fewest = min(map(_width, learned))
    return min((m for m in learned if _width(m) == fewest), key=lambda m: m.ppl)


def _width(measured: Measured) -> int:
    return sum(int(part) for part in "".join(c if c.isdigit() else " " for c in measured.bits).split())


def _cost(chosen: Measured, full: Measured, text: str) -> str:
    ratio = chosen.ppl / full.ppl
    if ratio < SMALL:
        return f"keeps the perplexity of full precision on {text}"
    if ratio < LARGE:
        percent = f"{100 * (ratio - 1):.0f} %" if ratio >= 1.01 else "less than 1 %"
        return f"costs {percent} in perplexity on {text}"
    return f"multiplies the perplexity on {text} by {number(ratio, 2)}"


def _accuracy_kept(summary: RunSummary, chosen: Measured) -> str:
    """The share of full precision's zero-shot accuracy that is kept, a mean over the tasks that both have; "" without any."""
    rows = [row for row in summary.rows if "task" in row]
    values: dict[bool, dict[str, float]] = {True: {}, False: {}}  # whether full precision -> "task metric" -> accuracy
    for row in rows:
        method = row.get("system", row["method"])
        if method == FULL or (method, bits_label(row), row["weights"]) == (chosen.method, chosen.bits, chosen.weights):
            values[method == FULL][f"{row['task']} {row['metric']}"] = row["value"]
    both = [name for name in one_accuracy_each(list(values[True])) if name in values[False]]
    if not both:
        return ""
    ours, theirs = (mean(values[full][name] for name in both) for full in (False, True))
    if theirs <= 0:
        return ""
    tasks = f"{len(both)} tasks" if len(both) > 1 else both[0].partition(" ")[0]
    return f"keeps {100 * ours / theirs:.0f} % of the zero-shot accuracy ({100 * ours:.1f} against {100 * theirs:.1f}, {tasks})"


def _before_results(summary: RunSummary) -> str:
    if summary.learned:
        return "The rotations are there; no perplexity is measured yet."
    if summary.metrics:
        return f"Learning is at step {summary.metrics[-1]['step']} of {summary.steps}; no perplexity is measured yet."
    return "Nothing is measured yet."
