"""The model of an evaluation target: one decoder layer in memory at a time, or all of it where it has to write text.

Both read quantised layers from the run's files, or merge the rotations into the 16-bit weights, and give the same bits.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.evaluate.targets import EvalTarget, target_layer
from dist_spin.model.architecture import norm_eps
from dist_spin.model.full_model import build_full_model
from dist_spin.model.rotated_weights import Head
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.embeddings import embeddings_of
from dist_spin.pipeline.model import model_dtype
from dist_spin.runtime.distributed import World
from dist_spin.runtime.prefetch import prefetched
from dist_spin.runtime.progress import Progress, say
from dist_spin.storage.quantized_layers import finished_layer
from dist_spin.storage.run_directory import RunDir


def load_full_model(config: RunConfig, world: World, files: ModelFiles, run: RunDir, target: EvalTarget) -> Any:
    """The model of `target` (one of `evaluate.targets`, with `fingerprint` set where its weights are quantised).

    On the rank's device, all of it, in the run's dtype: the same bits that `evaluate` measures layer by layer.

    Raises:
        UserError: a quantised layer, embedding or lm_head is not there.
    """
    dtype, weights = model_dtype(config), target.variant.weights
    embeddings = (
        embeddings_of(config, files, target.variant).load(dtype, world.device, say) if target.weights != "none" else {}
    )
    layers = prefetched(
        lambda index: quantized_weights(run, target, index, dtype, world) or weights.layer(index),
        range(files.shape.layers),
        world.device,
    )
    return build_full_model(
        files.config,
        target.variant.sites,
        layer=lambda index: next(layers),
        embedding=embeddings["embedding"] if "embedding" in embeddings else weights.embedding(),
        head=embeddings["head"] if "head" in embeddings else weights.head_weight(),
        final_gain=weights.final_gain(),
        rotated=target.variant.rotations is not None,
        device=world.device,
        dtype=dtype,
    )


class LayerwiseModel:
    """The model of an evaluation target, one layer at a time: embed, then every layer in order, then the head."""

    def __init__(self, config: RunConfig, world: World, files: ModelFiles, run: RunDir, target: EvalTarget) -> None:
        self._world, self._files, self._run, self._target = world, files, run, target
        self._dtype, self._weights = model_dtype(config), target.variant.weights
        self._runner = target.variant.runner(files.config, target.variant.sites, world.device, self._dtype)
        quantised = target.weights != "none"
        self._embeddings = (
            embeddings_of(config, files, target.variant).load(self._dtype, world.device, say) if quantised else {}
        )

    def embed(self, batches: Iterable[Tensor], device: torch.device | None = None) -> list[Tensor]:
        """Hidden states [batch, T, h] of token ids, each [batch, T], kept on `device` (default: the rank's)."""
        embedding = self._embeddings.pop("embedding") if "embedding" in self._embeddings else self._weights.embedding()
        return [self._weights.embedded(ids, embedding).to(device or embedding.device) for ids in batches]

    def layers(self, what: str) -> Iterator[Callable[[Tensor], Tensor]]:
        """Each decoder layer in order, as a function of hidden states [batch, T, h] on the rank's device."""
        for (layer,) in self.layers_at(what, [self._target.variant.sites]):
            yield layer

    def layers_at(self, what: str, sites: Sequence[Sites]) -> Iterator[list[Callable[[Tensor], Tensor]]]:
        """Each decoder layer in order, once for each of `sites`, with the same weights; the next one is read meanwhile."""
        placed = [each.to(self._world.device, self._dtype) for each in sites]
        count = self._files.shape.layers
        progress = Progress(f"{what}: layer", count, show=self._world.is_rank0)

        def build(index: int) -> list[nn.Module]:
            quantised = quantized_weights(self._run, self._target, index, self._dtype, self._world)
            weights = quantised or self._weights.layer(index)
            return [self._runner.build(index, weights, each) for each in placed]

        for index, modules in enumerate(prefetched(build, range(count), self._world.device)):
            yield [functools.partial(self._runner.run, module, index) for module in modules]
            del modules  # the caller is done with them: their memory is free for the next but one
            progress.advance()

    def head(self) -> Head:
        """Final norm and lm_head."""
        return self._weights.head(norm_eps(self._files.config), self._embeddings.get("head"))


def quantized_weights(
    run: RunDir, target: EvalTarget, index: int, dtype: torch.dtype, world: World
) -> dict[str, Tensor] | None:
    """Dequantised parameters of a layer from its file; None where the target keeps 16-bit weights."""
    if target.weights == "none":
        return None
    path = target_layer(run, target, index)
    layer = finished_layer(path, target.fingerprint, say, world.device)
    if layer is None:
        raise UserError(f"layer {index} of '{target.variant.name}' is not quantised", "run `dist-spin quantize` first")
    return layer.weights(dtype, world.device)
