"""Merge the rotations and quantise the weights, layer by layer; finished layers are never done again.

dist-spin quantize configs/quickstart.yaml
torchrun --nproc_per_node 2 -m dist_spin quantize configs/quickstart.yaml
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_spin.config import RunConfig
from dist_spin.data import calibration_windows, fingerprint
from dist_spin.distributed import World, any_rank, on_leader
from dist_spin.engine.layerwise import LayerQuantizer
from dist_spin.errors import Interrupted, UserError
from dist_spin.layer_files import QuantizedLayer, finished_layer, identity_hash, layer_path, save_layer
from dist_spin.model.layers import LayerRunner, RotatedWeights
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites, initial
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.progress import Progress
from dist_spin.rotation_files import load_rotations
from dist_spin.rundir import tensors_digest
from dist_spin.signals import StopRequest
from dist_spin.stages.common import check_vocabulary, flat, model_dtype, open_configured_model, run_dir, say, sites_for

LEARNED = "learned"


@dataclass
class Variant:
    """One rotation of a model: learned, an unlearned baseline, or "none"."""

    name: str
    rotations: tuple[Tensor, Tensor] | None
    sites: Sites
    weights: RotatedWeights


def variant(config: RunConfig, files: ModelFiles, name: str, device: torch.device) -> Variant:
    """The rotations of a variant, its sites and its merged weights.

    Raises:
        UserError: the learned rotations are not there yet, or belong to another model.
    """
    shape = files.shape
    if name == "none":
        rotations = None
    elif name == LEARNED:
        path = run_dir(config).rotations / "final.safetensors"
        if not path.exists():
            raise UserError(f"{path} does not exist", "run `dist-spin optimize` first")
        rotations = load_rotations(path, shape.hidden, shape.head_dim, shape.layers)
    else:
        rotations = initial(name, shape, config.rotation.seed)
    sites = sites_for(config, shape, rotated=rotations is not None)
    weights = RotatedWeights(files.weights, shape, rotations, sites.r4, device, model_dtype(config))
    return Variant(name, rotations, sites, weights)


def quantize(config: RunConfig, world: World) -> None:
    """Quantise the learned variant and all baselines.

    Raises:
        Interrupted: a signal came; finished layers are kept.
        UserError: the configuration or the run directory is in the way.
    """
    if config.quantize.method == "none" or config.quant.w_bits == 16:
        say("weights stay at 16 bits: nothing to quantise")
        return
    stop = StopRequest()
    files = open_configured_model(config)
    tokens = calibration_tokens(config, files)
    for name in (*config.quantize.baselines, LEARNED):
        quantize_variant(config, world, files, variant(config, files, name, world.device), tokens, stop)


def calibration_tokens(config: RunConfig, files: ModelFiles) -> Tensor:
    """The calibration sequences [n, T] of a configuration."""
    q = config.quantize
    tokenizer = None if q.source.startswith("tokens:") else files.tokenizer()
    tokens = on_leader(lambda: calibration_windows(q.source, q.split, q.n_sequences, q.seq_len, q.seed, tokenizer))
    return check_vocabulary(tokens, files.shape, q.source)


def layer_identity(config: RunConfig, files: ModelFiles, chosen: Variant, tokens: Tensor) -> dict[str, Any]:
    """Everything that decides the content of a variant's layer files."""
    rotations = dict(zip(("R1", "R2"), chosen.rotations or (), strict=False))
    return {
        "model": files.weights.fingerprint(),
        "dtype": config.model.dtype,
        "rotations": tensors_digest(rotations),
        "calibration": fingerprint(tokens),
        "online": flat(config.rotation, "rotation")["rotation.online"],
        "r4_block": config.rotation.r4_block,
        **flat(config.quant, "quant"),
        **{k: v for k, v in flat(config.quantize, "quantize").items() if k != "quantize.baselines"},
    }


def quantize_variant(
    config: RunConfig, world: World, files: ModelFiles, chosen: Variant, tokens: Tensor, stop: StopRequest
) -> None:
    """Quantise every layer of one variant, in order, each from the quantised layers before it."""
    run, q, shape = run_dir(config), config.quantize, files.shape
    directory = run.layers("" if chosen.name == LEARNED else chosen.name)
    made_under = identity_hash(layer_identity(config, files, chosen, tokens))
    found = on_leader(
        lambda: [finished_layer(layer_path(directory, i), made_under, say) is not None for i in range(shape.layers)]
    )
    progress = Progress(f"{q.method} ({chosen.name}): layer", shape.layers, sum(found), show=world.leads)
    if all(found):
        return
    sites = chosen.sites if q.quantize_activations else unquantized(chosen.sites)
    rotated = chosen.rotations is not None
    dtype = model_dtype(config)
    runner = LayerRunner(files.config, sites, device=world.device, dtype=dtype, rotated=rotated)
    options = GPTQOptions(
        config.quant.w_bits,
        config.quant.w_symmetric,
        config.quant.w_group_size,
        config.quant.w_mse_clip,
        q.percdamp,
        q.block_size,
        q.act_order,
    )
    hessian_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    quantizer = LayerQuantizer(runner, world, q.method, options, hessian_dtype)
    mine = tokens[world.rank :: world.size].to(world.device)
    embedding = chosen.weights.embedding()
    hidden = [embedding[ids][None] for ids in mine]  # each [1, T, h]
    del embedding
    # A layer after the last missing one need not be run again.
    for index in range(max(i for i, done in enumerate(found) if not done) + 1):
        path = layer_path(directory, index)
        if found[index]:
            layer = finished_layer(path, made_under, say)
            assert layer is not None
            module = runner.build(index, layer.weights(dtype, world.device))
            hidden = [runner.run(module, index, h) for h in hidden]
            continue
        layer = quantizer.quantize(index, chosen.weights.layer(index), hidden)
        on_leader(functools.partial(save_layer, path, layer, made_under))
        if world.leads:
            run.event("layer", variant=chosen.name, layer=index, **worst(layer))
        progress.advance(f"worst output error {worst(layer)['error']:.4f}")
        if index + 1 < shape.layers and any_rank(bool(stop)):
            raise Interrupted(f"stopped by a signal after layer {index} ({chosen.name})", "the same command continues")


def unquantized(sites: Sites) -> Sites:
    """The same online Hadamards with every activation quantiser off."""
    off = QuantSpec()
    return dataclasses.replace(sites, a=off, o=off, k=off, v=off)


def worst(layer: QuantizedLayer) -> dict[str, float]:
    """The figures of the linear with the largest relative output error."""
    return max(layer.figures.values(), key=lambda figures: figures["error"])
