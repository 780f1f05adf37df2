"""Run stages on this machine, each in processes of its own, one after the other."""

import os
import signal
import subprocess
import sys
from types import FrameType

STAGES = ("optimize", "quantize", "evaluate")


def run_stages(arguments: list[str], nproc: int, stages: tuple[str, ...] = STAGES) -> int:
    """Run `stages` in order with the same configuration arguments; returns the first exit code that is not 0.

    Each stage starts `nproc` ranks through torchrun. A stopping signal is passed on, so that the stage at work saves and
    leaves.
    """
    child: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in child:
            process.send_signal(number)

    kept = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        for stage in stages:
            command = [*python_command(nproc), "-m", "dist_spin", stage, *arguments]
            # A session of its own, so that ctrl-C reaches the stage once, through us.
            child[:] = [subprocess.Popen(command, env=os.environ, start_new_session=True)]
            code = child[0].wait()
            if code:
                return code if code > 0 else 128 - code
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return 0


def python_command(nproc: int) -> list[str]:
    """The start of a command that runs a Python module in `nproc` ranks on this machine."""
    if nproc == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
