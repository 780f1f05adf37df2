"""Floating-point formats that hardware multiplies: FP8, MXFP8, MXFP4 and NVFP4, as plain data (no torch: settings read it)."""

from dataclasses import dataclass
from typing import Literal

E4M3_MAX, E2M1_MAX = 448.0, 6.0


@dataclass(frozen=True)
class NumberFormat:
    """Elements of `bits` up to `largest`, of which `group` (0: the row) share a scale held as `scale`.

    factors: of the scale that holds a group's largest value, those that a search tries, the plain one first. NVFP4's 1.5 puts
    the largest at 4 instead of 6 ("four over six"). A power of two moves E4M3's own exponents and gains nothing.
    """

    bits: int
    largest: float
    group: int
    scale: Literal["fp32", "e8m0", "e4m3"]
    factors: tuple[float, ...]


FORMATS = {
    "fp8": NumberFormat(8, E4M3_MAX, 0, "fp32", (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)),
    "mxfp8": NumberFormat(8, E4M3_MAX, 32, "e8m0", (1.0,)),
    "mxfp4": NumberFormat(4, E2M1_MAX, 32, "e8m0", (1.0, 0.5, 2.0)),
    "nvfp4": NumberFormat(4, E2M1_MAX, 16, "e4m3", (1.0, 1.5, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.2, 1.35)),
}


def has_narrow_scales(name: str) -> bool:
    """Whether weights of the format `name` ("int" too) hold their scales in 8 bits, which no learned factor fits into."""
    return name != "int" and FORMATS[name].scale != "fp32"


def check_format(name: str, bits: int, *, clip: float = 1.0) -> None:
    """Raise ValueError unless the format `name` has `bits` (0: those of any), and nothing clips its range."""
    if name not in FORMATS or bits not in (0, FORMATS[name].bits) or clip != 1:
        raise ValueError(f"{name} with {bits} bits and clip {clip}: formats are {', '.join(FORMATS)}, and clip nothing")
