"""FSDP2: the frozen weights sharded over ranks, gathered a layer at a time; rotations stay replicated outside.

Over all ranks, or over groups of neighbouring ranks that hold one copy each (hybrid sharding): gathers then stay within a
group and move less, at the cost of memory. Frozen weights have no gradients, so the groups never talk about them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_spin.errors import UserError
from dist_spin.model.fake_quant_model import FakeQuantModel, parameter_source
from dist_spin.model.merge import folded_rows
from dist_spin.model.weight_source import WeightSource
from dist_spin.optimize.sharding.prefetch import FetchAhead
from dist_spin.optimize.sharding.requantize import requantize_weights
from dist_spin.runtime.distributed import World


def loading_threads(device: torch.device) -> int:
    """Threads that read and fold weights for `device`; folding on a CPU takes all cores already."""
    return 4 if device.type == "cuda" else 1


class Fsdp:
    """The engine `distributed.engine=fsdp`. shard_ranks: ranks that share one copy of the weights; 0: all."""

    name = "fsdp"
    keeps_gathered = False  # a gather fills the storage that autograd holds, and frees it in between
    requantize_weights = staticmethod(requantize_weights)

    def __init__(self, shard_ranks: int = 0) -> None:
        self.shard_ranks = shard_ranks

    def shards(self, world: World) -> int:
        """How many ranks one copy of the weights is spread over.

        Raises:
            UserError: the ranks do not divide into such groups.
        """
        shards = self.shard_ranks or world.size
        if world.size % shards:
            problem = f"distributed.shard_ranks={shards} does not divide {world.size} ranks"
            raise UserError(problem, "use a divisor, or 0 to share one copy among all", shared=True)
        return shards

    def shard(self, model: FakeQuantModel, world: World, offloaded: Sequence[int] = ()) -> None:
        """Shard a model on the meta device, in place; one gather per layer, embedding and head.

        offloaded: indices of the layers whose shards live in pinned host memory and are copied in for each pass.
        """
        shards = self.shards(world)
        sizes = (shards,) if shards == world.size else (world.size // shards, shards)
        mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("copy", "shard")[-len(sizes) :])
        for part in (model.embed, *model.layers, model.head):
            on_host = any(part is model.layers[i] for i in offloaded)
            fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy() if on_host else OffloadPolicy())
            part.to_empty(device="cpu" if on_host else world.device)
        fully_shard(model, mesh=mesh)
        # The embedding's input takes no gradient, and the head's gradient is ready since its forward pass.
        for part in (model.embed, model.head):
            cast(FSDPModule, part).set_unshard_in_backward(False)
        if offloaded and shards == 1 and world.device.type == "cuda":
            FetchAhead([model.layers[i] for i in offloaded], world.device)

    def load(self, model: FakeQuantModel, source: WeightSource, r4: tuple[torch.Tensor, ...]) -> None:
        """Give every rank its own rows of every parameter, read from `source` and folded; nothing else is ever in memory.

        For a GPU several threads read and fold, each a parameter at a time in small parts, or it would wait for one of them.
        """
        shares = []
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
                shares.append((stored, local[: shape[0]], offset[0]))

        def fill(stored: str, rows: torch.Tensor, first: int) -> None:
            with torch.no_grad(), torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
                folded_rows(source, stored, rows, first, r4, model.device, gains=model.folded)

        threads = ThreadPoolExecutor(loading_threads(model.device), "weights")
        try:
            for _ in threads.map(fill, *zip(*shares, strict=True)):
                pass
        finally:
            threads.shutdown(cancel_futures=True)

    def assert_sharded(self, model: nn.Module, world: World) -> None:
        """Every parameter is frozen, a DTensor, holds its 1/N share and no more: nothing stayed gathered after a step."""
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                raise AssertionError(f"{name} is not sharded: a gathered copy outlived its step")
            # Counted, not sliced: a slice of a DTensor gathers it.
            share = -(-parameter.shape[0] // self.shards(world)) * parameter.shape[1:].numel()
            if parameter.to_local().numel() > share or parameter.requires_grad:
                raise AssertionError(f"{name} holds more than its share on rank {world.rank} or takes gradients")
