"""What a stage tells its user: how far it is, how long it still takes, and what happened on the way.

Everything goes to the logger `dist_spin`; `dist_spin.runtime.console` shows it.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

LOGGER = logging.getLogger("dist_spin")
SILENCE_S = 10.0  # seconds that a step without progress of its own may take before the user is told what goes on


class Progress:
    """A loop's progress, logged at every iteration with itself attached, so that a handler may draw it as one line."""

    def __init__(self, what: str, total: int, done: int = 0, *, show: bool = True) -> None:
        """`done` of `total` were finished by an earlier start and do not count for the estimate. show: false on ranks whose
        progress nobody needs to see.
        """
        self.what, self.total, self.done, self.show = what, total, done, show
        self._began = time.monotonic()
        self._start = done
        # Before the first iteration too, so that a hang in it can be told.
        LOGGER.debug("%s: %d of %d are done", what, done, total, extra={"progress": self})

    @property
    def complete(self) -> bool:
        """Whether nothing is left."""
        return self.done >= self.total

    def advance(self, note: str = "") -> None:
        """One more is done; `note` is shown beside it."""
        self.done += 1
        seconds = time.monotonic() - self._began
        pace = seconds / (self.done - self._start)
        left = f"took {clock(seconds)}" if self.complete else f"{clock(pace * (self.total - self.done))} left"
        LOGGER.info("%s %d/%d  %s  %s", self.what, self.done, self.total, note, left, extra={"progress": self})

    def position(self) -> str:
        """The iteration that is being worked on, such as "learn rotations: step 5 of 60"."""
        return f"{self.what} {min(self.done + 1, self.total)} of {self.total}"


@contextlib.contextmanager
def long_step(what: str) -> Iterator[None]:
    """Tell the user what goes on while the block runs, if it takes longer than SILENCE_S; and at its end, how long it took.

    what: such as "load the weights". Ranks other than 0 stay quiet, as with `say`.
    """
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        if not over.wait(SILENCE_S):
            say(f"{what} ...")

    teller = threading.Thread(target=tell, name="long step", daemon=True)
    teller.start()
    try:
        yield
    except BaseException:
        over.set()
        raise
    else:
        seconds = time.monotonic() - began
        over.set()
        teller.join()
        if seconds > SILENCE_S:
            say(f"{what}: took {clock(seconds)}")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def say(text: str) -> None:
    """One line to the user. Standard output is for results, so it is shown on standard error."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """One line to the user that --quiet does not silence: something was left out, set aside or tried again."""
    LOGGER.warning("%s", text)
