"""The rotations that learning starts from: seeded random ones, ones fitted to activations, or those of a file.

Where nothing is learned (`optimize.steps=0`), they are the ones that are used.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.rotation import Blocks, initial
from dist_spin.model.scales_and_clips import scale_shapes
from dist_spin.model.sites_config import CLIP_SITES
from dist_spin.numerics.block_rotation import blocks_of, full_rotation
from dist_spin.storage.rotations import load_rotations, load_transforms
from dist_spin.storage.run_directory import run_dir


def starting_rotations(config: RunConfig, shape: Shape) -> tuple[Tensor, Tensor]:
    """R1 and R2 that learning starts from, fp64: seeded, fitted (`pipeline.range_init`), or read from `rotation.load`.

    In the blocks of `rotation.block`: see `model.rotation.initial`.

    Raises:
        UserError: they are to be fitted and are not yet, their file cannot be read, or they have not the blocks asked for.
    """
    sizes, blocks = (shape.hidden, shape.head_dim, shape.layers), rotation_blocks(config, shape)
    if config.rotation.load:
        path = Path(config.path(config.rotation.load))
        r1, r2 = load_rotations(path, *sizes)
        check_transforms(path, shape)
        if blocks.r1 == 1:
            r1 = without_r1(r1, shape.hidden, f"{path}: R1")
        else:
            r1 = in_blocks(r1, shape.hidden, blocks.r1, f"{path}: R1", shared=blocks.shared)
        heads = [in_blocks(r, shape.head_dim, blocks.r2, f"{path}: R2", shared=blocks.shared) for r in r2]
        return r1, torch.stack(heads)
    if fits_start(config):
        if not start_path(config).exists():
            raise UserError(
                "the start of the rotations (rotation.init=range) is not fitted", "run `dist-spin optimize` first"
            )
        r1, r2 = load_rotations(start_path(config), *sizes)
        if not blocks.shared:
            return r1, r2
        return r1[0] if r1.dim() == 3 else r1, r2[
            :, 0
        ] if r2.dim() == 4 else r2  # R2 is whole where a head is no larger
    return seeded_rotations(config.rotation.init, config, shape)


def seeded_rotations(kind: str, config: RunConfig, shape: Shape) -> tuple[Tensor, Tensor]:
    """`model.rotation.initial` with the seed and the blocks of a configuration.

    Raises:
        UserError: the blocks do not fit the model.
    """
    return initial(kind, shape, config.rotation.seed, rotation_blocks(config, shape))


def rotation_blocks(config: RunConfig, shape: Shape) -> Blocks:
    """The blocks of R1 and R2: `rotation.block`, of R2 no larger than a head; a block of the whole size is the whole matrix.

    Without `rotation.r1` those of R1 are single channels, which leaves it out.

    Raises:
        UserError: the block does not divide the hidden size, or neither it nor the head size divides the other.
    """
    block, hidden, head = config.rotation.block, shape.hidden, shape.head_dim
    r1 = config.rotation.r1
    if not block:
        return Blocks() if r1 else Blocks(1)
    if (r1 and hidden % block) or (head % block and block % head):
        common = math.gcd(hidden, head)
        problem = f"rotation.block={block} does not fit this model's hidden size {hidden} and head size {head}"
        raise UserError(problem, f"use {common & -common} or a divisor of it, or 0 for the whole sizes")
    of_r1 = 1 if not r1 else block if block < hidden else 0
    return Blocks(of_r1, block if block < head else 0, config.rotation.block_shared)


def without_r1(r: Tensor, size: int, name: str) -> Tensor:
    """An R1 of `size` channels that is left out, [size, 1, 1], in place of an identity r, whole or in blocks.

    Raises:
        UserError: r turns something.
    """
    if not torch.equal(r, torch.eye(r.shape[-1], dtype=r.dtype).expand_as(r)):
        raise UserError(f"{name} is not the identity, but rotation.r1=false leaves R1 out", "set rotation.r1=true")
    return torch.ones(size, 1, 1, dtype=r.dtype)


def in_blocks(r: Tensor, size: int, block: int, name: str, *, shared: bool) -> Tensor:
    """A rotation of `size` channels, whole or in blocks of any size, in blocks of `block` (`numerics.block_rotation`); 0: whole.

    Raises:
        UserError: it has entries outside of these blocks, or they differ and should be one.
    """
    whole = r if r.dim() == 2 else full_rotation(r, size)
    if not block:
        return whole
    try:
        stack = blocks_of(whole, block)
    except ValueError as error:
        raise UserError(
            f"{name} is not block-diagonal ({error})", "set rotation.block=0, or the block it has"
        ) from error
    if not shared:
        return stack
    if not torch.equal(stack, stack[:1].expand_as(stack)):
        raise UserError(f"{name} has blocks that differ", "set rotation.block_shared=false")
    return stack[0]


def check_transforms(path: Path, shape: Shape) -> None:
    """Refuse a rotation file whose scales or clips are of another model, or cannot be.

    Raises:
        UserError: names the tensor.
    """
    wanted: dict[str, list[tuple[int, ...]]] = {"clip": [(shape.layers, len(CLIP_SITES))]}
    for shared in (False, True):
        for name, size in scale_shapes(shape, shared_keys=shared).items():
            wanted.setdefault(f"scale.{name}", []).append((shape.layers, *size))
    for name, values in load_transforms(path).items():
        size, most = tuple(values.shape), 1.0 if name == "clip" else math.inf
        if size not in wanted.get(name, []):
            sizes = " or ".join(map(str, dict.fromkeys(wanted.get(name, [])))) or "none of that name"
            raise UserError(f"{path} holds {name} {size}, but this model has {sizes}", "it was made for another model")
        if not ((values > 0) & (values <= most) & values.isfinite()).all():
            raise UserError(f"{path}: {name} holds numbers that no {name.partition('.')[0]} has", "check rotation.load")


def fits_start(config: RunConfig) -> bool:
    """Whether rotations start from what activations say (`pipeline.range_init`)."""
    return config.rotation.init == "range" and not config.rotation.load


def start_path(config: RunConfig) -> Path:
    """Where the rotations fitted by `rotation.init=range` are stored."""
    return run_dir(config).rotations / "start.safetensors"
