"""What a run notes about itself, as any process may read it at any time: events.jsonl and config.yaml.

A line that a killed process has torn, or that a disk has damaged, is left out; every line that is returned has the entries that
its readers rely on. What a stage was started with cannot be made again from the run, so a damaged config.yaml is an error.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_spin.config.loader import dump_config, load_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.storage.atomic import read_lines, write_text
from dist_spin.storage.checked_json import (
    Kind,
    has_entries,
    is_count,
    is_duration,
    is_mapping,
    is_text,
    list_of,
    optional,
)

DOCUMENT_START, DOCUMENT_END = b"---\n", b"...\n"  # of YAML
MOST_LAYERS = 100_000  # of any model; a damaged number beyond would only fill memory


def _is_layer(value: Any) -> bool:
    return is_count(value) and value <= MOST_LAYERS


def _is_layer_range(value: Any) -> bool:
    return list_of(_is_layer)(value) and len(value) == 2


def _is_job_id(value: Any) -> bool:
    """An id of Slurm or of this machine; it becomes an argument of Slurm's programs."""
    return is_text(value) and re.fullmatch(r"\w[\w\[\],%-]*", value) is not None


def _are_slurm_variables(value: Any) -> bool:
    return is_mapping(value) and all(_is_job_id(value[name]) for name in value if name.endswith("_id"))


# Event -> entries that its readers rely on, beside "event" and "time".
EVENTS: dict[str, dict[str, Kind]] = {
    "job": {
        "stage": is_text,
        "part": is_text,
        "ranks": is_count,
        "devices": list_of(is_text),
        "python": is_text,
        "cuda": optional(is_text),
        "versions": optional(is_mapping),
        "commit": optional(is_text),
        "slurm": optional(_are_slurm_variables),
    },
    "stage_end": {
        "stage": is_text,
        "seconds": is_duration,
        "peak_host_bytes": is_count,
        "peak_gpu_bytes": optional(is_count),
    },
    "stage_failed": {"stage": is_text, "part": is_text, "problem": is_text},
    "submitted": {"stage": is_text, "job": _is_job_id, "part": list_of(is_text)},
    "quantize": {"layers": _is_layer},
    "layer_start": {"variant": is_text, "layer": _is_layer, "host": is_text, "pid": is_count},
    "job_failed": {"layers": _is_layer_range},
    "job_done": {"layers": _is_layer_range},
    "compare": {"rows": is_count},
}


def read_events(run_path: Path) -> list[dict[str, Any]]:
    """The events of a run in the order in which they were noted, each with "event", "time" and the entries of `EVENTS`."""
    common: dict[str, Kind] = {"event": is_text, "time": is_duration}
    return [
        line
        for line in read_lines(run_path / "events.jsonl")
        if has_entries(line, common) and has_entries(line, EVENTS.get(line["event"], {}))
    ]


def check_is_run(path: Path) -> None:
    """Accept directories in which a stage has begun or a job was submitted.

    Raises:
        UserError: `path` is no run directory.
    """
    if not any((path / name).exists() for name in ("config.yaml", "events.jsonl")):
        raise UserError(f"{path} is no run directory (it has no config.yaml)", "give runs/NAME, or its configuration")


def read_settings(run_path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings with which a run was last started, from its config.yaml.

    Args:
        overrides: settings that take the place of the file's, as on the command line.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = run_path / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_path} is no run directory (it has no config.yaml)", "give runs/NAME")
    remedy = "start the run with its own configuration again, which writes the file anew"
    if _cut_off(path):
        raise UserError(f"{path} is damaged (its end is missing)", remedy)
    try:
        return load_config(str(path), overrides)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error.problem})", remedy) from error


def _cut_off(path: Path) -> bool:
    """Whether a file that opens as a YAML document does not close as one; half a document may be valid YAML."""
    try:
        content = path.read_bytes()
    except OSError:
        return False  # which reading it will say
    return content.startswith(DOCUMENT_START) and not content.endswith(DOCUMENT_END)


def keep_settings(run_path: Path, config: RunConfig) -> None:
    """Write config.yaml, which tells other programs how the run was started, unless it is there and whole."""
    try:
        read_settings(run_path)
    except UserError:
        write_settings(run_path, config)


def write_settings(run_path: Path, config: RunConfig) -> None:
    """Write config.yaml as a YAML document with a start and an end, so that `read_settings` misses what is cut off."""
    write_text(run_path / "config.yaml", DOCUMENT_START.decode() + dump_config(config) + DOCUMENT_END.decode())
