"""Ranks for the tests: real processes that talk over gloo, as torchrun would start them, at a fraction of its cost.

A fork server imports torch and transformers once; every rank is forked from it in milliseconds.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

PATIENCE = 60.0  # seconds after which a test gives up on a rank

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed settles on a device as soon as it is imported
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        *(f"dist_spin.{stage}" for stage in ("optimize.train", "quantize.stage", "evaluate.stage", "compare.stage")),
        "deepspeed",
        *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "qwen2")),
    ]
)


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """`size` ranks that call `work(*arguments)` and leave with the exit code that it returns."""

    def __init__(self, size: int, work: Callable[..., int | None], *arguments: Any, log: Path) -> None:
        """`log`: a file that takes what all ranks print."""
        self.log = log
        log.unlink(missing_ok=True)
        port = free_port()
        self.ranks = [
            _processes.Process(target=_rank, args=(rank, size, port, str(log), work, arguments)) for rank in range(size)
        ]
        for process in self.ranks:
            process.start()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to the named ranks."""
        for rank in ranks:
            pid = self.ranks[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self) -> list[int | None]:
        """Exit codes of all ranks (negative: killed by that signal) once they have left; those that stay are killed."""
        end = time.monotonic() + PATIENCE
        for process in self.ranks:
            process.join(max(0, end - time.monotonic()))
        stuck = [process for process in self.ranks if process.exitcode is None]
        for process in stuck:
            process.kill()
            process.join()
        assert not stuck, f"{len(stuck)} ranks were still there after {PATIENCE} s:\n{self.log.read_text()}"
        return [process.exitcode for process in self.ranks]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds while the ranks are at work."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"it never came:\n{self.log.read_text()}"
            assert any(p.exitcode is None for p in self.ranks), f"the ranks left before it:\n{self.log.read_text()}"
            time.sleep(0.001)


def _rank(
    rank: int, size: int, port: int, log: str, work: Callable[..., int | None], arguments: tuple[Any, ...]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.exit(work(*arguments))


def command(*words: str) -> int:
    """A rank that runs `dist-spin WORDS`."""
    from dist_spin.cli import main

    return main(list(words))


def one_step(words: list[str], out: Path, reduce: bool) -> None:
    """A rank that does one step by hand and saves to out/RANK.pt what it saw on the way.

    reduce: False leaves out the reduction of the rotations' gradients, to show that the tests would notice.
    """
    from dist_spin.config.loader import load_config
    from dist_spin.optimize import cayley_optimizer as rotation_optimizer
    from dist_spin.optimize.setup import build_training
    from dist_spin.optimize.train import forward_backward
    from dist_spin.runtime import distributed

    config = load_config(None, words)
    world = distributed.start("cpu", 60, 1)
    if not reduce:
        rotation_optimizer.sum_over_ranks_ = lambda buffer: buffer
    learning = build_training(config, world)
    loss = forward_backward(learning)
    learning.engine.assert_sharded(learning.model, world)
    parameters = {
        name: (isinstance(p, DTensor), p.requires_grad, p.to_local().numel(), tuple(p.shape))
        for name, p in learning.model.named_parameters()
    }
    norm = learning.optimizer.reduce_gradients()
    gradient = learning.optimizer.rotations.gradient.clone()
    learning.optimizer.step(config.optimize.lr, norm)
    state = {name: tensor.clone() for name, tensor in learning.optimizer.state().items()}
    caught = {}
    for name, part in (("layer", learning.model.layers[1]), ("head", learning.model.head)):
        part.unshard()
        try:
            learning.engine.assert_sharded(learning.model, world)
        except AssertionError as error:
            caught[name] = str(error)
        part.reshard()
    learning.engine.assert_sharded(learning.model, world)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"loss": loss, "gradient": gradient, "state": state, "parameters": parameters, "caught": caught},
        out / f"{world.rank}.pt",
    )
    distributed.stop()
