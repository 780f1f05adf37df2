"""DeepSpeed ZeRO-3: the frozen weights partitioned over all ranks, gathered a layer at a time; rotations stay replicated outside.

Nothing is trained by DeepSpeed here, so that none of its optimisers and compiled operators is needed: only its partitioned
parameters and the hooks that gather and release them (Rajbhandari et al. 2020, ZeRO, stage 3). A partition is a range of
the flattened parameter: rank r holds elements [r p, (r + 1) p), p = ceil(numel / ranks).
"""

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_spin.errors import UserError
from dist_spin.model.fake_quant_model import FakeQuantModel, parameter_source
from dist_spin.model.merge import folded_rows
from dist_spin.model.rotation import Rotations
from dist_spin.model.weight_quant import BYTES, merged_rows
from dist_spin.model.weight_source import WeightSource
from dist_spin.optimize.sharding.requantize import MIXED
from dist_spin.runtime.distributed import World

PIP = "DS_BUILD_OPS=0 pip install 'deepspeed>=0.19.8,<0.20'"


class Zero3:
    """The engine `distributed.engine=deepspeed`.

    folder: where the partitions of offloaded layers lie as mapped files, which the operating system reads when the layer
    is gathered and which vanish with the process; None: in pinned host memory.
    """

    name = "deepspeed"
    keeps_gathered = True  # each gather makes a new tensor, which eager autograd holds on to

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def shards(self, world: World) -> int:
        """All ranks share one copy."""
        return world.size

    def shard(self, model: FakeQuantModel, world: World, offloaded: Sequence[int] = ()) -> None:
        """Make ready to partition a model on the meta device over all ranks; one gather per layer, embedding and head.

        Raises:
            UserError: DeepSpeed is not installed.
        """
        _import(world)
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import set_z3_leaf_module

        for part in (model.embed, *model.layers, model.head):
            set_z3_leaf_module(part, flag=True)
        self._world, self._partition = world, Init()
        self._offloaded = tuple(f"layers.{i}." for i in offloaded)

    def load(self, model: FakeQuantModel, source: WeightSource, r4: tuple[Tensor, ...]) -> None:
        """Give every rank its own range of every parameter, read from `source` and folded.

        Only the rows of this rank's range are ever read; besides its partitions a rank holds one unfilled parameter.

        Raises:
            UserError: the folder for offloaded weights cannot be written.
        """
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        for name, empty in list(model.named_parameters()):
            kind = torch.uint8 if empty.dtype == BYTES else empty.dtype  # not every process group gathers BYTES
            parameter: Any = nn.Parameter(
                torch.empty(empty.shape, dtype=kind, device=model.device), requires_grad=False
            )
            start, stop = self._world.own_range(parameter.numel())
            stored = parameter_source(name)
            if stored is not None and stop > start:
                row = parameter[:1].numel()
                first, last = start // row, -(-stop // row)
                folded_rows(source, stored, parameter.data[first:last], first, r4, gains=model.folded)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)
            self._partition._convert_to_deepspeed_param(parameter)
            parameter.partition()  # keeps this rank's range of what `parameter` holds, as `ds_tensor`
            if name.startswith(self._offloaded):
                parameter.ds_tensor.data = self._off_device(parameter.ds_tensor)
        largest = max(sum(cast(Any, p).ds_numel for p in layer.parameters()) for layer in model.layers)
        self._hooks = DeepSpeedZeRoOffload(
            model,
            timers=None,
            ds_config=None,
            prefetch_bucket_size=largest,  # the next layer comes while one is at work
            max_live_parameters=2 * largest,
            max_reuse_distance=1,  # the head stays from its forward to its backward pass, which follow each other
            param_persistence_threshold=0,
        )

    @torch.no_grad()
    def requantize_weights(self, model: FakeQuantModel, rotations: Rotations) -> None:
        """Q(merge(W, R)) for every fake-quantised linear, in place: each rank quantises the rows of its own codes and scales."""
        r1 = rotations.r1_param.value
        for index, role, linear in model.fake_quant_linears():
            role, weight = role.rpartition(".")[2], cast(Any, linear.weight)
            quantized: list[Any] = [linear.codes, linear.scale, linear.zero]
            row_ranges = [_rows(p, *self._world.own_range(p.ds_numel)) for p in quantized if p is not None]
            rows = slice(min(first for first, _ in row_ranges), max(last for _, last in row_ranges))
            weight.all_gather()
            folded = weight.data if role in MIXED else weight.data[rows]
            merged = merged_rows(role, folded, rows, r1, rotations.r2_params[index].value, linear.scale.dtype)
            weight.partition()
            if rows.start == rows.stop:
                continue  # fewer rows than ranks
            for parameter, fitted in zip(quantized, linear.spec.fit(merged), strict=True):
                if parameter is not None and fitted is not None:
                    start, stop = self._world.own_range(parameter.ds_numel)
                    before = rows.start * fitted.shape[1]
                    parameter.ds_tensor[: stop - start].copy_(fitted.flatten()[start - before : stop - before])

    def assert_sharded(self, model: nn.Module, world: World) -> None:
        """Every parameter is frozen and partitioned, holds its 1/N share and no more: nothing stayed gathered."""
        for name, parameter in cast(Iterator[tuple[str, Any]], model.named_parameters()):
            if parameter.numel():
                raise AssertionError(f"{name} is not sharded: a gathered copy outlived its step")
            if parameter.ds_tensor.numel() > -(-parameter.ds_numel // world.size) or parameter.requires_grad:
                raise AssertionError(f"{name} holds more than its share on rank {world.rank} or takes gradients")

    def _off_device(self, partition: Tensor) -> Tensor:
        if self.folder is None:
            return partition.cpu().pin_memory() if partition.is_cuda else partition
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix="dist-spin-", dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, partition.nbytes)  # a full disk says so now, not by a signal later
                mapped = torch.from_file(file.name, shared=True, size=partition.numel(), dtype=partition.dtype)
        except OSError as error:
            problem = f"distributed.offload_dir={self.folder} cannot take weights ({error.strerror})"
            raise UserError(problem, "name a directory with room for the model") from error
        return mapped.copy_(partition)


def _rows(parameter: Any, start: int, stop: int) -> tuple[int, int]:
    """The rows [first, last) that hold elements [start, stop) of a flattened parameter."""
    width = parameter.ds_shape[1]
    return start // width, -(-stop // width)


def _import(world: World) -> None:
    """Import DeepSpeed for this rank's device, and let it use the process group there is."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("distributed.engine=deepspeed needs the package deepspeed", PIP)
    os.environ["DS_ACCELERATOR"] = world.device.type  # it guesses, and says so, otherwise
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # Slurm has its own name for it
    import deepspeed

    # Its gathers use a name that newer torch has deprecated.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    # An all-reduce through shared memory that it would compile for a minute; only gathers happen here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
