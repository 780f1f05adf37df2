"""The other methods of a comparison as variants: learned layer by layer, then rounded and measured like a rotation.
LLM-QAT alone trains the model as a whole (`compare.llm_qat_training`); what it leaves lies and is read in the same way.

    RUN/methods/NAME/KEY/000.safetensors ...      a layer's state each; KEY hashes all that decides them

Every layer is learned from the full-precision model alone, so ranks and jobs take different layers and need not meet.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_spin.compare.llm_qat_training import train
from dist_spin.compare.methods import dartquant, flatquant, llm_qat, omniquant, quik, smoothquant
from dist_spin.compare.methods.layer_training import Schedule
from dist_spin.compare.methods.transformed_layer import State, TransformedRunner, TransformedWeights
from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.model.layer_inputs import LayerTask, observe
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.pipeline.fingerprints import EMBEDDING_SETTINGS, flat, gptq_options, model_identity, states_identity
from dist_spin.pipeline.model import model_dtype, wide_dtype
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.variants import Variant, build_variant, calibration_tokens
from dist_spin.runtime.distributed import World, any_rank, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import Progress, say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.quantized_layers import layer_path
from dist_spin.storage.rotations import load_rotations
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import identity_hash, load_if_current, load_tensors, save_tensors

METHODS = {
    "smoothquant": "SmoothQuant",
    "omniquant": "OmniQuant",
    "affinequant": "AffineQuant",
    "quik": "QUIK-4B",
    "dartquant": "DartQuant",
    "flatquant": "FlatQuant",
    "llm_qat": "LLM-QAT",
}
CLIPPING = ("omniquant", "affinequant", "flatquant")  # learn the range of each weight row
WHOLE = ("llm_qat",)  # train the model as a whole, and leave one state more: of its ends, numbered after the last layer
# The settings of `methods` that decide a method, by the beginning of their names.
SETTINGS = {"smoothquant": "smooth_", "quik": "quik_", "dartquant": "dart_", "llm_qat": "qat_"} | dict.fromkeys(
    CLIPPING, "flat_"
)
Learner = Callable[[LayerTask], tuple[State, dict[str, float]]]


def learn(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    name: str,
    layers: tuple[int, int] | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Learn what a method needs, except for layers that are there; called by all ranks together.

    Args:
        layers: only these, from the first up to but not including the second; of a method in `WHOLE` always all.
        stop: of the stage that this is a part of; alone it has its own.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the text cannot be read, a file cannot be written, or the model is too large for the method.
    """
    stop = StopRequest() if stop is None else stop
    tokens = torch.empty(0) if name in WHOLE else calibration_tokens(config, files)
    recipe = MethodRecipe(config, files, name, world.device, tokens)
    first, end = layers or (0, files.shape.layers)

    def missing(layers: range) -> list[int]:
        return on_rank0(lambda: [] if recipe.rotations.exists() else [i for i in layers if recipe.finished(i) is None])

    if name in WHOLE:
        if missing(range(files.shape.layers + 1)):
            train(config, world, files, recipe.sites, recipe.options, recipe.directory, recipe.save, stop)
        return
    if wanted := missing(range(first, end)):
        _learn_layers(recipe, world, wanted, stop)
    learns_rotations = name == "dartquant" and not on_rank0(recipe.rotations.exists)
    if learns_rotations and not missing(range(files.shape.layers)):
        _learn_rotations(recipe, world)


def _learn_layers(recipe: "MethodRecipe", world: World, missing: list[int], stop: StopRequest) -> None:
    config, files, name = recipe.config, recipe.files, recipe.name
    wide = wide_dtype(config)
    off = Sites()
    runner = LayerRunner(files.config, off, device=world.device, dtype=wide, rotated=False)
    plain = RotatedWeights(files.weights, files.shape, None, (), world.device, model_dtype(config))
    hidden = plain.embedding()[recipe.tokens.to(world.device)].to(wide)  # [n, T, h]
    progress = Progress(f"{METHODS[name]}: layer", missing[-1] + 1, show=world.is_rank0)

    def advance(start: int, end: int, mine: int | None) -> None:
        nonlocal hidden
        for index in range(start, end):
            task = LayerTask(index, runner, plain.layer(index), hidden)
            note = ""
            if index == mine:
                state, figures = recipe.learner(task)
                recipe.save(index, state, figures)
                note = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            if index < missing[-1]:
                hidden = observe(task)
            progress.advance(note)

    start = 0
    for first in range(0, len(missing), world.size):  # a layer for each rank, then they meet
        taken = missing[first : first + world.size]
        mine = taken[world.rank] if world.rank < len(taken) else None
        raise_on_any_failure(functools.partial(advance, start, taken[-1] + 1, mine))
        start = taken[-1] + 1
        if start <= missing[-1] and any_rank(bool(stop)):
            raise Interrupted(f"stopped by a signal after layer {start - 1} ({name})", "the same command continues")


def _learn_rotations(recipe: "MethodRecipe", world: World) -> None:
    """DartQuant's R1 from what all layers have stored; the files of layers are gone after it.

    Every rank does the same, so that none waits; rank 0 writes.
    """
    m, seed, shape = recipe.config.methods, recipe.config.quantize.seed, recipe.files.shape
    start = initial("hadamard", shape, seed)[0].to(world.device, wide_dtype(recipe.config))
    progress = Progress("DartQuant: R1, epoch", m.dart_epochs, show=world.is_rank0)

    def batches(epoch: int) -> Iterator[Tensor]:
        order = np.random.default_rng((seed, epoch)).permutation(shape.layers)
        for index in order.tolist():
            stored = recipe.state(index)
            for site in dartquant.R1_SITES:
                yield from stored[site].to(world.device).split(m.dart_batch_size)
        progress.advance()

    r1, means = dartquant.fit(start, batches, m.dart_epochs, m.dart_lr)
    r2 = torch.stack([recipe.state(index)["R2"] for index in range(shape.layers)])
    raise_on_any_failure(lambda: None)  # nobody reads a layer's file any more

    def finish() -> None:
        figures = json.dumps({"first_whip": means[0], "last_whip": means[-1]})
        save_tensors(recipe.rotations, {"R1": r1, "R2": r2}, {"fingerprint": recipe.fingerprint, "figures": figures})
        for index in range(shape.layers):
            recipe.path(index).unlink(missing_ok=True)

    on_rank0(finish)


def method_variant(config: RunConfig, files: ModelFiles, name: str, device: torch.device, tokens: Tensor) -> Variant:
    """A method's variant; its layers are read when they are built. tokens: `calibration_tokens` of the configuration."""
    recipe, shape = MethodRecipe(config, files, name, device, tokens), files.shape
    if name == "dartquant":
        if not recipe.rotations.exists():
            raise UserError(f"the rotations of {METHODS[name]} are not learned", "start the comparison again")
        rotations = load_rotations(recipe.rotations, shape.hidden, shape.head_dim, shape.layers)
        sites = sites_for(config, shape)
        turned = RotatedWeights(files.weights, shape, rotations, sites.r4, device, model_dtype(config))
        return Variant(name, rotations, sites, turned)
    digest = recipe.fingerprint if name in WHOLE else ""  # of the ends as well
    return Variant(name, None, recipe.sites, recipe.weights, recipe=recipe, digest=digest)


@dataclass
class MethodRecipe:
    """What a method puts into each layer (`pipeline.variants.Recipe`), kept in files."""

    config: RunConfig
    files: ModelFiles
    name: str
    device: torch.device
    tokens: Tensor  # [n, T]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the states."""
        config = self.config
        unrotated = build_variant(config, self.files, "none", torch.device("cpu"))
        quant = {k: v for k, v in flat(config.quant, "quant").items() if k not in EMBEDDING_SETTINGS}
        settings = {k: v for k, v in vars(config.methods).items() if k.startswith(SETTINGS[self.name])}
        if self.name in WHOLE:
            q = config.quantize
            text = {"text": [q.n_sequences, q.seq_len, q.seed]}  # the model writes it
            known = model_identity(config, self.files, unrotated) | text
        else:
            known = states_identity(config, self.files, unrotated, self.tokens)
        bits = {**quant, "weights": config.quantize.method != "none"}
        if self.name in ("quik", "dartquant"):  # read activations alone
            bits = {}
        return identity_hash({"method": self.name, **known, **bits, **settings})

    @property
    def directory(self) -> Path:
        """Where its files lie."""
        return run_dir(self.config).path / "methods" / self.name / self.fingerprint[:12]

    @property
    def rotations(self) -> Path:
        """Where rotations that all layers share are kept, if the method learns them."""
        return self.directory / "rotations.safetensors"

    def path(self, index: int) -> Path:
        """Where the state of layer `index` is kept."""
        return layer_path(self.directory, index)

    def save(self, index: int, state: State, figures: dict[str, float]) -> None:
        """Write one layer's state, atomically."""
        about = {"fingerprint": self.fingerprint, "layer": str(index), "figures": json.dumps(figures)}
        save_tensors(self.path(index), state, about)

    def finished(self, index: int) -> State | None:
        """One layer's state on the CPU if it is there and whole; a file that cannot be used is set aside, saying so."""
        return load_if_current(
            self.path(index),
            load_tensors,
            lambda metadata: metadata.get("fingerprint") == self.fingerprint,
            "learning the layer again",
            say,
        )

    def state(self, index: int) -> State:
        """One layer's state, on the CPU.

        Raises:
            UserError: it is not there.
        """
        found = self.finished(index)
        if found is None:
            raise UserError(f"layer {index} of {METHODS[self.name]} is not learned", "start the comparison again")
        return found

    @property
    def sites(self) -> Sites:
        """What is quantised at run time."""
        sites = sites_for(self.config, self.files.shape, rotated=False)
        return llm_qat.symmetric(sites) if self.name in WHOLE else sites

    @property
    def weights(self) -> TransformedWeights | llm_qat.TrainedWeights:
        """The model's weights as the method leaves them."""
        kind = llm_qat.TrainedWeights if self.name in WHOLE else TransformedWeights
        return kind(self.files.weights, self.files.shape, self.state, self.device, model_dtype(self.config))

    @property
    def learner(self) -> Learner:
        """Learns one layer."""
        config, m = self.config, self.config.methods
        sites, dtype, seed = self.sites, model_dtype(config), config.quantize.seed
        schedule = Schedule(m.flat_epochs, m.flat_batch_size, m.flat_lr, seed)
        match self.name:
            case "smoothquant":
                return lambda task: smoothquant.learn_layer(task, sites, self.options, m.smooth_alphas)
            case "quik":
                return lambda task: quik.learn_layer(task, m.quik_columns)
            case "dartquant":
                starts = initial("hadamard", self.files.shape, seed)[1]
                fixed = (m.dart_share, m.dart_batch_size, m.dart_epochs, m.dart_lr, seed, dtype)
                return lambda task: dartquant.learn_layer(task, starts[task.index], *fixed)
            case "flatquant":
                return lambda task: flatquant.learn_layer(task, sites, self.options, dtype, schedule)
        affine = self.name == "affinequant"
        return lambda task: omniquant.learn_layer(task, sites, self.options, dtype, schedule, affine)

    @property
    def options(self) -> dict[str, GPTQOptions]:
        """How each linear's weight is rounded; empty where weights stay at 16 bits."""
        if self.config.quant.w_bits == 16 or self.config.quantize.method == "none":
            return {}
        options = gptq_options(self.config)
        down = dataclasses.replace(options, bits=self.config.quant.down_bits or options.bits)
        return {role: down if role == "mlp.down_proj" else options for role in LAYER_LINEARS}

    @property
    def clips(self) -> bool:
        """Whether ranges of weights are learned, or were trained with as they are."""
        return self.name in (*CLIPPING, *WHOLE)

    @property
    def down_bits(self) -> int:
        """Weight bits of down_proj, or 0 for the configuration's."""
        return quik.DOWN_BITS if self.name == "quik" else 0

    def kept(self, index: int) -> dict[str, Tensor]:
        """Input columns of a layer's linears that stay exact, by linear."""
        return quik.kept_columns(self.state(index)) if self.name == "quik" else {}

    def runner(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> LayerRunner:
        """Builds and runs its layers."""
        if self.name in WHOLE:
            return LayerRunner(config, sites, device=device, dtype=dtype, rotated=False)
        down = dataclasses.replace(sites.a, bits=quik.DOWN_BITS) if self.name == "quik" and sites.a.enabled else None
        return TransformedRunner(config, sites, self.state, device=device, dtype=dtype, down=down)

    def to_round(self, index: int) -> dict[str, Tensor]:
        """A layer's parameters inside their learned ranges."""
        weights = self.weights
        if isinstance(weights, TransformedWeights):
            return weights.to_round(index, self.config.quant.w_symmetric)
        return weights.layer(index)
