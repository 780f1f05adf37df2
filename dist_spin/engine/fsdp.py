"""FSDP2: the frozen weights sharded over all ranks, gathered a layer at a time; rotations stay replicated outside."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_spin.distributed import World
from dist_spin.model.learning import LearningModel, parameter_source
from dist_spin.model.loading import WeightSource
from dist_spin.model.rotation import folded_rows

keeps_gathered = False  # a gather fills the storage that autograd holds, and frees it in between


def shard(model: LearningModel, world: World) -> None:
    """Shard a model on the meta device over all ranks, in place; one gather per layer, embedding and head."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (model.embed, *model.layers, model.head):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def load(model: LearningModel, source: WeightSource, r4: tuple[torch.Tensor, ...]) -> None:
    """Give every rank its own rows of every parameter, read from `source` and folded; nothing else is ever in memory."""
    model.to_empty(device=model.device)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        local = parameter.to_local()
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if local.numel():
            folded_rows(source, parameter_source(name), local[: shape[0]], offset[0], r4)


def assert_sharded(model: nn.Module, world: World) -> None:
    """Every parameter is frozen, a DTensor, holds its 1/N share and no more: nothing stayed gathered after a step."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise AssertionError(f"{name} is not sharded: a gathered copy outlived its step")
        share = -(-parameter.shape[0] // world.size) * parameter[:1].numel() if parameter.numel() else 0
        if parameter.to_local().numel() > share or parameter.requires_grad:
            raise AssertionError(f"{name} holds more than its share on rank {world.rank} or takes gradients")


def gathers_once(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered as one unit."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
