"""Measure the activations at every quantised site, before and after rotation, a layer in memory at a time.

The 16-bit model is run over a few calibration sequences with every quantiser off, once as it is and once for each rotation,
so that what is seen is what the quantisers would get. A signal saves what is done; the same command continues.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.config.run import RunConfig
from dist_spin.data import tokens_fingerprint
from dist_spin.errors import Interrupted
from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM
from dist_spin.model.layers import LayerRunner
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.activations import kurtosis, peak_over_rms, pooled, summary
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.model import model_dtype, open_configured_model
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens, unquantized
from dist_spin.runtime.distributed import World
from dist_spin.runtime.prefetch import prefetched
from dist_spin.runtime.progress import Progress, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.activation_stats import (
    SITES,
    Statistics,
    load_statistics,
    save_statistics,
    statistics_complete,
    statistics_path,
)
from dist_spin.storage.run_directory import LEARNED, run_dir
from dist_spin.storage.tensor_file import identity_hash, load_if_current, tensors_digest

SURFACE = (48, 96)  # cells, tokens x channels
CHANNEL_BINS = 256


def measure_activations(config: RunConfig, world: World) -> None:
    """Write statistics/VARIANT.safetensors for the model without rotations, each baseline, and the learned rotations.

    The learned ones are left out as long as they are not there.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the model or the calibration text cannot be read.
    """
    stop, run = StopRequest(), run_dir(config)
    files = open_configured_model(config)
    if files.shape.experts:
        warn("activation statistics of a mixture of experts are not measured")
        return
    tokens = calibration_tokens(config, files)[: config.report.sequences]
    names = ["none", *(name for name in config.quantize.baselines if name != "none")]
    if (run.rotations / "final.safetensors").exists():
        names.append(LEARNED)
    for name in names:
        _measure(config, world, files, build_variant(config, files, name, world.device), tokens, stop)


def _measure(
    config: RunConfig, world: World, files: ModelFiles, variant: Variant, tokens: Tensor, stop: StopRequest
) -> None:
    path = statistics_path(run_dir(config), variant.name)
    identity = identity_hash(_identity(config, files, variant, tokens))
    if statistics_complete(path, identity):
        return
    dtype, layers = model_dtype(config), files.shape.layers
    runner = LayerRunner(
        files.config,
        dataclasses.replace(unquantized(variant.sites), r3=variant.sites.r3),  # keys are looked at behind it
        device=world.device,
        dtype=dtype,
        rotated=variant.rotations is not None,
    )
    statistics = load_if_current(
        path, load_statistics, lambda metadata: metadata["fingerprint"] == identity, "measuring again", warn
    )
    if statistics is None:
        statistics = Statistics.empty()
    if statistics.hidden:
        hidden = [h.to(world.device) for h in statistics.hidden]
    else:
        embedding = variant.weights.embedding()
        hidden = [variant.weights.embedded(ids, embedding)[None] for ids in tokens]  # each [1, T, h]
        del embedding
    progress = Progress(f"measure activations ({variant.name}): layer", layers, statistics.done)
    indices = range(statistics.done, layers)
    for index, weights in zip(indices, prefetched(variant.weights.layer, indices, world.device), strict=True):
        layer = runner.build(index, weights)
        with probes(layer, files.shape.kv_heads) as seen:
            hidden = [runner.run(layer, index, h) for h in hidden]
        for site, figures in statistics.layers.items():
            for figure, value in seen[site].figures().items():
                figures[figure].append(value)
        progress.advance()
        if stop and index + 1 < layers:
            statistics.hidden = hidden
            save_statistics(path, statistics, identity, tokens.numel())
            raise Interrupted(f"stopped by a signal after layer {index} ({variant.name})", "the same command continues")
    statistics.hidden = []
    save_statistics(path, statistics, identity, tokens.numel())


def _identity(config: RunConfig, files: ModelFiles, variant: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides a variant's figures."""
    rotations = dict(zip(("R1", "R2"), variant.rotations or (), strict=False))
    return {
        "model": files.weights.fingerprint(),
        "dtype": dtype_name(config),
        "rotations": tensors_digest(rotations),
        "tokens": tokens_fingerprint(tokens),
        "r3": [tuple(f.shape) for f in variant.sites.r3],
        "r4": [tuple(f.shape) for f in variant.sites.r4],
        "size": [*SURFACE, CHANNEL_BINS],
    }


class Probe:
    """Gathers the figures of one site of one layer, sequence by sequence."""

    def __init__(self) -> None:
        self._peaks: list[Tensor] = []
        self._kurtoses: list[Tensor] = []
        self._channels: Tensor | None = None
        self._surface: Tensor | None = None

    def see(self, x: Tensor, heads: int) -> None:
        """x [T, n]: one sequence; `heads` equal parts of the channels are quantised apart (1: the whole token)."""
        parts = x.unflatten(-1, (heads, -1))
        self._peaks.append(peak_over_rms(parts).flatten())
        self._kurtoses.append(kurtosis(parts).flatten())
        largest = pooled(x.abs().amax(0, keepdim=True), 1, CHANNEL_BINS)[0].cpu()
        self._channels = largest if self._channels is None else torch.maximum(self._channels, largest)
        if self._surface is None:
            self._surface = pooled(x, *SURFACE).cpu()

    def figures(self) -> dict[str, Tensor]:
        """What `Statistics` keeps of a layer."""
        assert self._channels is not None
        assert self._surface is not None
        return {
            "peak": summary(torch.cat(self._peaks)).cpu(),  # sorted where it was computed
            "kurtosis": summary(torch.cat(self._kurtoses)).cpu(),
            "channels": self._channels,
            "surface": self._surface,
        }


@contextmanager
def probes(layer: nn.Module, kv_heads: int) -> Iterator[dict[str, Probe]]:
    """Around the runs of a layer with sites attached: a `Probe` of each of its sites."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    modules: dict[str, nn.Module] = {
        "attention_input": getattr(layer, ATTENTION_NORM),
        "o_input": attention.o_proj.input_quant,
        "mlp_input": getattr(layer, MLP_NORM),
        "down_input": mlp.down_proj.input_quant,
        "keys": attention.key_site,
        "values": attention.v_proj,
    }
    seen = {site: Probe() for site in SITES}

    def hook(site: str, output: Any) -> None:
        if site == "keys":  # (query, key), key [1, kv_heads, T, d]
            output = output[1].transpose(1, 2).flatten(2)
        seen[site].see(output[0], kv_heads if site in ("keys", "values") else 1)

    handles = [
        module.register_forward_hook(lambda _, __, output, site=site: hook(site, output))
        for site, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
