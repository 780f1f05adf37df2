"""metrics.jsonl: one line of figures per learning step; damaged lines are left out when they are read."""

import json
import os
from pathlib import Path
from typing import Any

from dist_spin.storage.atomic import append_line, read_lines, write_text
from dist_spin.storage.checked_json import Kind, has_entries, is_count, is_duration, is_number, optional

NAME = "metrics.jsonl"
# What readers rely on: every line has a step and its loss.
FIGURES: dict[str, Kind] = {"step": is_count, "loss": is_number, "seconds": optional(is_duration)}
# Keys that earlier versions wrote -> what they are called now.
RENAMED = {"turn_r1": "angle_r1", "turn_r2": "angle_r2", "stall": "checkpoint_wait_s"}


def append_metrics(run: Path, step: int, figures: dict[str, float]) -> None:
    """Append the figures of one step of the run in directory `run`."""
    append_line(run / NAME, {"step": step, **figures})


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The figures of a run's steps, oldest first, under the names of this version; [] where nothing was learned yet.

    Each line has the entries of `FIGURES`; others are left out where they are no finite numbers.
    """
    lines = [line for line in read_lines(run / NAME) if has_entries(line, FIGURES)]
    return [{RENAMED.get(key, key): value for key, value in line.items() if is_number(value)} for line in lines]


def drop_metrics_after(run: Path, step: int) -> None:
    """Remove the lines of all steps after `step`, whose states were never saved, and every second line of a step.

    Lines of a loss that was not finite stay: the step was taken back, and that is what happened.
    """
    if (run / NAME).exists():
        lines = {line["step"]: json.dumps(line) + "\n" for line in _steps(run) if line["step"] <= step}
        write_text(run / NAME, "".join(lines.values()))


def set_metrics_aside(run: Path, least: int) -> Path | None:
    """Rename the file if it has lines of at least `least` steps, of which there is no state any more; its new name."""
    if len({line["step"] for line in _steps(run)}) < least:
        return None
    aside = (run / NAME).with_suffix(".stale")
    os.replace(run / NAME, aside)
    return aside


def _steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / NAME) if has_entries(line, {"step": is_count, "loss": _is_loss})]


def _is_loss(value: Any) -> bool:
    return is_number(value) or isinstance(value, float)
