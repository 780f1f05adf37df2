"""Settings of exports."""

import typing
from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import check_path, check_positive


@dataclass(frozen=True)
class ExportConfig:
    """export (files for the runtimes that models are served with)."""

    target: Literal["none", "hf", "compressed-tensors", "gguf", "executorch"] = "none"
    """Format the run is made for; what no runtime of it accepts is then refused when the run starts, not at its end."""
    profile: Literal["no-had", "r4-block"] = "no-had"
    """What is rotated: R1 and R2 (no-had), which every runtime serves, or the input of down_proj too (r4-block)."""
    shard_gb: float = 5.0
    """Largest weights file, GB; a single tensor that is larger gets a file of its own."""
    gguf_converter: str | None = None
    """convert_hf_to_gguf.py of llama.cpp, its folder or a llama-cpp-python source package; download: fetch that with pip."""

    def __post_init__(self) -> None:
        check_positive("export.shard_gb", self.shard_gb, "use a number above 0")
        check_path("export.gguf_converter", self.gguf_converter)


FORMATS: tuple[str, ...] = typing.get_args(ExportConfig.__annotations__["target"])[1:]  # all but "none"
