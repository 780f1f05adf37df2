"""The processes of a run's next stage, started while another is at work: they import what they need, and wait for their turn.

Importing torch and transformers takes a process 5 to 10 s, in which GPUs would have nothing to do between two stages.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from types import TracebackType

from dist_spin.runtime.host_memory import host_bytes_free

AFTER_S = 10.0  # of a stage that was not prepared itself: it imports meanwhile, and may well be over by then
PROCESS_BYTES = 1 << 30  # that a process takes with its imports, at most
MEMORY_SHARE = 8  # one part of so many of the free memory may be taken by processes that wait

Starting = Callable[
    [int | None], list[subprocess.Popen[bytes]]
]  # (descriptor or None: see `processes.TURN`) -> processes


class NextStage:
    """At most one stage that is prepared; to be used in a `with` block, which ends what has not begun by then."""

    def __init__(self) -> None:
        self._start: Starting | None = None
        self._due, self._bytes = 0.0, 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._turn = -1  # a pipe's end for writing, from whose other end all of them read
        self._began_prepared = False

    def __enter__(self) -> "NextStage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def prepare(self, start: Starting, nproc: int) -> None:
        """Have `start_when_due` start the `nproc` processes of a stage by `start`."""
        self._start, self._due = start, time.monotonic() + (0.0 if self._began_prepared else AFTER_S)
        self._bytes = nproc * PROCESS_BYTES

    def start_when_due(self) -> None:
        """Start what is to be prepared once its time has come, unless memory is short."""
        if self._start is None or time.monotonic() < self._due:
            return
        start, self._start = self._start, None
        if self._bytes > host_bytes_free() / MEMORY_SHARE:
            return
        reading, self._turn = os.pipe()
        try:
            self._processes = start(reading)
        finally:
            os.close(reading)

    def begin(self, start: Starting) -> list[subprocess.Popen[bytes]]:
        """The processes of the stage whose turn has come: the prepared ones, if all are alive, or new ones from `start`."""
        self._start = None
        self._began_prepared = bool(self._processes) and all(process.poll() is None for process in self._processes)
        if not self._began_prepared:
            self._end()
            return start(None)
        processes, self._processes = self._processes, []
        with contextlib.suppress(BrokenPipeError):  # all have ended since: their exit codes tell
            os.write(self._turn, b"." * len(processes))
        os.close(self._turn)
        self._turn = -1
        return processes

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1
