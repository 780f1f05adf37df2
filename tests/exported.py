"""Tiny runs to export, and the logits of the pipeline's own model that an export must reproduce."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_run, write_model
from torch import Tensor

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.evaluate.layerwise_model import load_full_model
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import build_variant, calibration_tokens
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.run_directory import run_dir

IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
NO_HAD = ["rotation.online=false"]
R4_BLOCK = ["rotation.online=true", "rotation.r4_block=16", "export.profile=r4-block"]
W4A16 = ["quant.a_bits=16"]
W4A8 = ["quant.a_bits=8", "quant.a_symmetric=true"]
W8A8 = ["quant.w_bits=8", *W4A8]
W4A4 = ["quant.a_bits=4", "quant.a_symmetric=true"]


def settings(place: Path, kind: str, *more: str, dtype: str = "float32") -> list[str]:
    """Settings of a short run on a tiny model, which is made if it is not there; 4-bit keys and values."""
    model = place / kind
    if not model.exists():
        write_model(kind, model, dtype=getattr(torch, dtype))
    return tiny_run(place / "runs", f"model.dtype={dtype}", *more, model=model)


def make_run(words: list[str], *stages: str) -> Path:
    """Run stages; the run's directory."""
    for stage in stages:
        assert main([stage, *words]) == 0
    return run_dir(load_config(None, words)).path


def pipeline_cell(words: list[str], weights: str, off: str = "", config: RunConfig | None = None) -> Any:
    """The pipeline's own model of the learned rotations, assembled from the run's files.

    weights: gptq or none. off: sites (of "aokv") whose quantisers are left out. config: in place of the words.
    """
    config = config or load_config(None, words)
    world = start("cpu", 60, 1)
    try:
        files = open_configured_model(config)
        cell = EvalTarget(build_variant(config, files, "learned", world.device), weights)
        cell.variant.sites = replace(cell.variant.sites, **{site: QuantSpec() for site in off})
        if weights != "none":
            tokens = calibration_tokens(config, files)
            cell.fingerprint = layer_fingerprint(config, files, cell.variant, tokens)
        return load_full_model(config, world, files, run_dir(config), cell)
    finally:
        stop()


def exported(words: list[str], target: str) -> Path:
    """Export a run by its directory and the settings it was made with; the export's directory."""
    run = run_dir(load_config(None, words)).path
    assert main(["export", str(run), "--format", target, *words]) == 0
    return run / "export" / target


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """[2, 24, vocab] on fixed tokens."""
    return model(IDS).logits
