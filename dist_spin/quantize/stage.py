"""Merge the rotations and quantise the weights, layer by layer; finished layers are never done again.

    dist-spin quantize CONFIG.yaml                                       all layers, in this process
    torchrun --nproc_per_node 2 -m dist_spin quantize CONFIG.yaml        the same, shared out over ranks (quantize.parallel)
    dist-spin quantize CONFIG.yaml --layers 10:20                        one job of quantize.layers_per_job=10
    dist-spin quantize CONFIG.yaml --hidden-states                       only what such jobs start from
    dist-spin quantize CONFIG.yaml --cluster local --workers 4           every job, in parallel (see launch/)

Layers are cut into ranges of `quantize.layers_per_job`. A range starts from the hidden states of the 16-bit model and sees the
rounding errors of its own layers only, so ranges may be done at any time, on any machine, in any order, with the same files.
"""

import contextlib
import functools
from collections.abc import Mapping

from dist_spin.config.run import RunConfig
from dist_spin.pipeline.export_limits import check_export_target
from dist_spin.pipeline.model import model_dtype, open_configured_model
from dist_spin.pipeline.variants import build_variant, calibration_tokens
from dist_spin.quantize.job import QuantizeJob, ranges_within
from dist_spin.quantize.layer_range import LayerRange, quantize_range
from dist_spin.quantize.parallel import MEMORY_SHARE, choose, layer_cost, memory_needed
from dist_spin.quantize.rank_layers import begun_by, quantize_apart
from dist_spin.quantize.tune import remove_untuned, tune, tunes, untuned
from dist_spin.runtime.device_memory import device_bytes_free
from dist_spin.runtime.distributed import World, any_rank, made_on_all, on_rank0
from dist_spin.runtime.host_memory import host_bytes_free
from dist_spin.runtime.progress import say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import LEARNED, run_dir
from dist_spin.storage.run_records import keep_settings


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
    jobs: list[QuantizeJob], layers: tuple[int, int] | None = None, *, hidden_states_only: bool = False
) -> None:
    """What `quantize` does, for these variants of one run, which share stored hidden states where they can."""
    if not jobs:
        return
    tuned = []
    for job in jobs:
        if not tunes(job) or hidden_states_only:
            continue
        if open_ranges(job):
            tuned.append(job)
        else:  # one that was killed between its last layer and this may have left them
            on_rank0(functools.partial(remove_untuned, job))
    if tuned:
        rounded = {id(job): untuned(job) for job in tuned}
        _quantize([rounded.get(id(job), job) for job in jobs], layers)
        for job in tuned:
            on_rank0(job.make_embeddings)
            tune(job, rounded[id(job)])
    else:
        _quantize(jobs, layers, hidden_states_only=hidden_states_only)


def _quantize(jobs: list[QuantizeJob], layers: tuple[int, int] | None, *, hidden_states_only: bool = False) -> None:
    ranges = [layer_range for job in jobs for layer_range in open_ranges(job, layers)]
    share_layers = hidden_states_only or not _takes_ranges(ranges, jobs[0])
    with contextlib.ExitStack() as writers:
        if hidden_states_only or layers is None or not share_layers:
            begins = {} if share_layers else begun_by(ranges, jobs[0].world.size)
            # Ranks that were all handed their states begin while the last are written; further ranges and variants read them.
            later = writers if begins and len(begins) == len(ranges) and len(jobs) == 1 else None
            for job in jobs:
                starts = [each.start for each in ranges if each.job is job]
                handed = {each.start: rank for rank, each in begins.items() if each.job is job}
                make_states(job, starts, handed, later)
        if hidden_states_only:
            return
        if layers is None or layers[0] == 0:  # the job of the first layer makes embedding and lm_head too
            for job in jobs:
                on_rank0(job.make_embeddings)
        if share_layers:
            for each in ranges:
                quantize_range(each.job, each.start, each.stop)
        else:
            quantize_apart(ranges, jobs[0].world)
            if any(each.start for each in ranges):
                for job in jobs:
                    job.hidden_states.finish()
    if layers is None:
        for job in jobs:
            on_rank0(job.remove_states)


def open_ranges(job: QuantizeJob, layers: tuple[int, int] | None = None) -> list[LayerRange]:
    """The ranges of a variant that lack layers, of all or of those within `layers`; damaged files are set aside."""
    selected = job.layer_ranges if layers is None else ranges_within(job.layer_ranges, layers)
    ranges = [LayerRange(job, start, stop, job.finished(start, stop)) for start, stop in selected]
    return [layer_range for layer_range in ranges if layer_range.missing]


def make_states(
    job: QuantizeJob,
    starts: list[int],
    begins: Mapping[int, int] | None = None,
    writers: contextlib.ExitStack | None = None,
) -> None:
    """Store what enters the layers `starts`; all ranks share the pass. begins, writers: as in `CalibrationStates.make`."""
    if not any(starts):
        return
    if job.own_network_reason and job.world.is_rank0:
        say(f"hidden states of {job.variant.name} are those of its own layers: {job.own_network_reason}")
    job.hidden_states.make(starts, begins, writers)


def _takes_ranges(ranges: list[LayerRange], job: QuantizeJob) -> bool:
    """Whether each rank takes whole ranges; says so where there are several ranks."""
    world, shape, (sequences, length) = job.world, job.files.shape, job.tokens.shape
    if world.size == 1 or not ranges:
        return False
    needed = memory_needed(shape, sequences * length, model_dtype(job.config).itemsize)
    fits = not any_rank(needed > MEMORY_SHARE * _free_bytes(world))
    missing = [layer_range.missing for layer_range in ranges]
    states_to = on_rank0(
        lambda: max((each.start for each in ranges if each.start and not job.stored.present(each.start)), default=0)
    )
    cost = layer_cost(shape, sequences * length)
    choice = choose(job.config.quantize.parallel, cost, missing, states_to, sequences, world.size, fits=fits)
    if world.is_rank0:
        how = "take whole ranges of layers" if choice.parallel == "layers" else "share each layer"
        say(f"{world.size} ranks {how}: {choice.reason}")
    return choice.parallel == "layers"


def _free_bytes(world: World) -> int:
    """Memory that this rank may take, of its GPU, or its share of the host's."""
    if world.device.type == "cuda":
        return device_bytes_free(world.device)
    return host_bytes_free() // world.local_size


def prepare_jobs(config: RunConfig, world: World) -> list[QuantizeJob]:
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
        QuantizeJob(
            config,
            world,
            files,
            made_on_all(functools.partial(build_variant, config, files, name, world.device)),
            tokens,
            stop,
        )
        for name in (*config.quantize.baselines, LEARNED)
    ]
