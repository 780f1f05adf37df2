"""Figures of learning steps as TensorBoard scalars, beside metrics.jsonl and from the same numbers.

tensorboard --logdir runs/NAME/tensorboard
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_spin.storage.atomic import user_error


class Scalars:
    """Writes scalars, or does nothing where that is switched off or TensorBoard is not installed.

    A resumed run hides what an earlier start wrote of steps that were never saved, so that no step stands twice.
    """

    def __init__(self, directory: Path, step: int, say: Callable[[str], None], *, wanted: bool) -> None:
        """step: the last one with a checkpoint; later ones of earlier starts are hidden. wanted: false does nothing."""
        self._directory, self._step, self._wanted, self._say = directory, step, wanted, say
        self._writer: Any = None

    def add(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """One step's figures as STAGE/NAME; on disk when this returns, so that no checkpoint is ahead of them."""
        if self._wanted and self._writer is None:
            self._open()
        if self._writer is None:
            return
        try:
            for name, value in figures.items():
                self._writer.add_scalar(f"{stage}/{name}", value, step)
            self._writer.flush()
        except OSError as error:
            raise user_error(error, self._directory) from error

    def close(self) -> None:
        """End the writer's thread."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> None:
        """At the first step, so that a start with nothing left to do writes no file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self._say(f"no TensorBoard scalars ({error}); pip install tensorboard, or set report.tensorboard=false")
            self._wanted = False
            return
        try:
            self._writer = SummaryWriter(str(self._directory), purge_step=self._step + 1)
        except OSError as error:
            raise user_error(error, self._directory) from error
