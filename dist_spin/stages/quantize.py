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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_spin.boundary_files import BoundaryFiles
from dist_spin.config import dump_config
from dist_spin.data import calibration_windows, fingerprint
from dist_spin.distributed import World, any_rank, on_leader
from dist_spin.engine.layerwise import LayerQuantizer
from dist_spin.errors import Interrupted, UserError
from dist_spin.layer_files import QuantizedLayer, ends_path, finished_layer, identity_hash, layer_path, save_layer
from dist_spin.model.layers import LayerRunner, RotatedWeights
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites, initial
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.progress import Progress
from dist_spin.rotation_files import load_rotations
from dist_spin.rundir import RunDir, tensors_digest, write_text
from dist_spin.settings import SELF, RunConfig
from dist_spin.signals import StopRequest
from dist_spin.stages.boundaries import Boundaries
from dist_spin.stages.common import (
    ENDS_SETTINGS,
    WEIGHT_SETTINGS,
    check_vocabulary,
    flat,
    learned_transforms,
    model_dtype,
    open_configured_model,
    run_dir,
    say,
    sites_for,
)
from dist_spin.stages.ends import Ends, ends_bits
from dist_spin.stages.given import keep_given
from dist_spin.stages.self_text import self_text

LEARNED = "learned"
HALF = ("bfloat16", "float16")


class Recipe(Protocol):
    """What another method (`dist_spin.stages.methods`) puts into the layers of an unrotated model."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides it."""

    def runner(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> LayerRunner:
        """Builds and runs its layers."""

    def to_round(self, index: int) -> dict[str, Tensor]:
        """A layer's parameters inside the ranges it has learned for their codes."""

    @property
    def clips(self) -> bool:
        """Whether it has learned such ranges, so that none are searched for."""

    @property
    def down_bits(self) -> int:
        """Weight bits of down_proj, or 0 for the configuration's."""

    def kept(self, index: int) -> dict[str, Tensor]:
        """Input columns [n] of a layer's linears that stay exact, by linear."""


@dataclass
class Variant:
    """One rotation of a model: learned, an unlearned baseline, or "none"; or another method, by its recipe.

    digest: of everything that was learned, made when not given. transforms: learned scales and clips
    (`rotation_files.load_transforms`), which `sites` and `weights` contain.
    """

    name: str
    rotations: tuple[Tensor, Tensor] | None
    sites: Sites
    weights: RotatedWeights
    transforms: dict[str, Tensor] = field(default_factory=dict)
    recipe: Recipe | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            rotations = dict(zip(("R1", "R2"), self.rotations or (), strict=False))
            self.digest = tensors_digest({**rotations, **self.transforms})

    def runner(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> LayerRunner:
        """Builds and runs its layers with `sites`, of a model's `config`."""
        if self.recipe is not None:
            return self.recipe.runner(config, sites, device, dtype)
        return LayerRunner(config, sites, device=device, dtype=dtype, rotated=self.rotations is not None)

    def to_round(self, index: int) -> dict[str, Tensor]:
        """Parameters of decoder layer `index` as the weight quantiser takes them."""
        return self.weights.layer(index) if self.recipe is None else self.recipe.to_round(index)


def variant(config: RunConfig, files: ModelFiles, name: str, device: torch.device) -> Variant:
    """The rotations of a variant, its sites and its merged weights.

    name: "none", LEARNED, or a kind of `model.rotation.initial`; "quarot" also has QuaRot's Hadamard across heads.

    Raises:
        UserError: the learned rotations are not there yet, or belong to another model.
    """
    shape = files.shape
    transforms: dict[str, Tensor] = {}
    if name == "none":
        rotations = None
    elif name == LEARNED:
        if config.optimize.steps == 0:
            keep_given(config, shape)
        path = run_dir(config).rotations / "final.safetensors"
        if not path.exists():
            raise UserError(f"{path} does not exist", "run `dist-spin optimize` first")
        rotations = load_rotations(path, shape.hidden, shape.head_dim, shape.layers)
        transforms = learned_transforms(path, config)
    else:
        rotations = initial(name, shape, config.rotation.seed)
    sites = sites_for(config, shape, rotated=rotations is not None, heads=name == "quarot")
    sites = dataclasses.replace(sites, clips=transforms.get("clip"))
    scales = {key.removeprefix("scale."): t for key, t in transforms.items() if key.startswith("scale.")}
    weights = RotatedWeights(
        files.weights, shape, rotations, sites.r4, device, model_dtype(config), sites.heads, scales
    )
    return Variant(name, rotations, sites, weights, transforms)


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


def calibration_tokens(config: RunConfig, files: ModelFiles) -> Tensor:
    """The calibration sequences [n, T] of a configuration."""
    q = config.quantize
    if q.source == SELF:
        return on_leader(lambda: self_text(config, files, q.n_sequences, q.seq_len, q.seed))
    tokenizer = None if q.source.startswith("tokens:") else files.tokenizer()
    tokens = on_leader(lambda: calibration_windows(q.source, q.split, q.n_sequences, q.seq_len, q.seed, tokenizer))
    return check_vocabulary(tokens, files.shape, q.source)


def states_identity(config: RunConfig, files: ModelFiles, chosen: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the hidden states of a variant's 16-bit model on the calibration sequences."""
    return {
        **model_identity(config, files, chosen),
        "calibration": fingerprint(tokens),
        "sites": site_settings(config) if config.quantize.quantize_activations else "unquantized",
    }


def model_identity(config: RunConfig, files: ModelFiles, chosen: Variant) -> dict[str, Any]:
    """Everything that decides a variant's 16-bit weights and online Hadamards."""
    recipe = {} if chosen.recipe is None else {"recipe": chosen.recipe.fingerprint}
    return {
        **recipe,
        "model": files.weights.fingerprint(),
        "dtype": config.model.dtype,
        "rotations": chosen.digest,
        "online": config.rotation.online and chosen.rotations is not None,
        "r4_block": config.rotation.r4_block,
        **({"heads": True} if chosen.sites.heads else {}),
    }


def site_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of what is quantised at run time: activations, keys and values."""
    return {k: v for k, v in flat(config.quant, "quant").items() if not k.startswith(WEIGHT_SETTINGS)}


def layer_identity(config: RunConfig, files: ModelFiles, chosen: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the content of a variant's layer files."""
    settings = flat(config.quantize, "quantize")
    del settings["quantize.baselines"]  # decide nothing about layers
    if settings["quantize.layers_per_job"] >= files.shape.layers:  # one span, however it was said
        settings["quantize.layers_per_job"] = 0
    # No setting of a site decides a weight that was calibrated without it.
    seen = () if config.quantize.quantize_activations else site_settings(config)
    quant = {k: v for k, v in flat(config.quant, "quant").items() if k not in (*ENDS_SETTINGS, *seen)}
    if config.quant.down_bits in (0, config.quant.w_bits):  # the same, however it was said
        del quant["quant.down_bits"]
    rounded = gptq_options(config).scale_dtype
    scales = {} if rounded is None else {"scales": str(rounded)}
    return {**states_identity(config, files, chosen, tokens), **quant, **settings, **scales}


def ends_of(config: RunConfig, files: ModelFiles, chosen: Variant) -> Ends:
    """The embedding and lm_head of a variant under a configuration's bits."""
    bits, clip = ends_bits(config), config.quant.w_mse_clip
    identity = {
        "model": files.weights.fingerprint(),
        "dtype": config.model.dtype,
        "rotations": chosen.digest,
        "bits": bits,
        "mse_clip": clip,
    }
    directory = run_dir(config).layers("" if chosen.name == LEARNED else chosen.name)
    return Ends(chosen.weights, bits, clip, ends_path(directory), identity_hash(identity))


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
        dtype = torch.float64 if model_dtype(self.config) == torch.float64 else torch.float32
        return LayerQuantizer(
            self.runner, self.world, q.method, options, dtype, down_bits=down_bits, sweeps=q.sweeps, **kept
        )


def gptq_options(config: RunConfig) -> GPTQOptions:
    """The solver's options of a configuration."""
    q, w = config.quantize, config.quant
    options = GPTQOptions(
        w.w_bits,
        w.w_symmetric,
        w.w_group_size,
        w.w_mse_clip,
        q.percdamp,
        q.block_size,
        q.act_order,
        clip_norm=q.clip_norm,
    )
    if (
        w.arithmetic == "compressed-tensors" and config.model.dtype in HALF
    ):  # its runtimes hold scales in the model's dtype
        return dataclasses.replace(options, scale_dtype=model_dtype(config))
    return options


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


def unquantized(sites: Sites) -> Sites:
    """The same network with every activation quantiser off; R3 goes too, since queries and keys without it cancel it."""
    off = QuantSpec()
    return dataclasses.replace(sites, a=off, o=off, k=off, v=off, mlp=None, down=None, r3=())


def worst(layer: QuantizedLayer) -> dict[str, float]:
    """The figures of the linear with the largest relative output error."""
    return max(layer.figures.values(), key=lambda figures: figures["error"])
