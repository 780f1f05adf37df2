"""Checkpoints of the learning state: written every step while the next one runs, read back newest first."""

import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import CorruptFile, load_tensors

Write = Callable[[dict[str, Tensor], int], None]


class CheckpointWriter:
    """Copies a state to host memory (pinned for CUDA) and writes it while the next step runs.

    Two sets of host buffers: one being written, one being filled. At most one write is under way, so a state is never older
    than one step, and a failed write is raised by the next `submit` or by `flush`.
    """

    def __init__(self, write: Write) -> None:
        """write: called in the thread with the host tensors and the step; must be atomic on disk."""
        self._write = write
        self._buffers: list[dict[str, Tensor]] = [{}, {}]
        self._turn = 0
        self._jobs: queue.Queue[tuple[dict[str, Tensor], int] | None] = queue.Queue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, state: dict[str, Tensor], step: int) -> float:
        """Hand over a state; returns the seconds for which the caller was held up.

        Raises:
            Exception: what an earlier write failed with.
        """
        began = time.monotonic()
        self.flush()
        host = self._buffers[self._turn]
        self._turn = 1 - self._turn
        for name, tensor in state.items():
            if name not in host:
                host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()  # only the copies are still to come: the step was read before
        self._jobs.put((host, step))
        return time.monotonic() - began

    def flush(self) -> None:
        """Wait until all that was submitted is on disk; raises what a write failed with."""
        self._jobs.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Flush and end the thread."""
        try:
            self.flush()
        finally:
            self._jobs.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except Exception as error:
                self._failure = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()


CHECKPOINT = re.compile(r"step_(\d{6,})\.safetensors")


def checkpoint_path(run: RunDir, step: int) -> Path:
    """The file of the state after `step` steps."""
    return run.rotations / f"step_{step:06d}.safetensors"


def checkpoints(run: RunDir) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint file, newest first, whole or not."""
    if not run.rotations.is_dir():
        return []
    steps = [(int(m[1]), p) for p in run.rotations.iterdir() if (m := CHECKPOINT.fullmatch(p.name))]
    return sorted(steps, reverse=True)


def newest_checkpoint(run: RunDir, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The newest checkpoint that is whole; a damaged one is set aside, said through `warn`, and the one before it used."""
    damaged = False
    for _, path in checkpoints(run):
        try:
            return load_tensors(path)
        except CorruptFile as error:
            aside = path.with_suffix(".corrupt")
            os.replace(path, aside)
            warn(f"{error}; kept as {aside.name}, using the checkpoint before it")
            run.event("checkpoint_corrupt", file=path.name, problem=str(error))
            damaged = True
    if damaged:
        warn(f"no checkpoint in {run.rotations} is whole: learning begins again")
    return None


def prune_checkpoints(run: RunDir, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for _, path in checkpoints(run)[keep:]:
        path.unlink(missing_ok=True)
