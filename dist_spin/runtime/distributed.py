"""Process groups, and the few ways in which ranks agree.

The same calls serve a plain `python` process (a group of one), torchrun on one or several hosts, and srun.
"""

import contextlib
import datetime
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_spin.errors import RankFailed, UserError, out_of_memory
from dist_spin.runtime.processes import LISTENING_SOCKET
from dist_spin.runtime.progress import long_step
from dist_spin.runtime.slurm import gpus_not_asked_for

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes files and talks to the user."""
        return self.rank == 0

    def own_range(self, count: int) -> tuple[int, int]:
        """This rank's [start, stop) of `count` items in equal ranges; those of the last ranks are shorter or empty."""
        share = -(-count // self.size)
        return min(self.rank * share, count), min((self.rank + 1) * share, count)


def start(device: str = "auto", timeout_s: int = 600, threads: int = 0, *, alone: bool = False) -> World:
    """Join (or make) the process group and pick this rank's device.

    Args:
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        timeout_s: seconds after which a collective that does not complete counts as a hang.
        threads: intra-op CPU threads; 0 shares this machine's cores between its ranks.
        alone: make a group of one, however many processes were started: they share the devices, and no work.

    Raises:
        UserError: cuda was asked for and there is none, this host starts more ranks than it has GPUs, or a Slurm job asked for
            no GPU on a node that has some, where it would compute on the CPU for weeks.
    """
    env = os.environ
    group = 0 if alone else next(_groups)  # counted before anything can fail on one rank only
    rank = int(env.get("RANK", env.get("SLURM_PROCID", 0)) if "WORLD_SIZE" in env or "SLURM_STEP_ID" in env else 0)
    size = int(env.get("WORLD_SIZE", env.get("SLURM_STEP_NUM_TASKS", 1) if "SLURM_STEP_ID" in env else 1))
    local_rank = int(env.get("LOCAL_RANK", env.get("SLURM_LOCALID", 0)))
    local_size = int(env.get("LOCAL_WORLD_SIZE", 1))
    if alone:
        rank, size = 0, 1
        env.update(RANK="0", WORLD_SIZE="1")  # for libraries that ask there
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and (gpus := gpus_not_asked_for()):
            problem = f"this job asked Slurm for no GPU, and its node has {gpus}"
            raise UserError(problem, "ask for GPUs (--gpus-per-node=N), or compute without: distributed.device=cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("distributed.device is cuda but torch sees no GPU", "use distributed.device=cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}",
                "start at most one process per GPU (--nproc_per_node)",
            )
        device_here = torch.device("cuda", local_rank)
        torch.cuda.set_device(device_here)
    else:
        device_here = torch.device("cpu")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads or max(1, cores // local_size))
    if not dist.is_initialized():
        # CPU tensors always travel by gloo, so objects and flags need no GPU.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        if size == 1:
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else has a part in it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            env.setdefault("RANK", str(rank))
            env.setdefault("WORLD_SIZE", str(size))
            with long_step(f"wait for all {size} ranks to start"):
                store = inherited_store(rank, size, timeout) or environment_store(timeout, group)
                # Whoever is missing is noticed before torch counts its groups, which it does for each process by itself.
                store.set(f"here/{rank}", "")
                store.wait([f"here/{other}" for other in range(size)], timeout)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    if size > 1 and "LOCAL_WORLD_SIZE" not in env:  # Slurm's own start does not set it
        hosts: list[str] = [""] * size
        dist.all_gather_object(hosts, socket.gethostname())
        local_size = hosts.count(socket.gethostname())
    return World(rank, size, local_rank, local_size, device_here)


def inherited_store(rank: int, size: int, timeout: datetime.timedelta) -> dist.TCPStore | None:
    """The store that rank 0 serves at a socket which a launcher on this machine opened; None without such a launcher.

    torch's own listens on every interface, and its port may be taken by another program before it does.
    """
    descriptor = os.environ.pop(LISTENING_SOCKET, "")
    if not descriptor:
        return None
    port = int(os.environ["MASTER_PORT"])
    listening = int(descriptor) if rank == 0 else None
    return dist.TCPStore(
        "127.0.0.1", port, size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening
    )


_met: list[dist.Store] = []  # the store over which the ranks of the environment have met, once they have
_groups = itertools.count()


def environment_store(timeout: datetime.timedelta, group: int) -> dist.Store:
    """The store that torchrun's variables name, for process group number `group` of this process, the same on all ranks.

    A process that starts one stage after another (`dist_spin.Run`) makes a group for each. They share the connection, because
    its port may not be free again yet, and each has its own keys in it, because those of the last group are still there.
    """
    if not _met:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        _met.append(store)
    return dist.PrefixStore(f"dist_spin/{group}", _met[0])


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_rank(error: BaseException) -> str | None:
    """What torch says, in one line, where another rank did not answer in time or its connection broke; None if `error` is
    something else.

    NCCL and the store raise types of their own. Gloo raises a plain RuntimeError whatever went wrong: a peer that has left, a
    time-out and our own mistakes (sizes that differ between ranks). Only its message tells them apart, by the file of gloo's
    transport that it begins with and by "enforce fail" where gloo refuses what it was given.
    """
    text = str(error).strip()
    lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or (
        isinstance(error, dist.DistBackendError) and "ncclInvalid" not in text
    )
    if type(error) is RuntimeError:
        lost = "gloo/transport/" in text and "enforce fail" not in text
    return text.splitlines()[0][:200] if lost and text else None


_apart = threading.local()  # its `now`: whether this thread counts as alone at the moment (`apart`)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within the block this thread is a group of one: no function of this module waits for other ranks, whose work differs."""
    before, _apart.now = _is_apart(), True
    try:
        yield
    finally:
        _apart.now = before


def _is_apart() -> bool:
    return getattr(_apart, "now", False)


def work_apart(action: Callable[[], None], every: float = 10.0) -> None:
    """Run `action` on every rank as within `apart`, and return once it is over on all of them, however long each takes.

    Meanwhile a thread of each rank agrees with those of the others that there still is work, so that no rank that waits takes
    slow work elsewhere for a hang. A rank that dies is noticed as in every collective. Threads meet as soon as the last rank
    is done.

    every: seconds between two agreements; well below the group's timeout.

    Raises:
        Exception: what `action` raised here, once all are done; or, once it is over here, that another rank was lost.
    """
    over, left = threading.Event(), threading.Event()
    lost: list[Exception] = []

    def meet() -> None:
        try:
            while any_rank(not over.wait(every) and not left.is_set()) and not left.is_set():
                pass
        except Exception as error:
            lost.append(error)

    meeting = threading.Thread(target=meet, name="work apart", daemon=True)
    meeting.start()
    failure: Exception | None = None
    try:
        with apart():
            action()
    except Exception as error:
        failure = error
    except BaseException:  # ctrl-C in a notebook: this rank leaves, and the others notice
        left.set()
        raise
    finally:
        over.set()
    meeting.join()
    if lost:
        raise lost[0] from failure
    if failure is not None:
        raise failure


def group_size() -> int:
    """Ranks that agree and share work at the moment."""
    return 1 if _is_apart() else dist.get_world_size()


def group_rank() -> int:
    """This process's number among them."""
    return 0 if _is_apart() else dist.get_rank()


def any_rank(flag: bool) -> bool:  # noqa: FBT001 (its only argument)
    """Whether `flag` is set on any rank; every rank gets the same answer. Ask before any branch that leads to a collective."""
    return bool(max_over_ranks(int(flag)))


def max_over_ranks(value: int) -> int:
    """The largest of the 63-bit `value` that each rank gives, on every rank."""
    if group_size() == 1:
        return value
    largest = torch.tensor([value])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_ranks_equal(value: int) -> bool:
    """Whether every rank holds the same 63-bit `value` (a hash, a step); the answer is the same everywhere."""
    if group_size() == 1:
        return True
    both = torch.tensor([value, -value], dtype=torch.int64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return int(both[0]) == -int(both[1])


def on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and hand its result to every rank; an error there is raised everywhere."""
    box: list[T | BaseException | None] = [None]
    if group_rank() == 0:
        try:
            box[0] = action()
        except Exception as error:
            box[0] = error
    if group_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError) and group_size() > 1:  # alone, each process speaks for itself
        raise box[0].as_shared()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def raise_on_any_failure(action: Callable[[], None]) -> None:
    """Run `action` on every rank; if it fails anywhere, every rank raises, so that none is left waiting in a collective.

    All raise the mistake of the first rank that failed, and so end with one exit code; rank 0 says it. A bug of ours (any
    error that is none of the user's) goes before: its rank raises it, the others `RankFailed`.
    """
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        if lost_rank(error):
            raise  # there is nobody to agree with
        failure = out_of_memory(error) or error
    rank, size = group_rank(), group_size()
    if size == 1:
        if failure is not None:
            raise failure
        return
    none = 2 * size
    bug = failure is not None and not isinstance(failure, UserError)
    order = torch.tensor([none if failure is None else rank if bug else size + rank])
    dist.all_reduce(order, op=dist.ReduceOp.MIN)
    first = int(order)
    if first == none:
        return
    if first < size:
        if failure is not None and bug:
            raise failure
        raise RankFailed(f"rank {first} failed (its traceback says why)", "it is a bug of ours") from failure
    raise _mistake_of(first - size, failure) from failure


def made_on_all(make: Callable[[], T]) -> T:
    """What `make` returns on this rank; where it fails on any, every rank raises as in `raise_on_any_failure`."""
    made: list[T] = []
    raise_on_any_failure(lambda: made.append(make()))
    return made[0]


def taken_together(products: Iterator[T]) -> Iterator[T]:
    """`products`, of which every rank has as many; where one cannot be had on any rank, every rank raises, as above."""
    while taken := made_on_all(lambda: list(itertools.islice(products, 1))):
        yield taken.pop()


def _mistake_of(rank: int, own: Exception | None) -> UserError:
    """The UserError `own` of one rank, on all of them."""
    here = f"rank {rank} on {socket.gethostname()}: " if rank and isinstance(own, UserError) and not own.shared else ""
    box = [(own, here) if group_rank() == rank else None]
    dist.broadcast_object_list(box, src=rank)
    assert box[0] is not None
    mistake, where = box[0]
    assert isinstance(mistake, UserError)
    return type(mistake)(where + mistake.problem, mistake.remedy, shared=True) if where else mistake.as_shared()


def sum_over_ranks_(buffer: Tensor) -> Tensor:
    """Sum `buffer` over all ranks in place; identical bits on every rank.

    CPU buffers are summed in fp64 in the fixed order of ranks, so that a run is reproducible bit by bit on any network.
    """
    if group_size() == 1:
        return buffer
    if buffer.is_cuda:
        dist.all_reduce(buffer)
        return buffer
    parts = gather_parts(buffer)
    total = parts[0].double()
    for part in parts[1:]:
        total += part.double()
    return buffer.copy_(total)


def gather_parts(part: Tensor) -> list[Tensor]:
    """Every rank's `part`, in the order of ranks, on every rank; all of one shape and contiguous in one buffer."""
    size = group_size()
    whole = part.new_empty(size * part.shape[0], *part.shape[1:]) if part.dim() else part.new_empty(size)
    parts = [p.view(part.shape) for p in whole.chunk(size)]
    dist.all_gather(parts, part.contiguous())
    return parts
