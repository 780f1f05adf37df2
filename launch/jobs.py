"""A job of a fan-out, and what runs such jobs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Task:
    """One job, and how often it failed without getting anything done."""

    arguments: list[str]  # what follows `dist-spin quantize CONFIG ...`
    layers: range
    failures: int = 0
    done_before: int = 0

    @property
    def name(self) -> str:
        """For log files and messages."""
        return f"{self.layers.start:03d}-{self.layers.stop:03d}" if self.layers else "boundaries"


class Executor(Protocol):
    """Where jobs run."""

    slots: int  # how many at once

    def start(self, task: Task) -> None:
        """Begin a job; there is a free slot."""

    def wait(self, seconds: float) -> Iterable[tuple[Task, int]]:
        """Jobs that ended, with their exit codes (negative: killed by that signal); waits at most `seconds`."""

    def stop(self) -> None:
        """Ask every running job to save and leave."""
