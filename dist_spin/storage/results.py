"""results.json: one list of rows, to which several stages give theirs, each with a checksum (`checked_json`).

Rows come from files of their own (`evaluations/`), so that a damaged results.json is made again by the stages that wrote it.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_spin.config.bit_columns import column_name
from dist_spin.runtime.progress import warn
from dist_spin.storage.atomic import write_json
from dist_spin.storage.checked_json import (
    Kind,
    add_checksum,
    has_entries,
    is_count,
    is_number,
    is_text,
    list_of,
    optional,
    read_json,
    remove_checksum,
)
from dist_spin.storage.locks import exclusive
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import CorruptFile


@dataclass(frozen=True)
class Figure:
    """A figure that is measured on a text, as tables show it.

    name: its entry in a row. head: of a column. title: of a table. more_is_better: whether the best one is the largest.
    """

    name: str
    head: str
    title: str
    more_is_better: bool = False

    def text(self, value: float) -> str:
        """Perplexities with three decimals, divergences in three digits, shares in percent with two decimals."""
        if self.name == "ppl":
            return f"{value:.{3 if value < 1000 else 0}f}"
        return f"{100 * value:.2f}" if self.name == "top1" else f"{value:#.3g}".rstrip(".")

    def spread(self, values: Sequence[float]) -> str:
        """The mean of several seeds with their sample standard deviation and how many they are."""
        mean = self.text(statistics.fmean(values))
        if len(values) == 1:
            return mean
        deviation = statistics.stdev(values) * (100 if self.name == "top1" else 1)
        decimals = len(mean.partition(".")[2])
        return f"{mean} ± {deviation:{'.1e' if 'e' in mean else f'.{decimals}f'}} ({len(values)})"

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return max(values) if self.more_is_better else min(values)


PERPLEXITY = Figure("ppl", "perplexity", "perplexity")
FIDELITY = (  # beside perplexity (`evaluate.fidelity`); runs of version 0.2.0 have none
    Figure("kl", "KL", "KL divergence from full precision, nats per token"),
    Figure("kl_p99", "KL, 99 %", "99th percentile of the KL divergence from full precision, nats"),
    Figure("top1", "top-1, %", "tokens with the same most probable one as full precision, %", more_is_better=True),
)


def measured_fidelity(rows: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """Those of `FIDELITY` that some of the rows have."""
    found = {name for row in rows for name in row}
    return [figure for figure in FIDELITY if figure.name in found]


def bits_label(row: dict[str, Any]) -> str:
    """The bit widths and formats of a row or of the settings `quant` as tables name them: W4A4KV4, W4A4K4V8, W4A4-nvfp4."""
    widths = {name: row[f"{name.lower()}_bits"] for name in "WAKV"}
    return column_name(widths, {name: row.get(f"{name.lower()}_format", "int") for name in ("W", "A", "KV")})


def system_label(system: str, clips: str) -> str:
    """A system of a comparison with the clip ratios that it runs with: none, those of QuaRot, or others in numbers."""
    return system if clips == "none" else f"{system}, clipped" if clips == "quarot" else f"{system}, {clips}"


def without_blocks(method: str) -> str:
    """The name of a method or system as it is without the blocks of its rotations (`model.rotation.Blocks.label`)."""
    return method.partition(", in ")[0]


def public(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement as results.json has it: without what only its own file needs."""
    return {key: value for key, value in row.items() if key not in ("losses", "identity")}


def load_results(run: RunDir, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of results.json, [] if there is none; rows that are damaged are left out, which `tell` is told."""
    path = run.path / "results.json"
    if not path.exists():
        return []
    again = "`dist-spin evaluate` or `compare` writes it anew"
    try:
        entries = read_json(path)
    except CorruptFile as error:
        tell(f"{error}; {again}")
        return []
    rows, problems = [], []
    for entry in entries if isinstance(entries, list) else [entries]:
        try:
            rows.append(remove_checksum(entry, makes_sense))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        tell(f"{path}: {len(problems)} rows are damaged ({problems[0]}); {again}")
    return rows


def makes_sense(row: dict[str, Any]) -> bool:
    """Whether a row without a checksum has what every measurement has, with possible values."""
    common: dict[str, Kind] = {
        **dict.fromkeys(("method", "rotation", "weights"), is_text),
        **dict.fromkeys(("w_bits", "a_bits", "k_bits", "v_bits", "group_size", "seed"), is_count),
        **dict.fromkeys(("stage", "system", "clips"), optional(is_text)),
    }
    perplexity: dict[str, Kind] = {
        "dataset": is_text,
        "seq_len": is_count,
        "tokens": is_count,
        "ppl": lambda value: is_number(value) and value > 0,
        "losses": optional(list_of(is_number)),
        **dict.fromkeys((figure.name for figure in FIDELITY), optional(is_number)),
    }
    task: dict[str, Kind] = {
        "task": is_text,
        "metric": is_text,
        "value": is_number,
        "stderr": optional(is_number),
        "n": is_count,
    }
    prompts: dict[str, Kind] = {
        "prompts": is_text,
        **dict.fromkeys(("n", "prompt_tokens"), is_count),
        **dict.fromkeys(("greedy_first", "greedy_equal"), is_number),
    }
    own = task if "task" in row else prompts if "prompts" in row else perplexity
    return has_entries(row, common) and has_entries(row, own)


def results(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """The rows of results.json that `stage` ("evaluate" or "compare") wrote; [] if there are none."""
    return [row for row in load_results(run, warn) if row.get("stage", "evaluate") == stage]


def update_results(run: RunDir, stage: str, rows: list[dict[str, Any]]) -> None:
    """Write results.json anew with `rows` in place of the rows that `stage` wrote before; the others stay."""
    _write(run, stage, lambda before: rows)


def merge_results(
    run: RunDir, stage: str, rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> None:
    """Write results.json anew with `rows` among those of `stage`, in place of the ones with the same `key`."""
    new = {key(row): row for row in rows}
    _write(run, stage, lambda before: [*({key(row): row for row in before} | new).values()])


def _write(run: RunDir, stage: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    with exclusive(run.path / "locks" / "results.lock", "results.json"):
        rows = load_results(run, warn)
        others = [row for row in rows if row.get("stage", "evaluate") != stage]
        changed = change([row for row in rows if row.get("stage", "evaluate") == stage])
        rows = [*others, *({**row, "stage": stage} for row in changed)]
        write_json(run.path / "results.json", [add_checksum(row) for row in rows])
