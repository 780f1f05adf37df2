"""Settings of the rotations."""

from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import MAX_CHANNELS, MAX_SEED, check_path, check_range
from dist_spin.errors import UserError


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
    r1: bool = True
    """Turn the residual stream by R1; false: R2, R3 and R4 alone, and norms stay as they are, as families need whose norms do not
    commute with R1 (Gemma 2 and 3, OLMo 2 and 3, Cohere)."""
    block: int = 0
    """Block size in channels of R1, R2 and R4, for number formats whose scales are shared by 16 or 32 channels; 0: rotations of
    the whole sizes. R2 turns whole heads where they are no larger than a block."""
    block_shared: bool = False
    """One block for all of R1, and one for all of each layer's R2, instead of a block for each place."""
    r4_block: int = 0
    """Block size of R4 in channels; 0: that of `block`, or else the whole intermediate size."""
    load: str | None = None
    """File of rotations to start from instead of `init`: R.bin or .safetensors (scales and clips too, where learned)."""

    def __post_init__(self) -> None:
        check_range("rotation.seed", self.seed, 0, MAX_SEED, "use 0 or more")
        block = "use 0 for the whole size, or a block size in channels"
        check_range("rotation.block", self.block, 0, MAX_CHANNELS, block)
        check_range("rotation.r4_block", self.r4_block, 0, MAX_CHANNELS, block)
        if self.block == 1:
            raise UserError("rotation.block=1 rotates nothing", "use 0 for the whole size, or 16, 32, 64 or 128")
        if self.block_shared and not self.block:
            raise UserError(
                "rotation.block_shared=true has no blocks to share", "set rotation.block, to 32 for example"
            )
        if self.init == "range" and not self.r1:
            raise UserError(
                "rotation.init=range fits R1, which rotation.r1=false leaves out", "use rotation.init=hadamard"
            )
        check_path("rotation.load", self.load)

    @property
    def r4_size(self) -> int:
        """Block size of R4; 0 for the whole intermediate size."""
        return self.r4_block or self.block
