"""Run stages on this machine, each in processes of its own, one after the other."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from dist_spin.errors import EXIT_HANG, EXIT_INTERRUPTED
from dist_spin.runtime.signals import STOPPING

STAGES = ("optimize", "quantize", "evaluate", "report")
SINGLE_PROCESS = ("report",)
GRACE_S = 30.0  # in which the other ranks notice that one is gone


def run_stages(arguments: list[str], nproc: int, stages: tuple[str, ...] = STAGES) -> int:
    """Run `stages` in order with the same configuration arguments; returns the first exit code that is not 0.

    Each stage starts `nproc` ranks, those of SINGLE_PROCESS one. A stopping signal is passed on to all of them, so that the stage
    at work saves and leaves. torchrun is not used here: it turns every failure into exit code 1 and a long report, and
    SIGUSR1 to it would leave the ranks behind.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    stopped: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for rank in ranks:
            rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        for stage in stages:
            for environment in environments(1 if stage in SINGLE_PROCESS else nproc):
                command = [sys.executable, "-m", "dist_spin", stage, *arguments]
                # A session of its own, so that ctrl-C reaches the stage once, through us.
                ranks.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
            code = exit_code(wait(ranks), stopped)
            if code:
                return code
            ranks.clear()
            if stopped and stage != stages[-1]:
                return EXIT_INTERRUPTED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def environments(nproc: int) -> list[dict[str, str]]:
    """What each of `nproc` ranks on this machine finds in its environment, named as torchrun does."""
    if nproc == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, **rendezvous} for rank in range(nproc)]


def wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all ranks; once one has failed, those that have not left GRACE_S seconds later are killed."""
    failed = 0.0
    while any(rank.poll() is None for rank in ranks):
        if not failed and any(rank.poll() for rank in ranks):
            failed = time.monotonic()
        if failed and time.monotonic() - failed > GRACE_S:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    return [rank.wait() for rank in ranks]


def exit_code(codes: list[int], stopped: list[int]) -> int:
    """One exit code for all ranks: of the rank that failed, rather than of those that only noticed."""
    failed = sorted((code for code in codes if code), key=lambda code: code == EXIT_HANG)
    if not failed:
        return 0
    if -failed[0] in stopped:  # it came before there was anything to save
        return EXIT_INTERRUPTED
    return failed[0] if failed[0] > 0 else 128 - failed[0]
