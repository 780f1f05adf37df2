"""The initial rotations of `rotation.init=range`: R1 fitted to activations of the full-precision model, stored in the run.

R2 stays a random Hadamard: fitted in the same way it gained nothing.

    RUN/rotations/start.safetensors

The model passes layer by layer, so any size fits; ranks share the text, and a bounded sample of activations stays on every host.
Every rank fits it, so that none waits for another; rank 0 writes.
"""

import functools
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
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure, sum_over_ranks_
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
    progress = Progress("fit the rotations' start: layer", files.shape.layers + 1, show=world.is_rank0)
    rows = sampled_activations(config, world, files, fitting_tokens, progress)
    raise_on_any_failure(lambda: fits.append(fitted(r1, rows, config, world)))
    progress.advance(f"square range {fits[0][1]:.3f}, then {fits[0][2]:.3f}")

    def store() -> None:
        fitted_r1, before, after = fits[0]
        stored = stored_rotations(fitted_r1, r2, files.shape)
        save_tensors(path, dict(zip(("R1", "R2"), stored, strict=True)), {"fingerprint": fingerprint})
        run_dir(config).event("range_start", before=before, after=after)

    on_rank0(store)


def sampled_activations(
    config: RunConfig, world: World, files: ModelFiles, tokens: Tensor, progress: Progress
) -> Tensor:
    """What R1 turns in every layer, of `SAMPLED_TOKENS` of tokens [n, T]: [rows, h] on the CPU in the model's dtype.

    Called by all ranks together: each passes its share of the sequences, and all get the same rows.
    """
    shape, dtype = files.shape, model_dtype(config)
    runner = LayerRunner(files.config, Sites(), device=world.device, dtype=dtype, rotated=False)
    plain = RotatedWeights(files.weights, shape, None, (), world.device, dtype)
    first, last = world.own_range(len(tokens))
    chosen = chosen_positions(tokens.numel(), config.rotation.seed)
    samples: list[Tensor] = []
    hidden = torch.empty(0)

    def embed() -> None:
        nonlocal hidden
        hidden = plain.embedded(tokens[first:last])

    def pass_layer(index: int) -> None:
        nonlocal hidden
        task = LayerTask(index, runner, plain.layer(index), hidden)
        sample, hidden = sample_rows(task, chosen - first * tokens.shape[1])
        samples.append(sample)

    raise_on_any_failure(embed)
    for index in range(shape.layers):
        raise_on_any_failure(functools.partial(pass_layer, index))
        # Each row is of one rank, and 0 on the others.
        samples[-1] = sum_over_ranks_(samples[-1].to(world.device)).cpu()
        progress.advance()
    return torch.cat(samples)


def chosen_positions(tokens: int, seed: int) -> Tensor:
    """Positions of the sampled tokens in a text of so many, ascending."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:SAMPLED_TOKENS].sort().values


def fitted(start: Tensor, rows: Tensor, config: RunConfig, world: World) -> tuple[Tensor, float, float]:
    """R1 [h, h] or its blocks, fitted from `start` to rows [tokens, h], fp64 on the CPU; mean square range before and after."""
    wide = accumulation_dtype(model_dtype(config))
    r1, before, after = narrowed(start.to(world.device, wide), rows, config.rotation.seed)
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


def sample_rows(task: LayerTask, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What R1 turns before a layer's quantisers, of some tokens, and the layer's outputs [n, T, h].

    The former is [2 tokens, h] on the CPU in the layer's dtype: the residual stream in front of both norms, of mean square 1,
    as the norms without their gains make it.

    Args:
        positions: of the tokens in the flattened `task.hidden`, ascending. Those outside it are other ranks' and give 0.
    """
    width = task.hidden.shape[-1]
    rows = {site: torch.zeros(len(positions), width, dtype=task.hidden.dtype) for site in R1_SITES}
    seen = dict.fromkeys(R1_SITES, 0)  # tokens that came by

    def see(site: str, x: Tensor) -> None:
        if site in seen:
            flat, first = x.flatten(0, -2), seen[site]
            seen[site] = first + len(flat)
            here = (positions >= first) & (positions < seen[site])
            mine = flat[(positions[here] - first).to(flat.device)].float()
            rows[site][here] = (mine / mine.square().mean(-1, keepdim=True).sqrt()).to(x.dtype).cpu()

    outputs = observe(task, see) if len(task.hidden) else task.hidden
    return torch.cat(list(rows.values())), outputs
