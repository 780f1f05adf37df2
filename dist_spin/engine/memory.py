"""Decisions taken from the memory that a device has left, the same on every rank."""

import os

import torch
import torch.distributed as dist

from dist_spin.distributed import World
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.recompute import kept_bytes, plan

SPARE_SHARE = 0.06  # of the device's memory, left to the allocator's fragmentation and to NCCL
TOKENS_AT_ONCE = 8192  # of one pass: beyond, products are as fast as they get
TOKENS_AT_ONCE_OFFLOADED = 16384  # fewer passes, since each moves every offloaded layer twice


def layer_bytes(shape: Shape, dtype: torch.dtype, w_bits: int = 16) -> int:
    """Bytes of one decoder layer's weights, and of their codes where they are learned with."""
    h, i, d = shape.hidden, shape.intermediate, shape.head_dim
    weights = 2 * h * shape.heads * d + 2 * h * shape.kv_heads * d + 3 * h * i
    return weights * dtype.itemsize + (0 if w_bits == 16 else weights // 2 if w_bits <= 4 else weights)


def layers_to_offload(
    setting: int, shape: Shape, tokens: int, dtype: torch.dtype, w_bits: int, to_disk: bool, world: World, shards: int
) -> list[int]:
    """The layers whose frozen weights stay in pinned host memory and visit the device, spread evenly over the depth.

    Args:
        setting: their number, or -1: as many as do not fit beside the activations of one pass.
        tokens: tokens that one rank handles in a step.
        to_disk: they stay on a disk instead, which helps a CPU as well.
        shards: ranks that one copy of the weights is spread over.

    Raises:
        UserError: the host has no room for them.
    """
    if world.device.type == "cpu" and (setting < 0 or not to_disk):
        return []
    layer = layer_bytes(shape, dtype, w_bits)
    mine = -(-layer // shards)
    if setting < 0:
        free, total = torch.cuda.mem_get_info(world.device)
        h = shape.hidden
        at_once = min(tokens, TOKENS_AT_ONCE_OFFLOADED)
        activations = shape.layers * kept_bytes(shape, at_once, dtype.itemsize, "layer")
        activations += 2 * kept_bytes(shape, at_once, dtype.itemsize, "none")
        rotations = (
            12 * 4 * (h * h + shape.layers * shape.head_dim**2)
        )  # masters, gradients, Cayley's and writer's copies
        ends = 2 * shape.vocab * h * dtype.itemsize
        reserve = activations + rotations + 3 * layer + ends + int(SPARE_SHARE * total) + (1 << 30)
        missing = shape.layers * mine + ends // shards + reserve - free
        setting = _largest_over_ranks(max(0, -(-missing // mine)))
    count = min(setting, shape.layers)
    host = _host_bytes_free()
    if count * mine * world.local_size > host and not to_disk:
        raise UserError(
            f"{count} of {shape.layers} layers do not fit on the GPU and need {count * mine * world.local_size >> 30} GiB of "
            f"host memory, of which {host >> 30} GiB are free",
            "use more GPUs, a host with more memory, or a smaller optimize.batch_size",
        )
    return [shape.layers * k // count for k in range(count)]


def passes_and_levels(
    micro: int,
    recompute: str,
    shape: Shape,
    mine: int,
    seq_len: int,
    dtype: torch.dtype,
    world: World,
    shards: int,
    *,
    offloaded: bool,
    compiled: bool,
) -> tuple[int, list[str]]:
    """Sequences of one pass and what each layer keeps of it, once the sharded weights are in memory.

    Args:
        micro: sequences of one pass, or 0: as many as pay and fit. recompute: "auto" or a level (`recompute.LEVELS`).
        mine: sequences that one rank handles in a step. shards: ranks that one copy of the weights is spread over.
    """
    if world.device.type == "cpu":
        return micro or 1, ["sites" if recompute == "auto" else recompute] * shape.layers
    budget = _budget(shape, dtype, offloaded, world, shards)
    return within(budget, micro, recompute, shape, mine, seq_len, dtype, offloaded=offloaded, compiled=compiled)


def within(
    budget: int,
    micro: int,
    recompute: str,
    shape: Shape,
    mine: int,
    seq_len: int,
    dtype: torch.dtype,
    *,
    offloaded: bool,
    compiled: bool,
) -> tuple[int, list[str]]:
    """`passes_and_levels` where `budget` bytes may hold activations."""

    def fits(size: int, level: str) -> bool:
        kept, working = (kept_bytes(shape, size * seq_len, dtype.itemsize, how, compiled) for how in (level, "none"))
        return shape.layers * kept + 2 * working <= budget

    if not micro:
        most = TOKENS_AT_ONCE_OFFLOADED if offloaded else TOKENS_AT_ONCE
        sizes = [size for size in range(mine, 0, -1) if size * seq_len <= most]
        levels = ("sites", "layer") if recompute == "auto" else (recompute,)
        micro = next((size for level in levels for size in sizes if fits(size, level)), 1)
        micro = -(-mine // -(-mine // micro))  # equal passes: 8 sequences at 3 a pass take as long as at 4
    if recompute != "auto":
        return micro, [recompute] * shape.layers
    return micro, plan(shape, micro * seq_len, dtype.itemsize, budget, compiled)


def _budget(shape: Shape, dtype: torch.dtype, offloaded: bool, world: World, shards: int) -> int:
    """Bytes for activations on the rank that has the fewest."""
    free, total = torch.cuda.mem_get_info(world.device)
    free += torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    taken = reserved(shape, dtype, total, copies=shards > 1 or offloaded, ends=shards > 1)
    return -_largest_over_ranks(taken - free)


def reserved(shape: Shape, dtype: torch.dtype, total: int, *, copies: bool, ends: bool) -> int:
    """Bytes of a device of `total` that activations may not take, beside sharded weights and rotations.

    copies: layers are gathered (or copied in) to be used. ends: so are embedding and head.
    """
    gathered = 3 * layer_bytes(shape, dtype) if copies else 0  # the layer at work, the next one and one being freed
    gathered += 2 * shape.vocab * shape.hidden * dtype.itemsize if ends else 0
    return int(SPARE_SHARE * total) + gathered + (1 << 30)


def _largest_over_ranks(number: int) -> int:
    value = torch.tensor([number], dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _host_bytes_free() -> int:
    """MemAvailable, which counts caches that can be dropped; the physical memory where the kernel does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
