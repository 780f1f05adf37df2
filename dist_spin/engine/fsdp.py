"""FSDP2: the frozen weights sharded over all ranks, gathered a layer at a time; rotations stay replicated outside."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_spin.distributed import World
from dist_spin.engine.weight_grids import fit_grids
from dist_spin.model.learning import LearningModel, parameter_source
from dist_spin.model.loading import WeightSource
from dist_spin.model.rotation import folded_rows

name = "fsdp"
keeps_gathered = False  # a gather fills the storage that autograd holds, and frees it in between

__all__ = ["assert_sharded", "fit_grids", "keeps_gathered", "load", "name", "shard"]


def shard(model: LearningModel, world: World, offloaded: Sequence[int] = ()) -> None:
    """Shard a model on the meta device over all ranks, in place; one gather per layer, embedding and head.

    offloaded: indices of the layers whose shards live in pinned host memory and are copied in for each pass.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (model.embed, *model.layers, model.head):
        away = any(part is model.layers[i] for i in offloaded)
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy() if away else OffloadPolicy())
        part.to_empty(device="cpu" if away else world.device)
    fully_shard(model, mesh=mesh)


def load(model: LearningModel, source: WeightSource, r4: tuple[torch.Tensor, ...]) -> None:
    """Give every rank its own rows of every parameter, read from `source` and folded; nothing else is ever in memory."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        stored = parameter_source(name)
        if stored is None:
            continue
        local = parameter.to_local()
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if local.numel():
            folded_rows(source, stored, local[: shape[0]], offset[0], r4, model.device)


def assert_sharded(model: nn.Module, world: World) -> None:
    """Every parameter is frozen, a DTensor, holds its 1/N share and no more: nothing stayed gathered after a step."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise AssertionError(f"{name} is not sharded: a gathered copy outlived its step")
        # Counted, not sliced: a slice of a DTensor gathers it.
        share = -(-parameter.shape[0] // world.size) * parameter.shape[1:].numel()
        if parameter.to_local().numel() > share or parameter.requires_grad:
            raise AssertionError(f"{name} holds more than its share on rank {world.rank} or takes gradients")
