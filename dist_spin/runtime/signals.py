"""Signals that ask a process to end. They are noticed at once, even while the main thread waits in native code.

A stage in its loop notes the first one (`StopRequest`), saves and leaves with exit code 75. Before its loop there is nothing to
save: the process leaves where it stands. A second ctrl-C ends it at once, with exit code 130; every file is written atomically,
so nothing that was saved is lost.
"""

import contextlib
import errno
import functools
import io
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dist_spin.errors import EXIT_ABORTED, EXIT_INTERRUPTED, Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]

_embedded = False  # whether another program's process runs a stage and keeps its own signals
_requests: "list[weakref.ref[StopRequest]]" = []
_watching = False  # handlers and the wakeup descriptor belong to the process, so there is one watcher
_held = threading.local()  # the signal mask of a thread that is about to fork


class StopRequest:
    """Remembers the first stopping signal that comes during its life; every such object of a process learns of it."""

    def __init__(self) -> None:
        """In the main thread, as Python asks of whoever sets signal handlers."""
        self.name = ""  # of the signal, such as SIGTERM
        if not _embedded:
            watch()
        _requests.append(weakref.ref(self))

    def __bool__(self) -> bool:
        return bool(self.name)


def _living() -> list[StopRequest]:
    return [request for reference in list(_requests) if (request := reference()) is not None]


def watch() -> None:
    """Take over the stopping signals of this process, unless it was started to ignore them (nohup)."""
    global _watching  # noqa: PLW0603
    for number in STOPPING:
        set_handler(number, _handler)
    if not _watching:
        _watching = True
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
        _register_at_fork()


@functools.cache  # once for a process and those that it forks
def _register_at_fork() -> None:
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_unwatch)


def _hold_signals() -> None:
    """A signal to a forked process before `_unwatch` would be written to the parent's watcher, and lost to the child."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _unwatch() -> None:
    """In a forked process, such as a library's worker: its signals are its own, and not to be read by the parent's watcher."""
    global _watching  # noqa: PLW0603
    _watching = False
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        if signal.getsignal(number) is _handler:
            signal.signal(number, signal.SIG_DFL)
    _release_signals()


def set_handler(number: signal.Signals, handler: Handler) -> object:
    """Set a handler, except of a SIGHUP that the process was told to ignore; what was set before."""
    previous = signal.getsignal(number)
    if not (number == signal.SIGHUP and previous == signal.SIG_IGN):
        signal.signal(number, handler)
    return previous


@contextlib.contextmanager
def forwarded_to(handler: Handler) -> Iterator[None]:
    """Have `handler` called for every stopping signal while the block runs."""
    previous = {number: set_handler(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)  # type: ignore[arg-type]


@contextlib.contextmanager
def embedded() -> Iterator[None]:
    """While the block runs, stages work in another program's process, such as a notebook, which signals must not end.

    The first stopping signal lets the stage save and raise `Interrupted`. Where nothing is to be saved, and at a second ctrl-C,
    KeyboardInterrupt is raised (`Interrupted` for the other signals). Signals that the program handles itself are left to it, in
    threads other than the main one all of them are; afterwards every handler is the one from before.
    """
    global _embedded  # noqa: PLW0603
    outer, requests = _embedded, list(_requests)
    taken = {}
    if threading.current_thread() is threading.main_thread() and not outer:
        free = (signal.SIG_DFL, signal.default_int_handler)
        taken = {number: signal.getsignal(number) for number in STOPPING if signal.getsignal(number) in free}
    _embedded = True
    _requests.clear()  # of earlier stages: an exception that somebody keeps holds theirs
    try:
        for number in taken:
            signal.signal(number, _note_or_raise)
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)
        _requests[:] = requests
        _embedded = outer


def _note_or_raise(number: int, frame: FrameType | None) -> None:
    name, waiting = signal.Signals(number).name, [request for request in _living() if not request]
    for request in waiting:
        request.name = name
    if not waiting and number == signal.SIGINT:
        raise KeyboardInterrupt
    if not waiting and not _living():
        raise Interrupted(f"stopped by {name} where nothing was to be saved", "the same call starts again")


class Terminal(io.FileIO):
    """A terminal that may be closed while a run goes on to save: from then on, what is written goes nowhere."""

    def write(self, data: Any) -> int:
        """As `io.FileIO`."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            leave_terminal()
            return memoryview(data).nbytes


def survive_terminal() -> None:
    """Replace the standard output streams of this process, those that are terminals, by ones that may be closed."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            raw = io.BufferedWriter(Terminal(descriptor, "w", closefd=False))
            options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
            setattr(sys, name, io.TextIOWrapper(raw, **options))


def leave_terminal() -> None:
    """After a SIGHUP the terminal is gone, and whatever is still printed to it would be an error."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if os.isatty(stream):
                os.dup2(nowhere, stream)
        os.close(nowhere)


def leave(text: str, code: int) -> None:
    """End the process with one line, spoken by rank 0."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            start = "\r\033[K" if os.isatty(2) else ""
            os.write(2, f"{start}dist-spin: {text}\n".encode())
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _handler(number: int, frame: FrameType | None) -> None:
    """The watcher acts, in its own thread; this is here because Python wakes it for handled signals alone."""


def _watch(descriptor: int) -> None:
    while numbers := os.read(descriptor, 64):
        for number in numbers:
            if number in STOPPING and signal.getsignal(number) is _handler:
                _act(signal.Signals(number))


def _act(number: signal.Signals) -> None:
    if number == signal.SIGHUP:
        leave_terminal()
    requests = _living()
    if not requests:
        code = EXIT_ABORTED if number == signal.SIGINT else EXIT_INTERRUPTED
        leave(f"stopped by {number.name}; the same command continues", code)
    if number == signal.SIGINT and all(requests):
        leave("ended at once by a second ctrl-C; the same command continues after what was saved", EXIT_ABORTED)
    for request in requests:
        request.name = request.name or number.name
