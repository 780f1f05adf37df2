"""Merge the rotations and quantise the weights, layer by layer; finished layers are never done again.

    dist-spin quantize CONFIG.yaml                                       all layers, in this process
    torchrun --nproc_per_node 2 -m dist_spin quantize CONFIG.yaml        the same, shared out over ranks
    dist-spin quantize CONFIG.yaml --layers 10:20                        one job of quantize.layers_per_job=10
    dist-spin quantize CONFIG.yaml --boundaries                          only what such jobs start from
    dist-spin quantize CONFIG.yaml --cluster local --workers 4           every job, in parallel (see launch/)

Layers are cut into spans of `quantize.layers_per_job`. A span starts from the hidden states of the 16-bit model and sees the
rounding errors of its own layers, so spans may be done at any time, anywhere, in any order: the files come out the same.
"""

import dataclasses
import functools
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_spin.config.loader import dump_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.model.layers import LayerRunner
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.embeddings import ends_of
from dist_spin.pipeline.fingerprints import gptq_options, layer_identity, states_identity
from dist_spin.pipeline.model import model_dtype, open_configured_model, wide_dtype
from dist_spin.pipeline.variants import LEARNED, Variant, calibration_tokens, unquantized, variant
from dist_spin.quantize.calibration_states import Boundaries
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.runtime.distributed import World, any_rank, on_leader
from dist_spin.runtime.progress import Progress, say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import write_text
from dist_spin.storage.hidden_states import BoundaryFiles
from dist_spin.storage.quantized_layers import QuantizedLayer, finished_layer, layer_path, save_layer
from dist_spin.storage.run_directory import RunDir, run_dir
from dist_spin.storage.tensor_file import identity_hash


def quantize(
    config: RunConfig, world: World, layers: tuple[int, int] | None = None, boundaries_only: bool = False
) -> None:
    """Quantise the learned variant and all baselines.

    Args:
        layers: only these, from the first up to but not including the second: whole spans.
        boundaries_only: only store the hidden states that spans start from.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the configuration or the run directory is in the way.
    """
    for work in prepare_works(config, world):
        quantize_variant(work, layers, boundaries_only)


def quantize_variant(work: "Work", layers: tuple[int, int] | None = None, boundaries_only: bool = False) -> None:
    """What `quantize` does, for one variant."""
    chosen = work.spans if layers is None else spans_within(work.spans, layers)
    open_spans = [span for span in chosen if not all(work.finished(*span))]
    if len(work.spans) > 1 and (boundaries_only or layers is None):
        work.boundaries.make([start for start, _ in open_spans])
    if boundaries_only:
        return
    if chosen[0][0] == 0:  # the job of the first layer makes the ends too
        on_leader(work.make_ends)
    for span in open_spans:
        quantize_span(work, *span)
    if layers is None:
        on_leader(work.stored.remove)


def prepare_works(config: RunConfig, world: World) -> list["Work"]:
    """What there is to do for each variant; nothing where weights stay at 16 bits."""
    if config.quantize.method == "none" or config.quant.w_bits == 16:
        say("weights stay at 16 bits: nothing to quantise")
        return []
    stop = StopRequest()
    files = open_configured_model(config)
    tokens = calibration_tokens(config, files)
    run = run_dir(config)

    def note() -> None:
        if not (run.path / "config.yaml").exists():
            write_text(run.path / "config.yaml", dump_config(config))
        run.event("quantize", layers=files.shape.layers, layers_per_job=config.quantize.layers_per_job)

    on_leader(note)
    return [
        Work(config, world, files, variant(config, files, name, world.device), tokens, stop)
        for name in (*config.quantize.baselines, LEARNED)
    ]


def spans_of(layers: int, per_job: int) -> list[tuple[int, int]]:
    """(start, stop) of the spans that `layers` decoder layers are cut into; per_job 0 makes one."""
    step = per_job or layers
    return [(start, min(start + step, layers)) for start in range(0, layers, step)]


def spans_within(spans: list[tuple[int, int]], wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """The spans that make up layers [start, stop).

    Raises:
        UserError: the range cuts through a span, or is empty.
    """
    start, stop = wanted
    chosen = [span for span in spans if start <= span[0] and span[1] <= stop]
    if not chosen or chosen[0][0] != start or chosen[-1][1] != stop:
        bounds = ", ".join(f"{a}:{b}" for a, b in spans[:4]) + (", ..." if len(spans) > 4 else "")
        raise UserError(f"--layers {start}:{stop} is not made of whole jobs ({bounds})", "see quantize.layers_per_job")
    return chosen


@dataclass
class Work:
    """One variant to quantise, and the pieces that are made when they are first needed."""

    config: RunConfig
    world: World
    files: ModelFiles
    chosen: Variant
    tokens: Tensor  # [n, T]
    stop: StopRequest

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return run_dir(self.config)

    @property
    def baseline(self) -> str:
        """The variant's name in paths."""
        return "" if self.chosen.name == LEARNED else self.chosen.name

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of every span."""
        return spans_of(self.files.shape.layers, self.config.quantize.layers_per_job)

    @cached_property
    def made_under(self) -> str:
        """The fingerprint of the variant's layer files."""
        return identity_hash(layer_identity(self.config, self.files, self.chosen, self.tokens))

    def path(self, index: int) -> Path:
        """Where layer `index` is kept."""
        return layer_path(self.run.layers(self.baseline), index)

    def load(self, index: int) -> QuantizedLayer | None:
        """Layer `index` if it is finished; a file that cannot be used is set aside."""
        return finished_layer(self.path(index), self.made_under, self.warn)

    def finished(self, start: int, stop: int) -> list[bool]:
        """Which layers of [start, stop) are there and whole, read by rank 0."""
        return on_leader(lambda: [self.load(index) is not None for index in range(start, stop)])

    def warn(self, text: str) -> None:
        """Say it, and note it in the run's events."""
        say(text)
        self.run.event("set_aside", variant=self.chosen.name, problem=text)

    def make_ends(self) -> None:
        """Quantise the embedding and lm_head where that is asked for and not done yet."""
        if ends_of(self.config, self.files, self.chosen).make(self.warn):
            self.run.event("ends", variant=self.chosen.name)

    @cached_property
    def runner(self) -> LayerRunner:
        """Builds and runs the variant's layers, with the sites that calibration sees."""
        sites = self.chosen.sites
        seen = sites if self.config.quantize.quantize_activations else unquantized(sites)
        return self.chosen.runner(self.files.config, seen, self.world.device, model_dtype(self.config))

    @cached_property
    def stored(self) -> BoundaryFiles:
        """The variant's stored hidden states."""
        sequences, length = self.tokens.shape
        return BoundaryFiles(
            self.run.boundaries(self.baseline),
            identity_hash(states_identity(self.config, self.files, self.chosen, self.tokens)),
            sequences,
            length,
            self.files.shape.hidden,
            model_dtype(self.config),
        )

    @cached_property
    def boundaries(self) -> Boundaries:
        """The variant's hidden states at any layer."""

        def note(layer: int) -> None:
            self.run.event("boundary", variant=self.chosen.name, layer=layer)

        return Boundaries(self.stored, self.runner, self.chosen.weights, self.tokens, self.world, self.stop, note)

    @cached_property
    def quantizer(self) -> LayerQuantizer:
        """The solver under the configuration's options."""
        q, options, recipe = self.config.quantize, gptq_options(self.config), self.chosen.recipe
        down_bits: int = self.config.quant.down_bits
        kept: dict[str, Any] = {}
        if recipe is not None:
            options = dataclasses.replace(options, mse_clip=options.mse_clip and not recipe.clips)
            down_bits, kept = recipe.down_bits or down_bits, {"kept": recipe.kept}
        dtype = wide_dtype(self.config)
        return LayerQuantizer(
            self.runner, self.world, q.method, options, dtype, down_bits=down_bits, sweeps=q.sweeps, **kept
        )


def quantize_span(work: Work, start: int, stop: int) -> None:
    """Quantise layers [start, stop), in order, each from the quantised layers of the span before it."""
    world, name, dtype = work.world, work.chosen.name, model_dtype(work.config)
    found = work.finished(start, stop)
    if all(found):
        return
    progress = Progress(f"{work.config.quantize.method} ({name}): layer", stop - start, sum(found), show=world.leads)
    hidden = work.boundaries.entering(start)
    # A layer goes to disk while the next one is worked on.
    with ThreadPoolExecutor(1, "layer-writer") as writer:
        written: Future[None] | None = None
        # A layer after the last missing one need not be run again.
        for index in range(start, max(start + i for i, done in enumerate(found) if not done) + 1):
            if found[index - start]:
                layer = work.load(index)
                assert layer is not None
                module = work.runner.build(index, layer.weights(dtype, world.device))
                hidden = [work.runner.run(module, index, h) for h in hidden]
                continue
            began = time.monotonic()
            if world.leads:
                work.run.event("layer_start", variant=name, layer=index, pid=os.getpid(), host=socket.gethostname())
            layer = work.quantizer.quantize(index, work.chosen.to_round(index), hidden)
            figures = worst(layer)
            on_leader(functools.partial(_finish, written))
            if world.leads:
                written = writer.submit(_write, work, index, layer, round(time.monotonic() - began, 3))
            progress.advance(f"worst output error {figures['error']:.4f}")
            if index + 1 < work.files.shape.layers and any_rank(bool(work.stop)):
                on_leader(functools.partial(_finish, written))
                raise Interrupted(f"stopped by a signal after layer {index} ({name})", "the same command continues")
        on_leader(functools.partial(_finish, written))


def _write(work: Work, index: int, layer: QuantizedLayer, seconds: float) -> None:
    save_layer(work.path(index), layer, work.made_under)
    event = {"variant": work.chosen.name, "layer": index, "pid": os.getpid(), "seconds": seconds}
    work.run.event("layer", **event, **worst(layer))


def _finish(written: Future[None] | None) -> None:
    """Wait until a layer is on disk; raises what kept it from getting there."""
    if written is not None:
        written.result()


def worst(layer: QuantizedLayer) -> dict[str, float]:
    """The figures of the linear with the largest relative output error."""
    return max(layer.figures.values(), key=lambda figures: figures["error"])
