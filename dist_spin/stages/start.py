"""What `rotation.init=range` starts from: R1 fitted to activations of the full-precision model, kept in the run.

R2 stays a random Hadamard: fitted in the same way it gained nothing.

    RUN/rotations/start.safetensors

The model passes layer by layer, so any size fits; a bounded sample of activations stays on the host. Every rank does the same,
so that none waits for another; rank 0 writes.
"""

from typing import Any

import torch
from torch import Tensor

from dist_spin.data import fingerprint
from dist_spin.distributed import World, on_leader, together
from dist_spin.layer_files import identity_hash
from dist_spin.methods.inputs import LayerTask
from dist_spin.methods.ranges import narrowed, sample_rows
from dist_spin.model.layers import LayerRunner, RotatedWeights
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites, initial
from dist_spin.progress import Progress
from dist_spin.rundir import read_metadata, save_tensors
from dist_spin.settings import RunConfig
from dist_spin.stages.common import model_dtype, run_dir, start_path

TOKENS = 8192  # of the learning text that pass through the model
TOKENS_KEPT = 512  # of them at each site


def make_start(config: RunConfig, world: World, files: ModelFiles, tokens: Tensor) -> None:
    """Fit the start to the first of the learning text's `tokens` [n, T], unless it is there; called by all ranks together."""
    some = tokens[: -(-TOKENS // tokens.shape[1])]
    identity: dict[str, Any] = {
        "model": files.weights.fingerprint(),
        "dtype": config.model.dtype,
        "seed": config.rotation.seed,
        "tokens": fingerprint(some),
    }
    made_under, path = identity_hash(identity), start_path(config)
    if on_leader(lambda: (read_metadata(path) or {}).get("fingerprint") == made_under):
        return
    found: list[tuple[Tensor, float, float]] = []
    r1, r2 = initial("hadamard", files.shape, config.rotation.seed)
    together(lambda: found.append(fitted(r1, config, world, files, some)))

    def keep() -> None:
        fitted_r1, before, after = found[0]
        save_tensors(path, {"R1": fitted_r1, "R2": r2}, {"fingerprint": made_under})
        run_dir(config).event("range_start", before=before, after=after)

    on_leader(keep)


def fitted(
    start: Tensor, config: RunConfig, world: World, files: ModelFiles, tokens: Tensor
) -> tuple[Tensor, float, float]:
    """R1 [h, h] fitted from `start` to tokens [n, T], fp64 on the CPU; the mean square range before and after."""
    shape, dtype, seed = files.shape, model_dtype(config), config.rotation.seed
    runner = LayerRunner(files.config, Sites(), device=world.device, dtype=dtype, rotated=False)
    plain = RotatedWeights(files.weights, shape, None, (), world.device, dtype)
    hidden = plain.embedding()[tokens.to(world.device)]
    progress = Progress("fit the rotations' start: layer", shape.layers + 1, show=world.leads)
    rows: list[Tensor] = []
    for index in range(shape.layers):
        some, hidden = sample_rows(LayerTask(index, runner, plain.layer(index), hidden), TOKENS_KEPT, seed)
        rows.append(some)
        progress.advance()
    wide = torch.promote_types(dtype, torch.float32)
    r1, before, after = narrowed(start.to(world.device, wide), torch.cat(rows), seed)
    progress.advance(f"square range {before:.3f}, then {after:.3f}")
    return r1.double().cpu(), before, after
