"""The one small interface of the engines, and which of them a run uses."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from dist_spin.config.distributed import DistributedConfig
from dist_spin.errors import UserError
from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.rotation import Rotations
from dist_spin.model.weight_source import WeightSource
from dist_spin.optimize.sharding.fsdp import Fsdp
from dist_spin.optimize.sharding.zero3 import Zero3
from dist_spin.runtime.distributed import World


class Engine(Protocol):
    """Owns the frozen weights while rotations are learned; nothing that it does shows in a checkpoint or a result."""

    name: str
    """As `distributed.engine` has it."""

    keeps_gathered: bool
    """Whether autograd keeps a gathered copy of weights for the backward pass of layers that are not compiled."""

    def shards(self, world: World) -> int:
        """How many ranks one copy of the weights is spread over."""

    def shard(self, model: FakeQuantModel, world: World, offloaded: Sequence[int] = ()) -> None:
        """Make a model on the meta device ready to lie sharded over ranks; `offloaded`: layers kept off the device."""

    def load(self, model: FakeQuantModel, source: WeightSource, r4: tuple[Tensor, ...]) -> None:
        """Give every rank its own share of every parameter, folded; no collective, so that it may fail on one rank."""

    def requantize_weights(self, model: FakeQuantModel, rotations: Rotations) -> None:
        """Quantise the merged weights (`WeightQuantizer`) anew under the rotations as they are; all ranks must call it."""

    def assert_sharded(self, model: nn.Module, world: World) -> None:
        """Every parameter is frozen and holds this rank's share and no more.

        Raises:
            AssertionError: names the parameter that does not.
        """


def choose_engine(settings: DistributedConfig, offload_dir: str | None = None) -> Engine:
    """The engine of a run; "auto" follows the config of `accelerate launch`, which hands it down in the environment.

    Raises:
        UserError: weights are to be kept on a disk, or in several copies, by an engine that cannot.
    """
    engine, folder = settings.engine, offload_dir or settings.offload_dir
    if engine == "auto":
        engine = "deepspeed" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else "fsdp"
    if engine == "deepspeed":
        if settings.shard_ranks:
            raise UserError("distributed.shard_ranks is for FSDP", "set distributed.engine=fsdp, or leave it out")
        return Zero3(Path(folder) if folder else None)
    if settings.offload_dir:
        raise UserError("distributed.offload_dir is for DeepSpeed", "set distributed.engine=deepspeed, or leave it out")
    return Fsdp(settings.shard_ranks)
