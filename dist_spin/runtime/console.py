"""Where the logger `dist_spin` is shown: standard error, with the line of progress kept last on a terminal."""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from typing import TextIO

from dist_spin.runtime.progress import LOGGER, Progress

LINE_EVERY = 5.0  # seconds between lines of progress where the output is no terminal
CLEAR = "\r\033[K"  # to the start of the line, and erase it


class Console(logging.Handler):
    """Shows log records on a stream.

    On a terminal, the message alone, above the line of progress, which is drawn again below it. In a file or a pipe, time,
    rank and level before every message, and a line of progress every few seconds. Ranks other than 0 show warnings only.
    """

    def __init__(
        self, stream: TextIO, rank: int = 0, *, quiet: bool = False, verbose: bool = False, bare: bool = False
    ) -> None:
        """rank: may be set later, when it is known. quiet: warnings alone, and no progress. verbose: every rank's lines, with
        time, rank and level on a terminal too, and debugging notes. bare: messages alone in a file too, as notebooks show them.
        """
        super().__init__()
        self.rank, self.verbose = rank, verbose
        self.progress: Progress | None = None  # the latest that was logged, shown or not
        self._stream, self._terminal = stream, stream.isatty()
        self._level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
        self._line = ""  # of progress, where one stands on the terminal
        self._drawn = 0.0  # when a line of progress was last written to a file
        short = (self._terminal or bare) and not verbose
        self.setFormatter(
            logging.Formatter("%(message)s")
            if short
            else logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record.

        Raises:
            BrokenPipeError: nobody reads the stream any more.
        """
        progress: Progress | None = getattr(record, "progress", None)
        if progress is not None and progress is not self.progress:
            self.progress, self._drawn = progress, time.monotonic()
        if not self._is_shown(record, progress):
            return
        record.__dict__["rank"] = self.rank
        text = self.format(record)
        if progress is None or record.levelno < logging.INFO:
            self._write(f"{CLEAR}{text}\n{self._line}" if self._terminal else f"{text}\n")
        elif self._terminal:
            self._line = "" if progress.complete else shortened(text, shutil.get_terminal_size().columns - 1)
            self._write(CLEAR + (self._line or f"{text}\n"))
        elif progress.complete or time.monotonic() - self._drawn > LINE_EVERY:
            self._drawn = time.monotonic()
            self._write(f"{text}\n")

    def position(self) -> str:
        """Where this process is, for messages about hangs, such as "at learn rotations: step 5 of 60"; every rank keeps its own
        count.
        """
        return "before the first step" if self.progress is None else f"at {self.progress.position()}"

    def leave_line(self) -> None:
        """Let what others write begin on a line of its own."""
        if self._line:
            self._line = ""
            self._write("\n")

    def _is_shown(self, record: logging.LogRecord, progress: Progress | None) -> bool:
        if progress is not None and not progress.show:
            return False
        silent = self.rank != 0 and not self.verbose
        return record.levelno >= (max(self._level, logging.WARNING) if silent else self._level)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def shortened(text: str, width: int) -> str:
    """`text` in one row of a terminal, since a second one could not be erased: its end, which says how far, and its start."""
    end = min(len(text), 2 * width // 3)
    return text if len(text) <= width else f"{text[: width - end - 1]}…{text[-end:]}"


@contextlib.contextmanager
def shown_on(console: Console) -> Iterator[None]:
    """Send the logger's records to `console`, and to it alone, for the time of a command."""
    before = (LOGGER.level, LOGGER.propagate)
    LOGGER.setLevel(logging.DEBUG)  # the console decides; it follows the progress on every rank
    LOGGER.propagate = False  # a library that configures the root logger would show every line twice
    LOGGER.addHandler(console)
    try:
        yield
    finally:
        LOGGER.removeHandler(console)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
        console.leave_line()


TALKATIVE = ("torchao", "torch.utils._pytree")  # loggers that tell of libraries for other devices


def quieten_libraries() -> None:
    """Leave the terminal to our own progress: transformers draws bars, torchao tells of libraries for other devices."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def libraries_quiet() -> Iterator[None]:
    """As `quieten_libraries`, for the time of a block."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    quieten_libraries()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
