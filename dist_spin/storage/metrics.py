"""metrics.jsonl: one line of figures per learning step."""

import json
from pathlib import Path
from typing import Any

from dist_spin.storage.atomic import append_line, read_lines, write_text

NAME = "metrics.jsonl"
# Keys that earlier versions wrote -> what they are called now.
RENAMED = {"turn_r1": "angle_r1", "turn_r2": "angle_r2", "stall": "checkpoint_wait_s"}


def append_metrics(run: Path, step: int, figures: dict[str, float]) -> None:
    """Append the figures of one step of the run in directory `run`."""
    append_line(run / NAME, {"step": step, **figures})


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl under the names of this version; [] where nothing was learned yet."""
    return [{RENAMED.get(key, key): value for key, value in line.items()} for line in read_lines(run / NAME)]


def drop_metrics_after(run: Path, step: int) -> None:
    """Remove the lines of all steps after `step`, whose states were never saved."""
    if (run / NAME).exists():
        lines = [json.dumps(line) + "\n" for line in read_metrics(run) if line.get("step", step + 1) <= step]
        write_text(run / NAME, "".join(lines))
