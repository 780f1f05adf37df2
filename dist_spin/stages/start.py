"""What `rotation.init=range` starts from: rotations fitted to activations of the full-precision model, kept in the run.

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
from dist_spin.methods.ranges import R1_SITES, STEPS, narrowed, sample_rows
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
    found: dict[str, Tensor] = {}
    figures: dict[str, float] = {}

    def fit() -> None:
        r1, r2, means = fitted(config, world, files, some)
        found.update(R1=r1, R2=r2)
        figures.update(means)

    together(fit)

    def keep() -> None:
        save_tensors(path, found, {"fingerprint": made_under})
        run_dir(config).event("range_start", **figures)

    on_leader(keep)


def fitted(
    config: RunConfig, world: World, files: ModelFiles, tokens: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """R1 [h, h] and R2 [layers, d, d] fitted to tokens [n, T], fp64 on the CPU; mean square ranges before and after."""
    shape, dtype, seed = files.shape, model_dtype(config), config.rotation.seed
    wide = torch.promote_types(dtype, torch.float32)
    start1, start2 = (r.to(world.device, wide) for r in initial("hadamard", shape, seed))
    runner = LayerRunner(files.config, Sites(), device=world.device, dtype=dtype, rotated=False)
    plain = RotatedWeights(files.weights, shape, None, (), world.device, dtype)
    hidden = plain.embedding()[tokens.to(world.device)]
    progress = Progress("fit the rotations' start: layer", shape.layers + 1, show=world.leads)
    rows: list[Tensor] = []
    r2: list[Tensor] = []
    before, after = [], []
    for index in range(shape.layers):
        sample, hidden = sample_rows(LayerTask(index, runner, plain.layer(index), hidden), TOKENS_KEPT, seed)
        rows += [sample[site] for site in R1_SITES]
        r, first, last = narrowed(start2[index], sample["o"], STEPS["R2"], seed)
        r2.append(r.double().cpu())
        before.append(first)
        after.append(last)
        progress.advance(f"square range {first:.3f}, then {last:.3f}")
    r1, first, last = narrowed(start1, torch.cat(rows), STEPS["R1"], seed)
    progress.advance(f"square range {first:.3f}, then {last:.3f}")
    means = {"r2_before": sum(before) / len(before), "r2_after": sum(after) / len(after)}
    return r1.double().cpu(), torch.stack(r2), {"r1_before": first, "r1_after": last, **means}
