"""The rotations that learning starts from: seeded random ones, ones fitted to activations, or those of a file.

Where nothing is learned (`optimize.steps=0`), they are the ones that are used.
"""

import math
from pathlib import Path

from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.rotation import initial
from dist_spin.model.scales_and_clips import scale_shapes
from dist_spin.model.sites_config import CLIP_SITES
from dist_spin.storage.rotations import load_rotations, load_transforms
from dist_spin.storage.run_directory import run_dir


def starting_rotations(config: RunConfig, shape: Shape) -> tuple[Tensor, Tensor]:
    """R1 and R2 that learning starts from, fp64: seeded, fitted (`pipeline.range_init`), or read from `rotation.load`.

    Raises:
        UserError: they are to be fitted and are not yet, or their file cannot be read.
    """
    sizes = shape.hidden, shape.head_dim, shape.layers
    if config.rotation.load:
        path = Path(config.path(config.rotation.load))
        rotations = load_rotations(path, *sizes)
        check_transforms(path, shape)
        return rotations
    if fits_start(config):
        if not start_path(config).exists():
            raise UserError(
                "the start of the rotations (rotation.init=range) is not fitted", "run `dist-spin optimize` first"
            )
        return load_rotations(start_path(config), *sizes)
    return initial(config.rotation.init, shape, config.rotation.seed)


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
