"""Variants: the model under one rotation, learned or not, or as another method leaves it, ready to be quantised and measured.

`build_variant` reads the rotations, makes the quantiser sites, and merges the rotations into the weights as layers are asked for.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_spin.config.checks import SELF
from dist_spin.config.run import RunConfig
from dist_spin.data import calibration_windows
from dist_spin.errors import UserError
from dist_spin.model.context import check_context
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import WHOLE, Blocks
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.block_rotation import left_out
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.initial_rotations import seeded_rotations
from dist_spin.pipeline.model import check_vocabulary, model_dtype
from dist_spin.pipeline.preset_rotations import save_preset_rotations
from dist_spin.pipeline.quant_sites import learned_transforms, sites_for
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.runtime.distributed import on_rank0
from dist_spin.storage.rotations import load_rotations
from dist_spin.storage.run_directory import LEARNED, run_dir
from dist_spin.storage.tensor_file import tensors_digest


class VariantMethod(Protocol):
    """What a compared method (`dist_spin.compare.method_states`) makes of the layers of an unrotated model."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what it makes of them."""

    def runner(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> LayerRunner:
        """Builds and runs the layers."""

    def weights_to_quantize(self, index: int) -> dict[str, Tensor]:
        """The parameters of a layer, clamped to the ranges that the method has learned for their codes."""

    @property
    def sets_weight_ranges(self) -> bool:
        """Whether the method decides the range of each row of weights, so that no clip is searched for it."""

    @property
    def down_bits(self) -> int:
        """Weight bits of down_proj, or 0 for the configuration's."""

    def exact_columns(self, index: int) -> dict[str, Tensor]:
        """Input columns [n] of a layer's linears that stay at 16 bits, by linear."""


@dataclass
class Variant:
    """One rotation of a model: learned, an unlearned baseline, or "none"; or a compared method.

    digest: of everything that was learned; made from rotations and transforms unless it is set. transforms: learned scales and
    clips (`storage.rotations.load_transforms`), which `sites` and `weights` contain. blocks: of its R1 and R2.
    """

    name: str
    rotations: tuple[Tensor, Tensor] | None
    sites: Sites
    weights: RotatedWeights
    transforms: dict[str, Tensor] = field(default_factory=dict)
    method: VariantMethod | None = None
    digest: str = ""
    blocks: Blocks = WHOLE

    def __post_init__(self) -> None:
        if not self.digest:
            rotations = dict(zip(("R1", "R2"), self.rotations or (), strict=False))
            self.digest = tensors_digest({**rotations, **self.transforms})

    def runner(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> LayerRunner:
        """Builds and runs its layers with `sites`, of a model's `config`."""
        if self.method is not None:
            return self.method.runner(config, sites, device, dtype)
        return LayerRunner(config, sites, device=device, dtype=dtype, rotated=self.rotations is not None)

    def weights_to_quantize(self, index: int) -> dict[str, Tensor]:
        """Parameters of decoder layer `index` as the weight quantiser takes them."""
        return self.weights.layer(index) if self.method is None else self.method.weights_to_quantize(index)


def build_variant(config: RunConfig, files: ModelFiles, name: str, device: torch.device) -> Variant:
    """The rotations of a variant, its sites and its merged weights.

    name: "none", LEARNED, or a kind of `model.rotation.initial`; "quarot" also has QuaRot's Hadamard across heads.

    Raises:
        UserError: the learned rotations are not there yet, belong to another model, or have an R1 where none is asked for.
    """
    shape = files.shape
    transforms: dict[str, Tensor] = {}
    if name == "none":
        rotations = None
    elif name == LEARNED:
        if config.optimize.steps == 0:
            save_preset_rotations(config, shape)
        path = run_dir(config).rotations / "final.safetensors"
        if not path.exists():
            raise UserError(f"{path} does not exist", "run `dist-spin optimize` first")
        rotations = load_rotations(path, shape.hidden, shape.head_dim, shape.layers)
        if left_out(rotations[0]) == config.rotation.r1:
            holds = "leaves R1 out" if config.rotation.r1 else "holds an R1"
            problem = f"{path} {holds}, but rotation.r1={str(config.rotation.r1).lower()}"
            raise UserError(problem, "set it back, or give a new name=")
        transforms = learned_transforms(path, config)
    else:
        rotations = seeded_rotations(name, config, shape)
    sites = sites_for(config, shape, rotated=rotations is not None, heads=name == "quarot")
    sites = dataclasses.replace(sites, clips=transforms.get("clip"))
    scales = {key.removeprefix("scale."): t for key, t in transforms.items() if key.startswith("scale.")}
    weights = RotatedWeights(
        files.weights, shape, rotations, sites.r4, device, model_dtype(config), sites.heads, scales
    )
    blocks = WHOLE
    if rotations is not None and (block := rotations[0].shape[-1]) < shape.hidden:  # as its file has them
        of_r2 = rotations[1].shape[-1]
        blocks = Blocks(block, of_r2 if of_r2 < shape.head_dim else 0, config.rotation.block_shared)
    return Variant(name, rotations, sites, weights, transforms, blocks=blocks)


def calibration_tokens(config: RunConfig, files: ModelFiles) -> Tensor:
    """The calibration sequences [n, T] of a configuration.

    Raises:
        UserError: they cannot be read, or do not fit the model's context or vocabulary.
    """
    q = config.quantize
    check_context("quantize.seq_len", q.seq_len, files.config)
    if q.source == SELF:
        return on_rank0(lambda: self_text(config, files, q.n_sequences, q.seq_len, q.seed))
    tokenizer = None if q.source.startswith("tokens:") else files.tokenizer()
    source = config.source(q.source)
    tokens = on_rank0(lambda: calibration_windows(source, q.split, q.n_sequences, q.seq_len, q.seed, tokenizer))
    return check_vocabulary(tokens, files.shape, q.source)


def unquantized(sites: Sites) -> Sites:
    """The same network with every activation quantiser off; R3 goes too, since queries and keys without it cancel it."""
    off = QuantSpec()
    return dataclasses.replace(sites, a=off, o=off, k=off, v=off, mlp=None, down=None, r3=())
