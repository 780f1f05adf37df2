"""One job of a local fan-out: what `dist-spin quantize ... --layers A:B` does, in a process made by multiprocessing.

On the CPU it is forked from a server that has imported all that it needs (`launch.preload`).
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from multiprocessing.connection import wait

from dist_spin.errors import EXIT_HANG
from dist_spin.runtime.processes import kill_when_parent_dies
from dist_spin.runtime.signals import STOPPING

FORK_SERVER = os.getpid()  # the process that imported this first: the fork server, or a job that was started afresh


def work(arguments: list[str], log: str) -> None:
    """Run one command with its output appended to `log`; the process's exit code is the command's."""
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    kill_when_parent_dies()  # without the fork server, the launcher would take this job for ended
    if os.getppid() != FORK_SERVER != os.getpid():
        os._exit(EXIT_HANG)
    os.setsid()  # ctrl-C reaches the launcher alone, which passes it on once
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    print(f"dist-spin {' '.join(arguments)}", file=sys.stderr, flush=True)
    sys.argv = ["dist-spin", *arguments]
    runpy.run_module("dist_spin", run_name="__main__")  # leaves through sys.exit with the command's code


def _die_with_launcher() -> None:
    """No job outlives its launcher: the next one would do the same layers at the same time."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
