"""Evaluation targets: a variant of the model, with its weights as they are or quantised.

`eval_targets` lists those of a configuration. `describe` gives the entries that every row of results has, `target_identity` what
decides the figures, which is hashed into the name of a measurement's file.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_spin.config.run import RunConfig
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.embeddings import embeddings_of
from dist_spin.pipeline.fingerprints import model_identity, site_settings
from dist_spin.pipeline.variants import Variant, build_variant
from dist_spin.storage.quantized_layers import layer_path
from dist_spin.storage.run_directory import LEARNED, RunDir


@dataclass
class EvalTarget:
    """One row of the results: a variant with its weights as they are or quantised."""

    variant: Variant
    weights: str  # none, rtn or gptq
    full_precision: bool = False
    fingerprint: str = ""  # fingerprint of its layer files; empty where weights are as they are
    preset: bool = False  # its rotations were read or drawn, not learned here
    about: dict[str, Any] = field(default_factory=dict)  # further entries of its row, which decide no figure

    @property
    def label(self) -> str:
        """The method's name in tables."""
        if "system" in self.about:
            return self.about["system"]
        if self.full_precision:
            return "full precision"
        learned = "given rotation" if self.preset else "learned rotation"
        name = self.variant.name
        method = {"none": "no rotation", LEARNED: learned}.get(name, f"random {name.capitalize()}")
        return method + self.variant.blocks.label


def eval_targets(config: RunConfig, files: ModelFiles, device: torch.device) -> list[EvalTarget]:
    """What is measured: full precision, each baseline and the learned rotations, the latter also with 16-bit weights."""
    out = [full_precision(config, files, device)]
    quantised = config.quantize.method if config.quant.w_bits < 16 else "none"
    names, preset = [*config.quantize.baselines, LEARNED], config.optimize.steps == 0
    rotated = {name: build_variant(config, files, name, device) for name in names}
    if quantised != "none" and config.evaluate.unquantized_weights:
        out += [EvalTarget(rotated[name], "none", preset=preset) for name in names]
    return out + [EvalTarget(rotated[name], quantised, preset=preset) for name in names]


def full_precision(config: RunConfig, files: ModelFiles, device: torch.device) -> EvalTarget:
    """The model as it is, which every other one is compared with."""
    off = QuantSpec()
    unrotated = build_variant(config, files, "none", device)
    return EvalTarget(dataclasses.replace(unrotated, sites=Sites(off, off, off, off)), "none", full_precision=True)


def describe(config: RunConfig, target: EvalTarget) -> dict[str, Any]:
    """What every row says of the model that was measured: method, rotation, weights, bits, group size and seed."""
    q, off = config.quant, target.full_precision
    formats = {} if off else {f"{s}_format": getattr(q, f"{s}_format") for s in ("w", "a", "kv")}
    return {
        "method": target.label,
        "rotation": target.variant.name,
        "weights": target.weights,
        "w_bits": q.w_bits if target.weights != "none" else 16,
        **{f"{s}_bits": 16 if off else getattr(q, f"{s}_bits") for s in "akv"},
        **{name: value for name, value in formats.items() if value != "int"},
        "group_size": q.weights_per_scale if target.weights != "none" else 0,
        "seed": config.rotation.seed,
    }


def target_identity(config: RunConfig, files: ModelFiles, target: EvalTarget) -> dict[str, Any]:
    """What decides a measurement beside its row and layers: model, rotations, site settings and quantised embeddings."""
    identity = model_identity(config, files, target.variant)
    if not target.full_precision:
        identity |= site_settings(config)
    embeddings = embeddings_of(config, files, target.variant)
    if target.weights != "none" and embeddings.bits:
        identity["ends"] = embeddings.fingerprint
    return identity


def target_layer(run: RunDir, target: EvalTarget, index: int) -> Path:
    """The file of a quantised layer of the target's variant."""
    return layer_path(run.layers(target.variant.name), index)
