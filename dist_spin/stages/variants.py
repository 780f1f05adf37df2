"""What is quantised: a model under one rotation or another method, and everything that decides how it comes out."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_spin.data import calibration_windows, fingerprint
from dist_spin.distributed import on_leader
from dist_spin.errors import UserError
from dist_spin.layer_files import ends_path, identity_hash
from dist_spin.model.layers import LayerRunner, RotatedWeights
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites, initial
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.rotation_files import load_rotations
from dist_spin.rundir import tensors_digest
from dist_spin.settings import SELF, RunConfig
from dist_spin.stages.common import (
    ENDS_SETTINGS,
    WEIGHT_SETTINGS,
    check_vocabulary,
    flat,
    learned_transforms,
    model_dtype,
    run_dir,
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


def unquantized(sites: Sites) -> Sites:
    """The same network with every activation quantiser off; R3 goes too, since queries and keys without it cancel it."""
    off = QuantSpec()
    return dataclasses.replace(sites, a=off, o=off, k=off, v=off, mlp=None, down=None, r3=())
