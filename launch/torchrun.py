"""torchrun that passes stopping signals on to its ranks and returns their exit code, so that schedulers can act on it.

python -m dist_spin.launch.torchrun --nproc_per_node 2 -m dist_spin optimize configs/quickstart.yaml

torchrun itself returns 1 whatever its ranks return, and dies of SIGUSR1.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import typing
from types import FrameType

from dist_spin.errors import EXIT_HANG, EXIT_INTERRUPTED, EXIT_OK
from dist_spin.runtime import processes, signals
from dist_spin.runtime.processes import children, process_stat

if typing.TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

NOTICE_TIMEOUT_S = 15  # in which torchrun should notice that a rank has failed


def main(arguments: list[str] | None = None) -> int:
    """Run `torchrun ARGUMENTS`; returns 0 or the exit code of the ranks of this host.

    EXIT_INTERRUPTED (75) if any rank saved and left, or was stopped before it could listen; EXIT_HANG (4) if the other
    hosts do not answer; otherwise the code of the first rank that failed, 128 + N if signal N killed it.
    """
    processes.die_with_parent()
    signals.watch()  # before the imports, which take seconds

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    args = parse_args(arguments)
    if args.rdzv_endpoint and not args.local_addr:
        first = args.rdzv_endpoint.rpartition(":")[0]
        args.local_addr = address_towards(first)
        if args.local_addr == socket.gethostbyname(first):
            args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, "is_host=1"]))  # torchrun goes by host names alone
    args.signals_to_handle = "SIGQUIT"  # torchrun would kill its ranks on the others, before they have saved
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    stopped: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signals.leave_terminal()
        if number == signal.SIGINT and not stopped:
            number = signal.SIGTERM  # a process that is only starting Python answers SIGINT with a traceback
        stopped.append(number)
        ranks = children()
        if not ranks:
            signals.leave(f"stopped by {signal.Signals(number).name}; the same command continues", EXIT_INTERRUPTED)
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    for number in signals.STOPPING:
        signals.set_handler(number, forward)
    os.environ |= processes.dependent_environment()  # the ranks inherit it
    threading.Thread(target=_leave_after_unnoticed_failure, daemon=True).start()
    try:
        run(args)
    except ChildFailedError as error:
        return _code(error, stopped)
    except (RendezvousError, DistError) as error:
        problem = str(error).strip().splitlines()[0][:200]
        text = f"host {socket.gethostname()}: the other hosts do not answer ({problem}); start again to resume"
        print(f"dist-spin: {text}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED if stopped else EXIT_HANG
    return EXIT_OK


def address_towards(host: str) -> str:
    """This host's address on its way to `host`; a host's own name may well mean 127.0.0.1 to itself. Sends nothing."""
    family, kind, protocol, _, destination = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(destination)
        return probe.getsockname()[0]


def _leave_after_unnoticed_failure() -> None:
    """End this process once a rank has failed and torchrun takes no notice of it.

    It waits for the store on the first host, for a quarter of an hour if that host was cut off without a word.
    """
    seconds_failed: dict[int, int] = {}  # by process
    while True:
        time.sleep(1)
        failed = {process: code for process in children() if (code := _exit_code(process))}
        seconds_failed = {process: seconds_failed.get(process, 0) + 1 for process in failed}
        unnoticed = [process for process, seconds in seconds_failed.items() if seconds > NOTICE_TIMEOUT_S]
        if unnoticed:
            for process in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            os._exit(failed[unnoticed[0]])


def _exit_code(process: int) -> int:
    """Exit code of a child that has ended and that nobody has waited for; 0 while it runs."""
    stat = process_stat(process)
    return os.waitstatus_to_exitcode(stat.wait_status) % 256 if stat is not None and stat.ended else 0


def _code(error: "ChildFailedError", stopped: list[int]) -> int:
    codes = [failure.exitcode for failure in error.failures.values()]
    if EXIT_INTERRUPTED in codes or any(-number in codes for number in stopped):
        return EXIT_INTERRUPTED  # every step is saved, so a rank that died of the signal itself has lost nothing
    first = error.get_first_failure()[1]
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        text = f"rank {error.get_first_failure()[0]} on host {socket.gethostname()} died of {name}{hint}"
        print(f"dist-spin: {text}; start again to resume", file=sys.stderr, flush=True)
        return 128 - first.exitcode
    return first.exitcode


if __name__ == "__main__":
    sys.exit(main())
