"""Decisions taken from the memory that a device has left, the same on every rank."""

import os

import torch
import torch.distributed as dist

from dist_spin.distributed import World
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.recompute import LEVELS, kept_bytes, plan

SPARE_SHARE = 0.06  # of the device's memory, left to the allocator's fragmentation and to NCCL
MOST_TOKENS = 8192  # of one pass: beyond, products are as fast as they get, and temporaries outgrow the spare
# What a layer costs in one pass, in tokens that it could handle in that time; measured on the Llama-3 shapes on H200s.
PASS = 320  # launching and gathering
PASS_OFFLOADED = 8192  # of a layer that comes from the host
AGAIN = {"none": 0.0, "sites": 0.14, "layer": 0.4}  # recomputation, as a share of a token
COPIES = 3  # of a layer that is gathered: the layer at work, the next one and one being freed


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
        at_once = min(tokens, MOST_TOKENS)
        activations = shape.layers * kept_bytes(shape, at_once, dtype.itemsize, "layer")
        activations += 2 * kept_bytes(shape, at_once, dtype.itemsize, "none")
        # masters, gradients, Cayley's and writer's copies
        rotations = 12 * 4 * (h * h + shape.layers * shape.head_dim**2)
        ends = 2 * shape.vocab * h * dtype.itemsize // shards
        missing = shape.layers * mine + ends + activations + rotations + reserved(shape, dtype, w_bits, total) - free
        setting = _largest_over_ranks(max(0, -(-missing // mine)))
    count = min(setting, shape.layers)
    host = host_bytes_free()
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
    *,
    offloaded: int,
    compiled: bool,
    w_bits: int = 16,
    transformed: bool = False,
) -> tuple[int, list[str]]:
    """Sequences of one pass and what each layer keeps of it, once the sharded weights are in memory.

    Args:
        micro: sequences of one pass, or 0: what promises the shortest step. Fewer keep more of their activations, so that
            less is computed twice. recompute: "auto" or a level (`recompute.LEVELS`).
        mine: sequences that one rank handles in a step.
        offloaded: layers whose weights come from the host in each pass.
        transformed: scales or clips are learned too.
    """
    if world.device.type == "cpu":
        return micro or 1, ["sites" if recompute == "auto" else recompute] * shape.layers
    budget = _budget(shape, dtype, w_bits, world)
    return within(
        budget,
        micro,
        recompute,
        shape,
        mine,
        seq_len,
        dtype,
        offloaded=offloaded,
        compiled=compiled,
        w_bits=w_bits,
        transformed=transformed,
    )


def within(
    budget: int,
    micro: int,
    recompute: str,
    shape: Shape,
    mine: int,
    seq_len: int,
    dtype: torch.dtype,
    *,
    offloaded: int,
    compiled: bool,
    w_bits: int = 16,
    transformed: bool = False,
) -> tuple[int, list[str]]:
    """`passes_and_levels` where `budget` bytes may hold activations."""
    kind = (compiled, w_bits < 16, transformed)

    def levels(size: int) -> list[str]:
        if recompute != "auto":
            return [recompute] * shape.layers
        return plan(shape, size * seq_len, dtype.itemsize, budget, *kind)

    def fits(size: int) -> bool:
        need = {level: kept_bytes(shape, size * seq_len, dtype.itemsize, level, *kind) for level in LEVELS}
        return size * seq_len <= MOST_TOKENS and sum(need[level] for level in levels(size)) + 2 * need["none"] <= budget

    def cost(size: int) -> float:
        own = sum(size * seq_len * (1 + AGAIN[level]) + PASS for level in levels(size))
        return -(-mine // size) * (own + offloaded * PASS_OFFLOADED)

    if not micro:
        equal = {-(-mine // passes) for passes in range(1, mine + 1)}  # 8 sequences at 3 a pass take as long as at 4
        micro = min((size for size in sorted(equal) if fits(size)), key=cost, default=1)
    return micro, levels(micro)


def _budget(shape: Shape, dtype: torch.dtype, w_bits: int, world: World) -> int:
    """Bytes for activations on the rank that has the fewest."""
    free, total = torch.cuda.mem_get_info(world.device)
    free += torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    return -_largest_over_ranks(reserved(shape, dtype, w_bits, total) - free)


def reserved(shape: Shape, dtype: torch.dtype, w_bits: int, total: int) -> int:
    """Bytes of a device of `total` that activations may not take, beside sharded weights and rotations.

    Gathered layers, embedding and head among them: one rank alone copies them likewise.
    """
    layer = layer_bytes(shape, dtype, w_bits)
    gathered = COPIES * layer + 2 * shape.vocab * shape.hidden * dtype.itemsize
    gathered += layer if w_bits < 16 else 0  # what codes are turned back into, and what grids are fitted to
    return int(SPARE_SHARE * total) + gathered + (1 << 30)


def _largest_over_ranks(number: int) -> int:
    value = torch.tensor([number], dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def host_bytes_free() -> int:
    """MemAvailable, which counts caches that can be dropped; the physical memory where the kernel does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
