"""A range of layers that see each other's rounding errors, quantised in order."""

import contextlib
import functools
import os
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor, nn

from dist_spin.errors import Interrupted
from dist_spin.pipeline.model import model_dtype
from dist_spin.quantize.background_writer import BackgroundWriter
from dist_spin.quantize.job import QuantizeJob
from dist_spin.runtime.distributed import any_rank, on_rank0, raise_on_any_failure, taken_together
from dist_spin.runtime.prefetch import prefetched
from dist_spin.runtime.progress import Progress
from dist_spin.storage.quantized_layers import QuantizedLayer, save_layer


@dataclass(frozen=True)
class LayerRange:
    """Layers [start, stop) of one variant, and which of them are finished."""

    job: QuantizeJob
    start: int
    stop: int
    finished: list[bool]

    @property
    def missing(self) -> int:
        """Layers that are still to be quantised."""
        return self.finished.count(False)


def quantize_range(job: QuantizeJob, start: int, stop: int) -> None:
    """Quantise layers [start, stop), in order, each from what the quantised layers before it in the range give."""
    layers = LayerRange(job, start, stop, job.finished(start, stop))
    progress = Progress(
        f"{job.config.quantize.method} ({job.variant.name}): layer",
        stop - start,
        stop - start - layers.missing,
        show=job.world.is_rank0,
    )
    with contextlib.closing(quantize_layers(layers)) as errors:
        for error in errors:
            progress.advance(f"worst output error {error:.4f}")


def quantize_layers(layers: LayerRange) -> Generator[float, None, None]:
    """What `quantize_range` does, layer by layer: yields the worst relative output error of each layer that was missing.

    Raises:
        Interrupted: a signal came; finished layers are kept.
    """
    job, start, finished = layers.job, layers.start, layers.finished
    if all(finished):
        return
    world, name, dtype = job.world, job.variant.name, model_dtype(job.config)
    if any_rank(bool(job.stop)):  # not asked after the last layer of the range before
        raise Interrupted(f"stopped by a signal before layer {start} ({name})", "the same command continues")
    hidden = job.hidden_states.entering(start)
    # A layer after the last missing one need not be run again.
    indices = range(start, max(start + i for i, done in enumerate(finished) if not done) + 1)

    def prepare(index: int) -> dict[str, Tensor] | nn.Module:
        if not finished[index - start]:
            return job.variant.weights_to_quantize(index)
        layer = job.load(index, world.device)
        assert layer is not None
        return job.runner.build(index, layer.weights(dtype, world.device))

    # The next layer is read and merged, and the one before goes to disk, while one is worked on.
    ready = prefetched(prepare, indices, world.device)
    with BackgroundWriter(world.device) as writer, contextlib.closing(ready):
        for index, prepared in zip(indices, taken_together(ready), strict=True):
            if isinstance(prepared, nn.Module):
                raise_on_any_failure(functools.partial(_run_again, job, index, prepared, hidden))
                continue
            began = time.monotonic()
            if world.is_rank0:
                job.run.event("layer_start", variant=name, layer=index, pid=os.getpid(), host=socket.gethostname())
            layer = job.quantizer.quantize(index, prepared, hidden)
            error = worst(layer)["error"]
            on_rank0(writer.finish)
            if world.is_rank0:
                writer.start(functools.partial(_write, job, index, layer, round(time.monotonic() - began, 3)))
            del layer, prepared
            yield error
            if index + 1 < job.files.shape.layers and any_rank(bool(job.stop)):
                on_rank0(writer.finish)
                raise Interrupted(f"stopped by a signal after layer {index} ({name})", "the same command continues")
        on_rank0(writer.finish)


def _run_again(job: QuantizeJob, index: int, layer: nn.Module, hidden: list[Tensor]) -> None:
    """Move `hidden` through a layer that is finished, in place."""
    for i, h in enumerate(hidden):
        hidden[i] = job.runner.run(layer, index, h)


def _write(job: QuantizeJob, index: int, layer: QuantizedLayer, seconds: float) -> None:
    save_layer(job.path(index), layer, job.fingerprint)
    event = {"variant": job.variant.name, "layer": index, "pid": os.getpid(), "seconds": seconds}
    job.run.event("layer", **event, **worst(layer))


def worst(layer: QuantizedLayer) -> dict[str, float]:
    """The figures of the linear with the largest relative output error."""
    return max(layer.figures.values(), key=lambda figures: figures["error"])
