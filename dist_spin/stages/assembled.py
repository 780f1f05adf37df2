"""A measured cell of a run as a whole transformers model in memory, for what needs one: generation, harnesses, exports."""

from typing import Any

from dist_spin.distributed import World
from dist_spin.model.assembly import assemble
from dist_spin.model.loading import ModelFiles
from dist_spin.rundir import RunDir
from dist_spin.settings import RunConfig
from dist_spin.stages.common import model_dtype, say
from dist_spin.stages.evaluate import Cell, quantized_weights
from dist_spin.stages.variants import ends_of


def assembled(config: RunConfig, world: World, files: ModelFiles, run: RunDir, cell: Cell) -> Any:
    """The model of `cell` (one of `evaluate.cells`, with `made_under` set where its weights are quantised).

    On the rank's device, all of it, in the run's dtype: the same bits that `evaluate` measures layer by layer.

    Raises:
        UserError: a quantised layer, or a quantised end, is not there.
    """
    dtype, weights = model_dtype(config), cell.chosen.weights
    ends = ends_of(config, files, cell.chosen).load(dtype, world.device, say) if cell.weights != "none" else {}
    return assemble(
        files.config,
        cell.chosen.sites,
        layer=lambda index: quantized_weights(run, cell, index, dtype, world) or weights.layer(index),
        embedding=ends["embedding"] if "embedding" in ends else weights.embedding(),
        head=ends["head"] if "head" in ends else weights.head_weight(),
        final_gain=weights.final_gain(),
        rotated=cell.chosen.rotations is not None,
        device=world.device,
        dtype=dtype,
    )
