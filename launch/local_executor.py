"""Jobs of a fan-out as processes of this machine."""

import multiprocessing
import os
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from dist_spin.config.run import RunConfig
from dist_spin.errors import EXIT_HANG, UserError
from dist_spin.launch.jobs import Task
from dist_spin.launch.worker import work
from dist_spin.runtime.processes import PARENT, dependent_environment

START_ATTEMPTS = 5
# What the fork server imports, in this order, so that its jobs find it there.
PRELOADED = [f"dist_spin.launch.{name}" for name in ("fork_server", "worker", "preload")]


class ForkServerLost(UserError):
    """The process that jobs are forked from is gone, again and again."""

    exit_code = EXIT_HANG


class LocalExecutor:
    """Jobs as processes of this machine, one per GPU, or one per core where there is no GPU."""

    def __init__(self, arguments: list[str], config: RunConfig, logs: Path, workers: int) -> None:
        """workers: jobs at a time; 0 for as many as there are GPUs or cores.

        Raises:
            UserError: more workers than GPUs.
        """
        self._arguments, self._logs = arguments, logs
        gpus = visible_gpus() if config.distributed.device != "cpu" else []
        cores = len(os.sched_getaffinity(0))
        self.slots = workers or len(gpus) or cores
        if gpus and self.slots > len(gpus):
            raise UserError(f"--workers is {self.slots}, but this machine shows {len(gpus)} GPUs", "use at most that")
        # A child of the fork server must not inherit a CUDA context, so with GPUs every job starts afresh.
        self._context: Any = multiprocessing.get_context("spawn" if gpus else "forkserver")
        if not gpus:
            self._context.set_forkserver_preload(PRELOADED)
        self._environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: self.slots]] or [{}] * self.slots
        self._threads = config.distributed.threads or max(1, cores // self.slots)
        self._running: dict[int, tuple[Task, BaseProcess]] = {}  # by slot

    def start(self, task: Task) -> None:
        """Begin a job in a free slot."""
        slot = next(i for i in range(self.slots) if i not in self._running)
        self._logs.mkdir(parents=True, exist_ok=True)
        words = ["quantize", *self._arguments, f"distributed.threads={self._threads}", *task.arguments]
        log = str(self._logs / f"quantize_{task.name}.log")
        os.environ.update(self._environments[slot])  # inherited, so that it holds before anything can ask for a GPU
        self._running[slot] = (task, self._start(words, log))

    def _start(self, words: list[str], log: str) -> BaseProcess:
        """A process that does `words`; if the fork server was killed, multiprocessing starts another when asked again.

        Raises:
            ForkServerLost: it does not come back.
        """
        for _ in range(START_ATTEMPTS):
            process = self._context.Process(target=work, args=(words, log))
            os.environ |= dependent_environment()  # the fork server inherits it
            try:
                process.start()
                return process
            except (EOFError, OSError) as error:
                failure = error
                time.sleep(0.2)
            finally:
                del os.environ[PARENT]
        raise ForkServerLost(f"no job can be started ({type(failure).__name__}: {failure})", "start again to resume")

    def wait(self, seconds: float) -> Iterable[tuple[Task, int]]:
        """Jobs that ended, with their exit codes (negative: killed by that signal)."""
        wait([process.sentinel for _, process in self._running.values()], seconds)
        for slot, (task, process) in list(self._running.items()):
            if process.exitcode is not None:
                del self._running[slot]
                yield task, process.exitcode

    def stop(self) -> None:
        """Ask every running job to finish its layer and leave."""
        for _, process in self._running.values():
            process.terminate()


def visible_gpus() -> list[str]:
    """The GPUs jobs may use, as CUDA_VISIBLE_DEVICES names them; asked without making a CUDA context."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return [str(i) for i in range(torch.cuda.device_count())]
