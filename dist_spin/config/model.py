"""Settings of the model."""

from dataclasses import dataclass
from typing import Literal

from dist_spin.config.checks import check_path, check_text, require


@dataclass(frozen=True)
class ModelConfig:
    """model (the network whose rotations are learned)."""

    path: str
    """Hugging Face directory or hub id, .gguf file, or package:NAME (the one .gguf in an installed Python package)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the newest, so pin it to make a run repeatable."""
    dtype: Literal["bfloat16", "float32", "float64", "float16", "auto"] = "auto"
    """Number format of weights and compute; auto: bfloat16, which these models were trained in, where the device computes it
    fast, float32 elsewhere; a run keeps what it was started with."""
    dummy_weights: bool = False
    """Seeded random weights, only config.json is read: for timing and memory tests without a download."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; off because that code can do anything."""

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", self.path, "give a model directory, hub id, .gguf file or package:NAME")
        check_path("model.path", self.path)
        if self.revision is not None:
            check_text("model.revision", self.revision)
