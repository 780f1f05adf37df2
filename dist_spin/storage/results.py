"""results.json: one list of rows, to which several stages give theirs."""

import json
from collections.abc import Callable
from typing import Any

from dist_spin.storage.atomic import write_json
from dist_spin.storage.locks import exclusive
from dist_spin.storage.run_directory import RunDir


def bits_label(row: dict[str, Any]) -> str:
    """The bit widths of a row as tables name them: W4A4KV4, or W4A4K4V8 where keys and values differ."""
    k, v = row["k_bits"], row["v_bits"]
    return f"W{row['w_bits']}A{row['a_bits']}" + (f"KV{k}" if k == v else f"K{k}V{v}")


def public(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement as results.json has it: without what only its own file needs."""
    return {key: value for key, value in row.items() if key not in ("losses", "identity")}


def results(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """The rows of results.json that `stage` ("evaluate" or "compare") wrote; [] if there are none."""
    return [row for row in _all(run) if row.get("stage", "evaluate") == stage]


def update_results(run: RunDir, stage: str, rows: list[dict[str, Any]]) -> None:
    """Write results.json anew with `rows` in place of the rows that `stage` wrote before; the others stay."""
    _write(run, stage, lambda before: rows)


def merge_results(
    run: RunDir, stage: str, rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], tuple[Any, ...]]
) -> None:
    """Write results.json anew with `rows` among those of `stage`, in place of the ones with the same `key`."""
    new = {key(row): row for row in rows}
    _write(run, stage, lambda before: [*({key(row): row for row in before} | new).values()])


def _all(run: RunDir) -> list[dict[str, Any]]:
    path = run.path / "results.json"
    return json.loads(path.read_text()) if path.exists() else []


def _write(run: RunDir, stage: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    with exclusive(run.path / "locks" / "results.lock", "results.json"):
        others = [row for row in _all(run) if row.get("stage", "evaluate") != stage]
        changed = change(results(run, stage))
        write_json(run.path / "results.json", [*others, *({**row, "stage": stage} for row in changed)])
