"""The initial rotations of `rotation.init=range`: R1 fitted to activations of the full-precision model, stored in the run.

R2 stays a random Hadamard: fitted in the same way it gained nothing.

    RUN/rotations/start.safetensors

The model passes layer by layer, so any size fits; a bounded sample of activations stays on the host. Every rank does the same,
so that none waits for another; rank 0 writes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.data import tokens_fingerprint
from dist_spin.model.layer_inputs import LayerTask, observe
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import stored_rotations
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.block_rotation import apply_rotation, rotation_gradient
from dist_spin.numerics.cayley import adam_moments, newton_schulz, retract_rows, tangent
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.initial_rotations import seeded_rotations, start_path
from dist_spin.pipeline.model import model_dtype
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import Progress, warn
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import identity_hash, load_if_current, load_tensors, save_tensors

TOKENS = 8192  # of the learning text that pass through the model
SAMPLED_TOKENS = 512  # of them at each site of each layer


def make_start(config: RunConfig, world: World, files: ModelFiles, tokens: Tensor) -> None:
    """Fit R1 to the first of the learning text's `tokens` [n, T] and store it, unless it is there and whole.

    Called by all ranks together.
    """
    fitting_tokens = tokens[: -(-TOKENS // tokens.shape[1])]
    identity: dict[str, Any] = {
        "model": files.weights.fingerprint(),
        "dtype": dtype_name(config),
        "seed": config.rotation.seed,
        "tokens": tokens_fingerprint(fitting_tokens),
        **({"block": config.rotation.block, "shared": config.rotation.block_shared} if config.rotation.block else {}),
    }
    fingerprint, path = identity_hash(identity), start_path(config)

    def current(metadata: dict[str, str]) -> bool:
        return metadata.get("fingerprint") == fingerprint

    if on_rank0(lambda: load_if_current(path, load_tensors, current, "fitting it again", warn) is not None):
        return
    fits: list[tuple[Tensor, float, float]] = []
    r1, r2 = seeded_rotations("hadamard", config, files.shape)
    raise_on_any_failure(lambda: fits.append(fitted(r1, config, world, files, fitting_tokens)))

    def store() -> None:
        fitted_r1, before, after = fits[0]
        stored = stored_rotations(fitted_r1, r2, files.shape)
        save_tensors(path, dict(zip(("R1", "R2"), stored, strict=True)), {"fingerprint": fingerprint})
        run_dir(config).event("range_start", before=before, after=after)

    on_rank0(store)


def fitted(
    start: Tensor, config: RunConfig, world: World, files: ModelFiles, tokens: Tensor
) -> tuple[Tensor, float, float]:
    """R1 [h, h] or its blocks, fitted from `start` to tokens [n, T], fp64 on the CPU; the mean square range before and after."""
    shape, dtype, seed = files.shape, model_dtype(config), config.rotation.seed
    runner = LayerRunner(files.config, Sites(), device=world.device, dtype=dtype, rotated=False)
    plain = RotatedWeights(files.weights, shape, None, (), world.device, dtype)
    hidden = plain.embedding()[tokens.to(world.device)]
    progress = Progress("fit the rotations' start: layer", shape.layers + 1, show=world.is_rank0)
    rows: list[Tensor] = []
    for index in range(shape.layers):
        sample, hidden = sample_rows(LayerTask(index, runner, plain.layer(index), hidden), SAMPLED_TOKENS, seed)
        rows.append(sample)
        progress.advance()
    wide = accumulation_dtype(dtype)
    r1, before, after = narrowed(start.to(world.device, wide), torch.cat(rows), seed)
    progress.advance(f"square range {before:.3f}, then {after:.3f}")
    return r1.double().cpu(), before, after


R1_SITES = ("before attention", "before mlp")
ROWS = 1024  # activations of one step
STEPS = 300
ANGLE = 0.1  # radians by which the first step turns a channel (root mean square); falls to 0 along a cosine
REPROJECT_EVERY = 20


def square_range(x: Tensor) -> Tensor:
    """Mean over tokens of (max - min)^2, a scalar; x [..., n]."""
    return (x.amax(-1) - x.amin(-1)).square().mean()  # aminmax has no derivative in torch 2.11


def mean_square_range(rows: Tensor, rotation: Tensor) -> float:
    """`square_range` of rows [tokens, n], on any device in any dtype, in the basis of a rotation [n, n] or its blocks."""
    parts = rows.split(ROWS)
    return sum(float(square_range(apply_rotation(x.to(rotation), rotation))) * len(x) for x in parts) / len(rows)


def narrowed(start: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, float, float]:
    """A rotation near `start` under which rows have smaller ranges; and the mean square range before and after.

    start [n, n] (or its blocks) in the dtype to compute in, on the device to compute on; rows [tokens, n], anywhere, in any
    dtype. Returns `start` itself where nothing was gained.
    """
    transposed = start.mT.clone()  # R^T: a step on it turns the channels that the quantiser sees
    mean, square = torch.zeros_like(transposed), torch.zeros_like(transposed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, STEPS + 1):
        x = rows[torch.randint(len(rows), (ROWS,), generator=generator).to(rows.device)].to(transposed)
        y = apply_rotation(x, transposed.mT).requires_grad_()
        (gradient,) = torch.autograd.grad(square_range(y), y)
        lie_grad = rotation_gradient(gradient, y.detach(), transposed.shape, transposed.dtype)
        m, root = adam_moments(mean, square, tangent(lie_grad), step)
        angle = ANGLE * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        transposed = retract_rows(transposed, m / root, angle / math.sqrt(transposed.shape[-1]))
        if step % REPROJECT_EVERY == 0:
            transposed = newton_schulz(transposed)
    rotation = newton_schulz(transposed.mT.double(), 3).to(start)  # from rounding to rounding of fp64
    before, after = (mean_square_range(rows, r) for r in (start, rotation))
    return (rotation, before, after) if after < before else (start, before, before)


def sample_rows(task: LayerTask, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """What R1 turns before a layer's quantisers, of `tokens` tokens, and the layer's outputs [n, T, h].

    The former is [2 tokens, h] on the CPU in the layer's dtype: the residual stream in front of both norms, of mean square 1,
    as the norms without their gains make it.
    """
    n, length = task.hidden.shape[:2]
    positions = torch.randperm(n * length, generator=torch.Generator().manual_seed(seed))[:tokens].sort().values
    rows: list[Tensor] = []
    seen = dict.fromkeys(R1_SITES, 0)  # tokens that came by

    def see(site: str, x: Tensor) -> None:
        if site in seen:
            flat, first = x.flatten(0, -2), seen[site]
            seen[site] = first + len(flat)
            mine = flat[(positions[(positions >= first) & (positions < seen[site])] - first).to(flat.device)].float()
            rows.append((mine / mine.square().mean(-1, keepdim=True).sqrt()).to(x.dtype).cpu())

    outputs = observe(task, see)
    return torch.cat(rows), outputs
