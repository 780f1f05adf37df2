"""results.json: one list of rows, to which several stages give theirs."""

import json
from typing import Any

from dist_spin.rundir import RunDir, write_json


def public(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement as results.json has it: without what only its own file needs."""
    return {key: value for key, value in row.items() if key not in ("losses", "identity")}


def results(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """The rows of results.json that `stage` ("evaluate" or "compare") wrote; [] if there are none."""
    path = run.path / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if row.get("stage", "evaluate") == stage]


def update_results(run: RunDir, stage: str, rows: list[dict[str, Any]]) -> None:
    """Write results.json anew with `rows` in place of the rows that `stage` wrote before; the others stay."""
    path = run.path / "results.json"
    others = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in others if row.get("stage", "evaluate") != stage]
    write_json(path, [*kept, *({**row, "stage": stage} for row in rows)])
