"""Decisions taken from the memory that a device has left, the same on every rank."""

import torch
import torch.distributed as dist

from dist_spin.distributed import World
from dist_spin.model.architecture import Shape
from dist_spin.model.recompute import plan

SPARE_SHARE = 0.06  # of the device's memory, left to the allocator's fragmentation and to NCCL


def recompute_levels(
    setting: str, shape: Shape, tokens: int, dtype: torch.dtype, world: World, *, weights_kept: bool
) -> list[str]:
    """What each layer keeps for the backward pass, once the sharded weights are in memory.

    Args:
        setting: "auto" or a level for all layers (`recompute.LEVELS`).
        tokens: tokens of one pass on one rank.
        weights_kept: whether a layer that computes nothing again also keeps its gathered weights; "auto" avoids that.
    """
    if setting != "auto":
        return [setting] * shape.layers
    if world.device.type == "cpu":
        return ["sites"] * shape.layers
    free, total = torch.cuda.mem_get_info(world.device)
    free += torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    element = dtype.itemsize
    h, i, d = shape.hidden, shape.intermediate, shape.head_dim
    layer_weights = (2 * h * h + 2 * h * shape.kv_heads * d + 3 * h * i) * element
    gathered = 3 * layer_weights if world.size > 1 else 0  # the layer at work, the next one and one being freed
    ends = 2 * shape.vocab * h * element if world.size > 1 else 0
    budget = torch.tensor([free - int(SPARE_SHARE * total) - gathered - ends - (1 << 30)], dtype=torch.int64)
    dist.all_reduce(budget, op=dist.ReduceOp.MIN)
    levels = plan(shape, tokens, element, int(budget))
    return ["sites" if weights_kept and level == "none" else level for level in levels]
