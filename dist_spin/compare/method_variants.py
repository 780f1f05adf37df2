"""Learn what compared methods need, and give them as variants that are quantised and measured like a rotation.

A layer is learned from the full-precision model alone, so that ranks and jobs take different layers and need not meet.
"""

import functools

import torch
from torch import Tensor

from dist_spin.compare.method_states import MethodStates
from dist_spin.compare.methods.registry import METHODS
from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.model.layer_inputs import LayerTask, observe
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.model import model_dtype, wide_dtype
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.variants import Variant, calibration_tokens
from dist_spin.runtime.distributed import World, any_rank, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import Progress
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.rotations import load_rotations


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
        name: of `METHODS`.
        layers: only these, from the first up to but not including the second; a method that trains the whole model
            always learns all.
        stop: of the stage that this is a part of; alone it has its own.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the text cannot be read, a file cannot be written, or the model is too large for the method.
    """
    stop = StopRequest() if stop is None else stop
    whole_model = METHODS[name].trains_whole_model
    tokens = None if whole_model else calibration_tokens(config, files)
    states = MethodStates(config, files, name, world.device, tokens)
    method, every_state = states.method, range(states.method.state_count)
    if whole_model:
        if on_rank0(lambda: states.missing(every_state)):
            method.train_model(world, states.directory, states.save, stop)
        return
    wanted = every_state if layers is None else range(*layers)
    if missing := on_rank0(lambda: states.missing(wanted)):
        _learn_layers(states, world, missing, stop)
    if method.fits_rotations and on_rank0(lambda: not states.rotations_finished() and not states.missing(every_state)):
        _fit_rotations(states, world)


def _learn_layers(states: MethodStates, world: World, missing: list[int], stop: StopRequest) -> None:
    """Learn the layers `missing` (ascending), each on one rank, while hidden states advance through all layers on every rank."""
    config, files, method = states.config, states.files, states.method
    wide = wide_dtype(config)
    runner = LayerRunner(files.config, Sites(), device=world.device, dtype=wide, rotated=False)
    weights = RotatedWeights(files.weights, files.shape, None, (), world.device, model_dtype(config))
    hidden = weights.embedded(states.tokens).to(wide)  # [n, T, h]
    progress = Progress(f"{method.label}: layer", missing[-1] + 1, show=world.is_rank0)

    def advance(start: int, end: int, own: int | None) -> None:
        """Move `hidden` through layers [start, end), and learn layer `own` on the way."""
        nonlocal hidden
        for index in range(start, end):
            task = LayerTask(index, runner, weights.layer(index), hidden)
            note = ""
            if index == own:
                state, figures = method.learn_layer(task)
                states.save(index, state, figures)
                note = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            if index < missing[-1]:
                hidden = observe(task)
            progress.advance(note)

    start = 0
    for first in range(0, len(missing), world.size):  # a layer for each rank, then all ranks meet
        indices = missing[first : first + world.size]
        own = indices[world.rank] if world.rank < len(indices) else None
        end = indices[-1] + 1
        raise_on_any_failure(functools.partial(advance, start, end, own))
        start = end
        if start <= missing[-1] and any_rank(bool(stop)):
            raise Interrupted(
                f"stopped by a signal after layer {start - 1} ({states.name})", "the same command continues"
            )


def _fit_rotations(states: MethodStates, world: World) -> None:
    """Make rotations of the states of all layers, which are removed then. Every rank computes the same; rank 0 writes."""
    r1, r2, figures = states.method.fit_rotations(states.state, show_progress=world.is_rank0)
    raise_on_any_failure(lambda: None)  # from here on no rank reads the file of a layer
    on_rank0(lambda: states.save_rotations(r1, r2, figures))


def method_variant(
    config: RunConfig, files: ModelFiles, name: str, device: torch.device, tokens: Tensor | None
) -> Variant:
    """The variant of a method of `METHODS`; the states of its layers are read when they are needed.

    tokens: `calibration_tokens` of the configuration; not read for a method that trains on text of its own.

    Raises:
        UserError: the method makes rotations, and they are not learned yet.
    """
    states = MethodStates(config, files, name, device, tokens)
    method, shape = states.method, files.shape
    if method.fits_rotations:
        if not states.rotations.exists():
            raise UserError(f"the rotations of {method.label} are not learned", "start the comparison again")
        rotations = load_rotations(states.rotations, shape.hidden, shape.head_dim, shape.layers)
        sites = sites_for(config, shape)
        return Variant(
            name,
            rotations,
            sites,
            RotatedWeights(files.weights, shape, rotations, sites.r4, device, model_dtype(config)),
        )
    # The digest of a trained model covers its embedding and head, too; of other methods these are the original ones.
    digest = states.fingerprint if method.trains_whole_model else ""
    return Variant(name, None, method.sites, states.weights, method=states, digest=digest)
