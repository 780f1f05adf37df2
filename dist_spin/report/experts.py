"""How a mixture of experts shared out the calibration text, from the headers of the run's quantised layers."""

from pathlib import Path
from statistics import median
from typing import Any

from dist_spin.report.run_summary import RunSummary
from dist_spin.report.tables import Table
from dist_spin.storage.atomic import parse_json
from dist_spin.storage.checked_json import has_entries, is_mapping, is_number
from dist_spin.storage.run_directory import LEARNED
from dist_spin.storage.tensor_file import read_metadata

COUNTS = dict.fromkeys(("tokens", "calibrated"), is_number)


def expert_tokens(path: Path) -> list[tuple[int, int]]:
    """Of each expert of a layer's file: tokens routed to it, and tokens that its Hessian is of. Empty where it tells none."""
    try:
        figures: Any = parse_json((read_metadata(path) or {})["layer"])["figures"]
    except (ValueError, KeyError, TypeError):
        return []
    experts = figures.items() if is_mapping(figures) else ()
    found = [f for role, f in experts if role.endswith(".gate_proj") and is_mapping(f) and has_entries(f, COUNTS)]
    return [(int(f["tokens"]), int(f["calibrated"])) for f in found]


def expert_table(summary: RunSummary) -> Table | None:
    """A line for each layer with experts; None where there are none, or an earlier version quantised them."""
    layers = {
        index: expert_tokens(summary.run.layers() / f"{index:03d}.safetensors")
        for index in summary.layers.get(LEARNED, {})
    }
    if not any(layers.values()):
        return None
    heads = ["layer", "experts", "fewest tokens", "median", "most", "most / mean", "calibrated on all tokens"]
    table = Table("Calibration tokens of the experts", heads, 1)
    table.note = (
        "Routed to each expert. One that too few chose is rounded from the Hessian of all (quantize.expert_tokens)."
    )
    for index, experts in layers.items():
        if not experts:
            continue
        tokens = [count for count, _ in experts]
        whole = sum(calibrated > count for count, calibrated in experts)
        mean = sum(tokens) / len(tokens)
        numbers = (len(experts), min(tokens), int(median(tokens)), max(tokens))
        table.add(str(index), *map(str, numbers), f"{max(tokens) / mean:.2f}" if mean else "–", str(whole))
    return table
