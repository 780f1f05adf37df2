"""Rotations that are not learned here (`optimize.steps=0`): of a file, such as a published R.bin, or random ones.

    dist-spin evaluate CONFIG.yaml rotation.load=R.bin optimize.steps=0 quantize.method=none
    dist-spin run CONFIG.yaml rotation.load=R.bin optimize.steps=0 rotation.online=false      # learned without R3 and R4

They are stored in the run where learned ones would be, for every later stage and for exports.
"""

from pathlib import Path

from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.rotation import stored_rotations
from dist_spin.numerics.cayley import is_orthogonal, nearest_orthogonal
from dist_spin.pipeline.export_limits import check_clips
from dist_spin.pipeline.initial_rotations import starting_rotations
from dist_spin.runtime.distributed import on_rank0
from dist_spin.runtime.progress import warn
from dist_spin.storage.rotations import clip_bits, finished_rotations, load_transforms, save_final
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.run_records import keep_settings
from dist_spin.storage.tensor_file import read_metadata, tensors_digest

PRESET = "given"  # metadata entry of such a final.safetensors: a digest of what was loaded
EXACT = 1e-5  # largest entry of R R^T - I that is left alone: files in fp32 stay as they are, to the bit


def save_preset_rotations(config: RunConfig, shape: Shape) -> None:
    """Write final.safetensors and R.bin from `rotation.load` or `rotation.init`, unless they are there already.

    Raises:
        UserError: the file cannot be read, belongs to another model or has clips that `export.target` cannot take; or the run
            holds other rotations.
    """
    run = run_dir(config)
    path = run.rotations / "final.safetensors"

    def keep() -> None:
        r1, r2 = starting_rotations(config, shape)
        preset = Path(config.path(config.rotation.load)) if config.rotation.load else None
        transforms = load_transforms(preset) if preset else {}
        digest = tensors_digest({"R1": r1, "R2": r2, **transforms})
        check_clips(config.export.target, config, clips="clip" in transforms)
        if finished_rotations(run, warn):
            if (read_metadata(path) or {}).get(PRESET) != digest:
                problem = (
                    f"run {config.name} holds other rotations than those of {config.rotation.load or 'its settings'}"
                )
                raise UserError(problem, "give a new name=")
            return
        bits = clip_bits(preset) if preset else None
        r1, r2 = stored_rotations(orthogonal(r1), orthogonal(r2), shape)
        save_final(run, r1, r2, {"step": "0", PRESET: digest}, transforms, bits)
        keep_settings(run.path, config)

    on_rank0(keep)


def check_not_preset(config: RunConfig) -> None:
    """Called before learning: a run that holds preset rotations keeps them.

    Raises:
        UserError: it is such a run.
    """

    def check() -> None:
        if PRESET in (read_metadata(run_dir(config).rotations / "final.safetensors") or {}):
            raise UserError(f"run {config.name} holds rotations that were given, not learned", "give a new name=")

    on_rank0(check)


def orthogonal(r: Tensor) -> Tensor:
    """r [..., n, n], fp64, as it is where it is orthogonal; the nearest matrix that is where it was rounded coarsely."""
    return r if is_orthogonal(r, EXACT) else nearest_orthogonal(r)
