"""Merge the rotations and quantise the weights, layer by layer; finished layers are never done again.

    dist-spin quantize CONFIG.yaml                                       all layers, in this process
    torchrun --nproc_per_node 2 -m dist_spin quantize CONFIG.yaml        the same, shared out over ranks
    dist-spin quantize CONFIG.yaml --layers 10:20                        one job of quantize.layers_per_job=10
    dist-spin quantize CONFIG.yaml --hidden-states                       only what such jobs start from
    dist-spin quantize CONFIG.yaml --cluster local --workers 4           every job, in parallel (see launch/)

Layers are cut into ranges of `quantize.layers_per_job`. A range starts from the hidden states of the 16-bit model and sees the
rounding errors of its own layers only, so ranges may be done at any time, on any machine, in any order, with the same files.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import socket
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.model.layers import LayerRunner
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.embeddings import embeddings_of
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.fingerprints import gptq_options, layer_identity
from dist_spin.pipeline.model import model_dtype, open_configured_model, wide_dtype
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens, unquantized
from dist_spin.quantize.background_writer import BackgroundWriter
from dist_spin.quantize.calibration_states import CalibrationStates
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.quantize.states_network import (
    StatesNetwork,
    original_network,
    own_network_reason,
    stored_states_identity,
)
from dist_spin.runtime.distributed import World, any_rank, on_rank0
from dist_spin.runtime.prefetch import prefetched
from dist_spin.runtime.progress import Progress, say, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.hidden_states import HiddenStateFiles
from dist_spin.storage.quantized_layers import QuantizedLayer, finished_layer, layer_path, save_layer
from dist_spin.storage.run_directory import LEARNED, RunDir, run_dir
from dist_spin.storage.run_records import keep_settings
from dist_spin.storage.tensor_file import identity_hash


def quantize(
    config: RunConfig, world: World, layers: tuple[int, int] | None = None, *, hidden_states_only: bool = False
) -> None:
    """Quantise the learned variant and all baselines.

    Args:
        layers: only these, from the first up to but not including the second: whole ranges.
        hidden_states_only: only store the hidden states that ranges start from.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the configuration or the run directory is in the way.
    """
    quantize_variants(prepare_jobs(config, world), layers, hidden_states_only=hidden_states_only)


def quantize_variants(
    jobs: list["QuantizeJob"], layers: tuple[int, int] | None = None, *, hidden_states_only: bool = False
) -> None:
    """What `quantize` does, for these variants of one run, which share stored hidden states where they can."""
    for job in jobs:
        _quantize_variant(job, layers, hidden_states_only=hidden_states_only)
    if layers is None and not hidden_states_only:
        for job in jobs:
            on_rank0(job.remove_states)


def _quantize_variant(job: "QuantizeJob", layers: tuple[int, int] | None, *, hidden_states_only: bool) -> None:
    selected = job.layer_ranges if layers is None else ranges_within(job.layer_ranges, layers)
    open_ranges = [layer_range for layer_range in selected if not all(job.finished(*layer_range))]
    if len(job.layer_ranges) > 1 and (hidden_states_only or layers is None):
        if job.own_network_reason and any(start for start, _ in open_ranges) and job.world.is_rank0:
            say(f"hidden states of {job.variant.name} are those of its own layers: {job.own_network_reason}")
        job.hidden_states.make([start for start, _ in open_ranges])
    if hidden_states_only:
        return
    if selected[0][0] == 0:  # the job of the first layer makes embedding and lm_head too
        on_rank0(job.make_embeddings)
    for layer_range in open_ranges:
        quantize_range(job, *layer_range)


def prepare_jobs(config: RunConfig, world: World) -> list["QuantizeJob"]:
    """What there is to do for each variant; nothing where weights stay at 16 bits."""
    if config.quantize.method == "none" or config.quant.w_bits == 16:
        say("weights stay at 16 bits: nothing to quantise")
        return []
    stop = StopRequest()
    files = open_configured_model(config)
    check_export_target(config, files.config)
    tokens = calibration_tokens(config, files)
    run = run_dir(config)

    def note() -> None:
        keep_settings(run.path, config)
        run.event("quantize", layers=files.shape.layers, layers_per_job=config.quantize.layers_per_job)

    on_rank0(note)
    return [
        QuantizeJob(config, world, files, build_variant(config, files, name, world.device), tokens, stop)
        for name in (*config.quantize.baselines, LEARNED)
    ]


def layer_ranges_of(layers: int, per_job: int) -> list[tuple[int, int]]:
    """(start, stop) of the ranges that `layers` decoder layers are cut into; per_job 0 makes one."""
    step = per_job or layers
    return [(start, min(start + step, layers)) for start in range(0, layers, step)]


def ranges_within(layer_ranges: list[tuple[int, int]], wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """The ranges of `layer_ranges` that make up layers [start, stop).

    Raises:
        UserError: `wanted` cuts through a range, or is empty.
    """
    start, stop = wanted
    selected = [layer_range for layer_range in layer_ranges if start <= layer_range[0] and layer_range[1] <= stop]
    if not selected or selected[0][0] != start or selected[-1][1] != stop:
        bounds = ", ".join(f"{a}:{b}" for a, b in layer_ranges[:4]) + (", ..." if len(layer_ranges) > 4 else "")
        raise UserError(f"--layers {start}:{stop} is not made of whole jobs ({bounds})", "see quantize.layers_per_job")
    return selected


@dataclass
class QuantizeJob:
    """One variant to quantise, and the pieces that are made when they are first needed."""

    config: RunConfig
    world: World
    files: ModelFiles
    variant: Variant
    tokens: Tensor  # [n, T]
    stop: StopRequest

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return run_dir(self.config)

    @property
    def layer_ranges(self) -> list[tuple[int, int]]:
        """(start, stop) of every range of layers."""
        return layer_ranges_of(self.files.shape.layers, self.config.quantize.layers_per_job)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the variant's layer files."""
        return identity_hash(layer_identity(self.config, self.files, self.variant, self.tokens))

    def path(self, index: int) -> Path:
        """Where layer `index` is kept."""
        return layer_path(self.run.layers(self.variant.name), index)

    def load(self, index: int) -> QuantizedLayer | None:
        """Layer `index` if it is finished; a file that cannot be used is set aside."""
        return finished_layer(self.path(index), self.fingerprint, self.warn)

    def finished(self, start: int, stop: int) -> list[bool]:
        """Which layers of [start, stop) are there and whole, read by rank 0."""
        return on_rank0(lambda: [self.load(index) is not None for index in range(start, stop)])

    def warn(self, text: str) -> None:
        """Say it, and note it in the run's events."""
        warn(text)
        self.run.event("set_aside", variant=self.variant.name, problem=text)

    def make_embeddings(self) -> None:
        """Quantise the embedding and lm_head where that is asked for and not done yet."""
        if embeddings_of(self.config, self.files, self.variant).make(self.warn):
            self.run.event("ends", variant=self.variant.name)

    @cached_property
    def runner(self) -> LayerRunner:
        """Builds and runs the variant's layers, with the sites that calibration sees."""
        sites = self.variant.sites
        seen = sites if self.config.quantize.quantize_activations else unquantized(sites)
        return self.variant.runner(self.files.config, seen, self.world.device, model_dtype(self.config))

    @cached_property
    def stored(self) -> HiddenStateFiles:
        """The hidden states that its ranges start from; shared by all variants where they are the original network's."""
        sequences, length = self.tokens.shape
        return HiddenStateFiles(
            self.run.hidden_states(self.variant.name if self.own_network_reason else LEARNED),
            identity_hash(stored_states_identity(self.config, self.files, self.variant, self.tokens)),
            sequences,
            length,
            self.files.shape.hidden,
            model_dtype(self.config),
        )

    def remove_states(self) -> None:
        """Delete the stored hidden states, those too that an older version kept for each baseline."""
        self.stored.remove()
        shutil.rmtree(self.run.hidden_states(self.variant.name), ignore_errors=True)

    @cached_property
    def hidden_states(self) -> CalibrationStates:
        """The variant's hidden states at any layer."""

        def note(layer: int) -> None:
            self.run.event("boundary", variant=self.variant.name, layer=layer)

        if self.own_network_reason:
            network = StatesNetwork(self.runner, self.variant.weights)
        else:
            network = original_network(self.config, self.files, self.variant, self.world.device)
        return CalibrationStates(self.stored, network, self.variant.weights, self.tokens, self.world, self.stop, note)

    @property
    def own_network_reason(self) -> str:
        """See `states_network.own_network_reason`."""
        return own_network_reason(self.config, self.variant)

    @cached_property
    def quantizer(self) -> LayerQuantizer:
        """The solver under the configuration's options."""
        q, options, method = self.config.quantize, gptq_options(self.config), self.variant.method
        down_bits: int = self.config.quant.down_bits
        exact: dict[str, Any] = {}
        if method is not None:
            options = dataclasses.replace(options, mse_clip=options.mse_clip and not method.sets_weight_ranges)
            down_bits, exact = method.down_bits or down_bits, {"exact_columns": method.exact_columns}
        dtype = wide_dtype(self.config)
        return LayerQuantizer(
            self.runner, self.world, q.method, options, dtype, down_bits=down_bits, cd_passes=q.cd_passes, **exact
        )


def quantize_range(job: QuantizeJob, start: int, stop: int) -> None:
    """Quantise layers [start, stop), in order, each from what the quantised layers before it in the range give."""
    world, name, dtype = job.world, job.variant.name, model_dtype(job.config)
    finished = job.finished(start, stop)
    if all(finished):
        return
    progress = Progress(
        f"{job.config.quantize.method} ({name}): layer", stop - start, sum(finished), show=world.is_rank0
    )
    hidden = job.hidden_states.entering(start)
    # A layer after the last missing one need not be run again.
    indices = range(start, max(start + i for i, done in enumerate(finished) if not done) + 1)

    def prepare(index: int) -> dict[str, Tensor] | nn.Module:
        if not finished[index - start]:
            return job.variant.weights_to_quantize(index)
        layer = job.load(index)
        assert layer is not None
        return job.runner.build(index, layer.weights(dtype, world.device))

    # The next layer is read and merged, and the one before goes to disk, while one is worked on.
    layers = prefetched(prepare, indices, world.device)
    with BackgroundWriter(world.device) as writer, contextlib.closing(layers):
        for index, prepared in zip(indices, layers, strict=True):
            if isinstance(prepared, nn.Module):
                hidden = [job.runner.run(prepared, index, h) for h in hidden]
                continue
            began = time.monotonic()
            if world.is_rank0:
                job.run.event("layer_start", variant=name, layer=index, pid=os.getpid(), host=socket.gethostname())
            layer = job.quantizer.quantize(index, prepared, hidden)
            figures = worst(layer)
            on_rank0(writer.finish)
            if world.is_rank0:
                writer.start(functools.partial(_write, job, index, layer, round(time.monotonic() - began, 3)))
            progress.advance(f"worst output error {figures['error']:.4f}")
            if index + 1 < job.files.shape.layers and any_rank(bool(job.stop)):
                on_rank0(writer.finish)
                raise Interrupted(f"stopped by a signal after layer {index} ({name})", "the same command continues")
        on_rank0(writer.finish)


def _write(job: QuantizeJob, index: int, layer: QuantizedLayer, seconds: float) -> None:
    save_layer(job.path(index), layer, job.fingerprint)
    event = {"variant": job.variant.name, "layer": index, "pid": os.getpid(), "seconds": seconds}
    job.run.event("layer", **event, **worst(layer))


def worst(layer: QuantizedLayer) -> dict[str, float]:
    """The figures of the linear with the largest relative output error."""
    return max(layer.figures.values(), key=lambda figures: figures["error"])
