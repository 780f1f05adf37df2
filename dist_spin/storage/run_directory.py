"""The run directory: the only state of a run. Every file in it appears whole or not at all.

config.yaml fingerprint.json metrics.jsonl events.jsonl results.json
rotations/step_000042.safetensors rotations/final.safetensors rotations/R.bin
layers/000.safetensors ... layers/ends.safetensors boundaries/010/0000.safetensors ... teacher/000000.safetensors
baselines/NAME/layers/... evaluations/ compare/NAME/... logs/ export/FORMAT/ statistics/ tensorboard/
report.html report.md
"""

import time
from pathlib import Path
from typing import Any

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.storage.atomic import append_line, write_json
from dist_spin.storage.checked_json import is_mapping, read_json
from dist_spin.storage.tensor_file import CorruptFile

LEARNED = "learned"  # the variant with the rotations that this run learns; others are baselines or methods, by name


class RunDir:
    """Paths of one run and the ways to write into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def rotations(self) -> Path:
        """Checkpoints and the finished rotations."""
        return self.path / "rotations"

    def layers(self, variant: str = LEARNED) -> Path:
        """Directory of a variant's quantised layers: `layers` for the learned one, `baselines/NAME/layers` for others."""
        return self.path / "layers" if variant == LEARNED else self.path / "baselines" / variant / "layers"

    def hidden_states(self, variant: str = LEARNED) -> Path:
        """Directory of the hidden states that enter the first layer of each job, beside the layers of the same variant."""
        return self.layers(variant).with_name("boundaries")

    @property
    def export(self) -> Path:
        """Exported models, a directory per format."""
        return self.path / "export"

    @property
    def logs(self) -> Path:
        """What the jobs of a fan-out print, one file each."""
        return self.path / "logs"

    def event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl: what happened, when (Unix seconds), and any details."""
        append_line(self.path / "events.jsonl", {"event": kind, "time": round(time.time(), 3), **details})


def read_fingerprint(path: Path) -> dict[str, Any] | None:
    """What a run was started with, by field; None where no stage has noted it.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        fingerprint = read_json(path)
        problem = "" if is_mapping(fingerprint) else "it holds no fields"
    except CorruptFile as error:
        problem = str(error).removeprefix(f"{path}: ")
    if problem:
        raise UserError(
            f"{path} is damaged ({problem}), so that nothing tells what the run was started with",
            "delete it if model, data and settings are still the same; else use another name=",
        )
    return fingerprint


def check_fingerprint(path: Path, current: dict[str, Any], what: str) -> None:
    """Compare with the fingerprint of an earlier start, or write it if this is the first.

    Raises:
        UserError: the file is damaged, or a field differs; the message names it and both values.
    """
    before = read_fingerprint(path)
    if before is None:
        write_json(path, current)
        return
    for field in sorted({*before, *current}):
        if before.get(field) != current.get(field):
            raise UserError(
                f"{what} was started with {field} = {before.get(field)!r} and now has {current.get(field)!r}",
                f"use another name= for a new run, or set {field} back",
            )


def run_dir(config: RunConfig) -> RunDir:
    """The run directory that a configuration names."""
    return RunDir(Path(config.path(config.output_dir)) / config.name)
