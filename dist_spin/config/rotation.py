"""Settings of the rotations."""

from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import MAX_CHANNELS, MAX_SEED, check_path, check_range


@dataclass(frozen=True)
class RotationConfig:
    """rotation (where the rotations start, and which are used)."""

    init: Literal["hadamard", "range", "orthogonal", "identity"] = "hadamard"
    """Start of R1 and R2: randomised Hadamard; range: the same, but R1 fitted to activations of the learning text, in a
    minute or so, so that each token's range is small; random orthogonal; or none."""
    seed: int = 0
    """Seed of the random start."""
    online: bool = True
    """Add R3 (queries, keys) and R4 (down_proj input) at run time, which 4 bits need; false: R1 and R2, at no cost."""
    r4_block: int = 0
    """Block size of R4 in channels; 0 rotates the whole intermediate size."""
    load: str | None = None
    """File of rotations to start from instead of `init`: R.bin or .safetensors (scales and clips too, where learned)."""

    def __post_init__(self) -> None:
        check_range("rotation.seed", self.seed, 0, MAX_SEED, "use 0 or more")
        block = "use 0 for the whole size, or a block size in channels"
        check_range("rotation.r4_block", self.r4_block, 0, MAX_CHANNELS, block)
        check_path("rotation.load", self.load)
