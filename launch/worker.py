"""One job of a local fan-out: what `dist-spin quantize ... --layers A:B` does, in a process made by multiprocessing.

Imported once by the fork server, so that a job on the CPU begins in milliseconds instead of seconds of imports.
"""

import ctypes
import os
import signal
import sys
import traceback

# Imported for the fork server's sake; the command line imports them late.
import dist_spin.stages.evaluate
import dist_spin.stages.optimize
import dist_spin.stages.quantize  # noqa: F401
from dist_spin.cli import main
from dist_spin.errors import EXIT_BUG
from dist_spin.signals import STOPPING

PR_SET_PDEATHSIG = 1  # Linux: the signal a process gets when its parent dies


def work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run one command with its output appended to `log`; the process's exit code is the command's."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no job outlives its launcher
    os.setsid()  # ctrl-C reaches the launcher alone, which passes it on once
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    print(f"dist-spin {' '.join(arguments)}", file=sys.stderr, flush=True)
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = EXIT_BUG
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
