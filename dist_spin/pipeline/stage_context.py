"""What surrounds every stage that writes into a run: its process group, its lock, and the events of its start and end.

"job" tells on which hosts and devices the stage runs and with which versions; "stage_end" how long it ran and the most memory
that it took; "stage_failed" the error that ended it.
"""

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, RankLost, UserError
from dist_spin.pipeline.dtype import resolve_dtype
from dist_spin.runtime.console import Console
from dist_spin.runtime.distributed import World, lost_rank, on_rank0, start, stop
from dist_spin.runtime.environment import environment
from dist_spin.storage.atomic import remove_leftovers
from dist_spin.storage.locks import stage_lock
from dist_spin.storage.run_directory import RunDir, run_dir

LONGEST_PROBLEM = 500  # characters that are kept of an error's line


@contextlib.contextmanager
def joined(
    config: RunConfig, console: Console, stage: str, part: str = "", *, alone: bool = False
) -> Iterator[tuple[RunConfig, World]]:
    """Around a stage: this process among its ranks, as the one writer of the stage (or a `part` of it) of the run.

    A process group that the program has already is used and left as it is; otherwise one is made, and left at the end.

    Args:
        alone: a group of one, however many processes were started. The rest as `writing`.

    Yields:
        The configuration with its number format resolved, and this process's place.

    Raises:
        RankLost: another rank did not answer in time; the process group is of no more use.
        Held: as `writing`.
        UserError: the device is not there.
    """
    timeout, lost, own_group = config.distributed.timeout_s, None, not dist.is_initialized()
    try:
        world = start(config.distributed.device, timeout, config.distributed.threads, alone=alone)
        console.rank = world.rank
        config = resolve_dtype(config, world)
        with writing(config, world, stage, part):
            yield config, world
    except Exception as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        who = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} on {socket.gethostname()}"
        where = f"no answer from another rank within {timeout} s {console.position()} ({lost})"
        raise RankLost(f"{who}: {where}", "start again to resume") from error
    finally:
        if lost is None and own_group:
            stop()


@contextlib.contextmanager
def writing(config: RunConfig, world: World, stage: str, part: str = "") -> Iterator[None]:
    """Around a stage: rank 0 holds the run's lock of this stage and notes where and with what it runs, and what it took.

    Raises:
        Held: another process works on the same stage or part.
    """
    run = run_dir(config)
    new = on_rank0(lambda: not any((run.path / name).exists() for name in ("config.yaml", "events.jsonl")))
    with contextlib.ExitStack() as held:
        on_rank0(lambda: held.enter_context(stage_lock(run.path, stage, part)))
        on_rank0(lambda: remove_leftovers(run.path))
        start = environment(world)
        on_rank0(lambda: run.event("job", stage=stage, part=part, **start))
        began = time.monotonic()

        def note(outcome: str, memory: dict[str, int]) -> None:
            if world.is_rank0:
                seconds = round(time.monotonic() - began, 3)
                run.event("stage_end", stage=stage, part=part, outcome=outcome, seconds=seconds, **memory)

        try:
            yield
            note("done", peak_memory(world))
        except Interrupted:
            note("interrupted", own_peak_memory(world))  # the others may not have left together
            raise
        except Exception as error:
            if world.is_rank0:
                if isinstance(error, UserError) and new and not (run.path / "config.yaml").exists():
                    (run.path / "events.jsonl").unlink(missing_ok=True)  # a start that failed leaves no event
                else:
                    note_failure(run, stage, part, error)
            raise


def note_failure(run: RunDir, stage: str, part: str, error: Exception) -> None:
    """Write into the run's events why a stage has ended; where that cannot be written, the error itself is what counts."""
    problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, UserError):
        problem = f"{type(error).__name__}: {problem}"
    with contextlib.suppress(OSError, UserError):
        run.event("stage_failed", stage=stage, part=part, problem=problem[:LONGEST_PROBLEM])


def own_peak_memory(world: World) -> dict[str, int]:
    """The most memory that this rank has used so far, bytes: of the host (resident), and of its GPU if it has one."""
    peaks = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    if world.device.type == "cuda":
        peaks["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(world.device)
    return peaks


def peak_memory(world: World) -> dict[str, int]:
    """The same of the rank that used most; every rank calls it."""
    own = own_peak_memory(world)
    most = torch.tensor(list(own.values()))
    if world.size > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return dict(zip(own, most.tolist(), strict=True))
