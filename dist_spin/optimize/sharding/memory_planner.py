"""Decisions taken from the memory that a device has left, the same on every rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_spin.errors import UserError
from dist_spin.model.activation_checkpoint import kept_bytes, plan
from dist_spin.model.architecture import Shape
from dist_spin.runtime.device_memory import device_bytes_free
from dist_spin.runtime.distributed import World
from dist_spin.runtime.host_memory import host_bytes_free

SPARE_SHARE = 0.06  # of the device's memory, left to the allocator's fragmentation and to NCCL
MOST_TOKENS = 8192  # of one pass: beyond, products are as fast as they get, and only temporaries grow
# What a layer costs in one pass, in tokens that it could handle in that time; measured on the Llama-3 shapes on H200s.
LAUNCH_COST = 400  # launching and gathering
H2D_COST = 10000  # a layer's way from the host, forward and backward
PIN_COST = 3000  # moving a layer there at the start, shared out over a hundred steps
RECOMPUTE_COST = {"none": 0.0, "sites": 0.2, "layer": 0.36}  # recomputation, as a share of a token
COPIES = 3  # of a layer that is gathered: the layer at work, the next one and one being freed
HOST_SHARE = 0.4  # of the host's free memory that layers may take for speed alone: pinning more takes long


@dataclass(frozen=True)
class Workload:
    """What one rank does in a step, as far as its memory and its time depend on it.

    sequences: of one rank, each of seq_len tokens. shards: ranks that one copy of the weights is spread over.
    transformed: scales or clips are learned too. micro: sequences of one pass, 0: what promises the shortest step.
    recompute: "auto" or a level (`activation_checkpoint.LEVELS`). block: of the rotations, 0 for whole ones.
    """

    shape: Shape
    sequences: int
    seq_len: int
    dtype: torch.dtype
    shards: int = 1
    w_bits: int = 16
    compiled: bool = True
    transformed: bool = False
    micro: int = 0
    recompute: str = "auto"
    block: int = 0

    @property
    def rotations(self) -> int:
        """Bytes of the rotations: masters, gradients, Cayley's and the writer's copies, of blocks alone where there are any."""
        h, d = self.shape.hidden, self.shape.head_dim
        return 12 * 4 * (h * min(h, self.block or h) + self.shape.layers * d * min(d, self.block or d))

    @property
    def kind(self) -> dict[str, bool]:
        """What `kept_bytes` asks beside sizes, by keyword."""
        return {
            "compiled": self.compiled,
            "fake_quant_linears": self.w_bits < 16,
            "transformed": self.transformed,
        }

    @property
    def layer(self) -> int:
        """Bytes of one layer's weights on this rank."""
        return -(-layer_bytes(self.shape, self.dtype, self.w_bits) // self.shards)

    def reserved(self, total: int) -> int:
        """Bytes of a device of `total` that activations may not take, beside sharded weights and rotations.

        Gathered layers, embedding and head among them: one rank alone copies them likewise.
        """
        layer = layer_bytes(self.shape, self.dtype, self.w_bits)
        gathered = COPIES * layer + 2 * self.shape.vocab * self.shape.hidden * self.dtype.itemsize
        gathered += layer if self.w_bits < 16 else 0  # what codes are decoded to, and what is quantised
        return int(SPARE_SHARE * total) + gathered + (1 << 30)

    def activation_bytes(self, size: int, level: str) -> int:
        """Bytes that one layer keeps of a pass of `size` sequences."""
        return kept_bytes(self.shape, size * self.seq_len, self.dtype.itemsize, level, **self.kind)

    def levels(self, size: int, budget: int) -> list[str]:
        """What each layer keeps of a pass of `size` sequences where `budget` bytes may hold activations."""
        if self.recompute != "auto":
            return [self.recompute] * self.shape.layers
        return plan(self.shape, size * self.seq_len, self.dtype.itemsize, budget, **self.kind)

    def fits(self, size: int, budget: int) -> bool:
        """Whether a pass of `size` sequences stays within `budget` bytes."""
        needed = sum(
            self.activation_bytes(size, level) for level in self.levels(size, budget)
        ) + 2 * self.activation_bytes(size, "none")
        return needed <= budget

    def cost(self, size: int, budget: int, offloaded: int) -> float:
        """Time of a step in passes of `size` sequences, in tokens that one layer handles in that time."""
        computed = sum(
            size * self.seq_len * (1 + RECOMPUTE_COST[level]) + LAUNCH_COST for level in self.levels(size, budget)
        )
        copied = offloaded * H2D_COST / self.shards
        # One rank copies the next layer while one computes (prefetch.py); with several ranks no overlap was measured.
        return -(-self.sequences // size) * (max(computed, copied) if self.shards == 1 else computed + copied)


def layer_bytes(shape: Shape, dtype: torch.dtype, w_bits: int = 16) -> int:
    """Bytes of one decoder layer's weights, and of their codes where they are learned with."""
    weights = shape.weights + shape.hidden * shape.experts  # a router's are not rounded, but few
    return weights * dtype.itemsize + (0 if w_bits == 16 else weights // 2 if w_bits <= 4 else weights)


def layers_to_offload(setting: int, workload: Workload, world: World, *, to_disk: bool) -> list[int]:
    """The layers whose frozen weights stay in pinned host memory and visit the device, spread evenly over the depth.

    Args:
        setting: their number, or -1: as many as do not fit beside the activations of one pass, or more where that
            promises a shorter step, since a layer that comes from the host leaves the others room to keep more.
        to_disk: they stay on a disk instead, which helps a CPU as well.

    Raises:
        UserError: the host has no room for them.
    """
    if world.device.type == "cpu" and (setting < 0 or not to_disk):
        return []
    # Of the host that has the least, for the host that needs the most: all ranks decide alike.
    host, layers = -_largest_over_ranks(-host_bytes_free()), workload.shape.layers
    each = _largest_over_ranks(workload.layer * world.local_size)
    if setting < 0:
        room = 0 if to_disk else min(layers, int(HOST_SHARE * host) // each)
        total = torch.cuda.get_device_properties(world.device).total_memory
        setting = _largest_over_ranks(fewest_or_fastest(workload, device_bytes_free(world.device), total, room))
    count = min(setting, layers)
    if count * each > host and not to_disk:
        raise UserError(
            f"{count} of {layers} layers do not fit on the GPU and need {count * each >> 30} GiB of host memory, of which "
            f"{host >> 30} GiB are free",
            "use more GPUs, a host with more memory, or a smaller optimize.batch_size",
            shared=True,
        )
    return [layers * k // count for k in range(count)]


def fewest_or_fastest(workload: Workload, free: int, total: int, room: int) -> int:
    """How many layers to keep off a device with `free` of `total` bytes: as many as do not fit, or as promise most.

    room: how many the host takes for speed alone.
    """
    h, layers = workload.shape.hidden, workload.shape.layers
    embedding_and_head = 2 * workload.shape.vocab * h * workload.dtype.itemsize // workload.shards
    free -= embedding_and_head + workload.rotations + workload.reserved(total)

    def budget(offloaded: int) -> int:
        return free - (layers - offloaded) * workload.layer

    def cost(offloaded: int) -> float:
        size, _ = within(workload, budget(offloaded), offloaded)
        return workload.cost(size, budget(offloaded), offloaded) + offloaded * PIN_COST

    fewest = next((n for n in range(layers) if workload.fits(within(workload, budget(n), n)[0], budget(n))), layers)
    return min(range(fewest, max(fewest, room) + 1), key=cost)


def micro_batch_and_levels(workload: Workload, world: World, offloaded: int) -> tuple[int, list[str]]:
    """Sequences of one pass and what each layer keeps of it, once the sharded weights are in memory.

    offloaded: layers whose weights come from the host in each pass.
    """
    if world.device.type == "cpu":
        level = "sites" if workload.recompute == "auto" else workload.recompute
        return workload.micro or 1, [level] * workload.shape.layers
    return within(workload, _activation_budget(workload, world), offloaded)


def within(workload: Workload, budget: int, offloaded: int = 0) -> tuple[int, list[str]]:
    """`micro_batch_and_levels` where `budget` bytes may hold activations. Fewer sequences at once keep more of each."""
    micro = workload.micro
    if not micro:
        # Only sizes that need fewer passes than the next smaller one: 8 sequences at 3 a pass take as long as at 4.
        sizes = {-(-workload.sequences // micro_batches) for micro_batches in range(1, workload.sequences + 1)}
        fitting = (
            size for size in sorted(sizes) if size * workload.seq_len <= MOST_TOKENS and workload.fits(size, budget)
        )
        micro = min(fitting, key=lambda size: workload.cost(size, budget, offloaded), default=1)
    return micro, workload.levels(micro, budget)


def _activation_budget(workload: Workload, world: World) -> int:
    """Bytes for activations on the rank that has the fewest."""
    total = torch.cuda.get_device_properties(world.device).total_memory
    return -_largest_over_ranks(workload.reserved(total) - device_bytes_free(world.device))


def _largest_over_ranks(number: int) -> int:
    value = torch.tensor([number], dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
