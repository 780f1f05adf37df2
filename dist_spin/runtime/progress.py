"""What a person sees while a stage runs: how far it is and how long it still takes."""

import sys
import time

_latest: "Progress | None" = None
LINE_EVERY = 5.0  # seconds between lines where the output is no terminal


class Progress:
    """One line that refreshes on a terminal, or a line now and then in a log; silent on all ranks but the first."""

    def __init__(self, what: str, total: int, done: int = 0, show: bool = True) -> None:
        """`done` of `total` were finished by an earlier start and do not count for the estimate."""
        self.what, self.total, self.done, self.show = what, total, done, show
        self._began = self._said = time.monotonic()
        self._start = done
        self._terminal = sys.stderr.isatty()
        global _latest  # noqa: PLW0603 (a process does one thing at a time)
        _latest = self

    def advance(self, note: str = "") -> None:
        """One more is done; `note` is shown beside it."""
        self.done += 1
        now = time.monotonic()
        last = self.done == self.total
        if not self.show or not (self._terminal or last or now - self._said > LINE_EVERY):
            return
        self._said = now
        pace = (now - self._began) / (self.done - self._start)
        left = f"{clock(pace * (self.total - self.done))} left" if not last else f"took {clock(now - self._began)}"
        line = f"{self.what} {self.done}/{self.total}  {note}  {left}"
        end = "" if self._terminal and not last else "\n"
        print(f"\r\033[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def where() -> str:
    """What this process is at, for messages about hangs; every rank keeps its own count."""
    if _latest is None:
        return "before the first step"
    return f"{_latest.what} {min(_latest.done + 1, _latest.total)} of {_latest.total}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def say(text: str) -> None:
    """One line to the user, on stderr: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
