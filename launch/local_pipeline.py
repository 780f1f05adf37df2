"""Run stages on this machine, each in processes of its own, one after the other."""

import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from dist_spin.config.run import RunConfig
from dist_spin.errors import EXIT_HANG, EXIT_INTERRUPTED
from dist_spin.launch.next_stage import NextStage
from dist_spin.runtime.processes import LISTENING_SOCKET, TURN, dependent_environment
from dist_spin.runtime.signals import forwarded_to, leave_terminal
from dist_spin.storage.locks import Lock

STAGES = ("optimize", "quantize", "evaluate", "report")
SINGLE_PROCESS = ("report", "export")
NOTICE_S = 5.0  # in which the other ranks notice that one is gone; before they have met, they cannot
GRACE_S = 30.0  # in which they leave after that


class StageRanks:
    """The processes of the stage at work, and the signals that are passed on to them."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: list[int] = []
        self.sent: list[int] = []
        self._starting = False

    def start(self, begin: Callable[[], list[subprocess.Popen[bytes]]]) -> None:
        """Have the processes that `begin` starts do the stage; a signal that comes meanwhile reaches them all."""
        self._starting = True
        self.processes = begin()
        self._starting = False
        self._send()

    def forward(self, number: int, frame: FrameType | None) -> None:
        """A signal handler."""
        if number == signal.SIGHUP:
            leave_terminal()
        self.received.append(number)
        if not self._starting:
            self._send()

    def _send(self) -> None:
        while len(self.sent) < len(self.received):
            number = self.received[len(self.sent)]
            if number == signal.SIGINT and not self.sent:
                number = signal.SIGTERM  # a process that is only starting Python answers SIGINT with a traceback
            self.sent.append(number)
            for process in self.processes:
                process.send_signal(number)


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The stages of a whole run: the export last, if `export.target` names one, so that a missing converter costs no other."""
    return STAGES if config.export.target == "none" else (*STAGES, "export")


def run_stages(arguments: list[str], nproc: int, run: Path, stages: tuple[str, ...]) -> int:
    """Run `stages` in order with the same configuration arguments; returns the first exit code that is not 0.

    Each stage starts `nproc` ranks, those of SINGLE_PROCESS one; those of the next stage import what they need meanwhile
    (launch/next_stage.py). A stopping signal is passed on to all of them, so that the
    stage at work saves and leaves; they do not outlive this process. torchrun is not used here: it turns every failure into
    exit code 1 and a long report, and SIGUSR1 to it would leave the ranks behind.

    run: the run's directory. A lock in it names this process, also between two stages, so that `status` and `cancel` find it.

    Raises:
        Held: another process runs these stages already.
    """
    ranks = StageRanks()
    wanted = {stage: 1 if stage in SINGLE_PROCESS else nproc for stage in stages}
    start = {
        stage: functools.partial(start_ranks, [sys.executable, "-m", "dist_spin", stage, *arguments], count)
        for stage, count in wanted.items()
    }
    with Lock(run / "locks" / "run.lock", "run"), forwarded_to(ranks.forward), NextStage() as following:
        for stage, after in itertools.zip_longest(stages, stages[1:]):
            if ranks.received:
                return EXIT_INTERRUPTED
            ranks.start(functools.partial(following.begin, start[stage]))
            if after:
                following.prepare(start[after], wanted[after])
            code = exit_code(wait(ranks.processes, following.start_when_due), ranks.sent)
            if code:
                return code
    return 0


def start_ranks(command: list[str], nproc: int, turn: int | None = None) -> list[subprocess.Popen[bytes]]:
    """Start `nproc` processes of one stage. turn: a descriptor from which they learn that they may begin; None: at once."""
    more, inherited = ({}, []) if turn is None else ({TURN: str(turn)}, [turn])
    started = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # nobody but this machine has a part in it
        listener.listen()
        for rank, environment in enumerate(environments(nproc, listener)):
            # A session of its own, so that ctrl-C reaches the stage once, through us.
            process = subprocess.Popen(
                command,
                env=os.environ | environment | dependent_environment() | more,
                start_new_session=True,
                pass_fds=inherited if rank else [listener.fileno(), *inherited],
            )
            started.append(process)
    return started


def environments(nproc: int, listener: socket.socket) -> list[dict[str, str]]:
    """What each of `nproc` ranks on this machine finds in its environment, named as torchrun does.

    listener: a listening socket of 127.0.0.1, over which they find each other; rank 0 inherits it.
    """
    if nproc == 1:
        return [{}]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # c10d tells at length who has left
        # All ranks are on this machine, so nothing of them listens to another.
        **{name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
    }
    sockets = [listener.fileno(), *[-1] * (nproc - 1)]
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), LISTENING_SOCKET: str(descriptor), **shared}
        for rank, descriptor in enumerate(sockets)
    ]


def wait(ranks: list[subprocess.Popen[bytes]], meanwhile: Callable[[], None] = lambda: None) -> list[int]:
    """Exit codes of all ranks, EXIT_HANG for those that were stopped here. meanwhile: called now and then.

    Once one has failed, those that have not left NOTICE_S seconds later get SIGTERM, and GRACE_S seconds later SIGKILL.
    """
    failed = 0.0
    stopped: list[subprocess.Popen[bytes]] = []
    while running := [rank for rank in ranks if rank.poll() is None]:
        if not failed and any(rank.poll() for rank in ranks):
            failed = time.monotonic()
        if failed and not stopped and time.monotonic() - failed > NOTICE_S:
            stopped = running
            for rank in running:
                rank.terminate()
        if failed and time.monotonic() - failed > NOTICE_S + GRACE_S:
            for rank in running:
                rank.kill()
        meanwhile()
        time.sleep(0.1)
    by_us = (-signal.SIGTERM, -signal.SIGKILL, EXIT_INTERRUPTED)
    return [EXIT_HANG if rank in stopped and rank.wait() in by_us else rank.wait() for rank in ranks]


def exit_code(codes: list[int], sent: list[int]) -> int:
    """One exit code for all ranks: of the rank that failed, rather than of those that only noticed. sent: signals."""
    failed = sorted((code for code in codes if code), key=lambda code: code == EXIT_HANG)
    if not failed:
        return 0
    if -failed[0] in sent:  # it came before there was anything to save
        return EXIT_INTERRUPTED
    return failed[0] if failed[0] > 0 else 128 - failed[0]
