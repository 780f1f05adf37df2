"""The quantiser sites of a configuration: what is quantised at run time, with which bits, groups, clips and online Hadamards.

Learning may see other bits than the finished model (`while_learning`); learned clip ratios hold for the bits of their learning.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape, layer_name
from dist_spin.model.sites_config import CLIP_SITES, Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.formats import FORMATS
from dist_spin.numerics.hadamard import NoHadamard, largest_block
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.runtime.progress import say
from dist_spin.storage.rotations import clip_bits, load_transforms

LARGE_BIAS = 10.0  # what keys are without it is of the order of 1 to 10


def hadamard_factors(size: int, block: int, setting: str) -> tuple[Tensor, ...]:
    """fp64 Kronecker factors of the online Hadamard of `size`, or of blocks of it.

    Raises:
        UserError: nobody knows a Hadamard matrix of this order; names the largest block that works.
    """
    try:
        if block and size % block:
            raise UserError(
                f"{setting}={block} does not divide {size}", f"use {largest_block(size)}, or 0 for all of it"
            )
        return kronecker_factors(size, block, dtype=torch.float64, device="cpu")
    except NoHadamard as error:
        raise UserError(str(error), f"set {setting}={largest_block(size)} for a block-Hadamard") from error


def sites_for(config: RunConfig, shape: Shape, *, rotated: bool = True, heads: bool = False) -> Sites:
    """The sites of a configuration; an unrotated baseline has no online Hadamards.

    heads: QuaRot's Hadamard across the heads that o_proj reads, over the largest block of heads that has one.

    Raises:
        UserError: a group size does not fit the model, or an order has no Hadamard.
    """
    q, d = config.quant, shape.head_dim
    for which in ("k", "v"):
        group = getattr(q, f"{which}_group_size")
        if group and d % group:
            raise UserError(
                f"quant.{which}_group_size={group} does not divide this model's head size {d}", f"use {d}, or 0 for it"
            )
    check_format_groups(config, shape)
    inputs = {shape.hidden, shape.heads * d, shape.intermediate}  # a shared expert's is a multiple of the last
    inputs |= {shape.dense_width} if shape.dense else set()
    for which in ("w", "a"):
        group = getattr(q, f"{which}_group_size")
        if group and any(size % group for size in inputs):
            common = math.gcd(*inputs)
            raise UserError(
                f"quant.{which}_group_size={group} does not divide this model's input sizes "
                f"{', '.join(map(str, sorted(inputs)))}",
                f"use {common & -common}, or 0 for whole rows",  # the largest power of two that does
            )

    def spec(which: str, default_group: int) -> QuantSpec:
        values, name = vars(q), q.a_format if which == "a" else q.kv_format
        if name != "int":
            own_dtype = q.arithmetic == "compressed-tensors"
            bits, group = values[f"{which}_bits"], FORMATS[name].group or default_group
            return QuantSpec(bits, symmetric=True, group_size=group, half_steps=own_dtype, format=name)
        group = values.get(f"{which}_group_size") or default_group
        return QuantSpec(values[f"{which}_bits"], values[f"{which}_symmetric"], group, values[f"{which}_clip_ratio"])

    half_steps = q.arithmetic == "compressed-tensors" and q.a_symmetric
    a = spec("a", 0)
    if a.format == "int":
        a = dataclasses.replace(a, half_steps=half_steps)
    online = config.rotation.online and rotated
    block = largest_block(shape.heads)
    return Sites(
        a=a,
        o=dataclasses.replace(a, group_size=d) if q.o_per_head else a,
        k=spec("k", d),
        k_bias_apart=q.k_bias_apart and q.k_bits < 16,
        v=spec("v", d),
        r3=hadamard_factors(d, 0, "rotation.online") if online and q.k_bits < 16 else (),
        r4=_r4(config, shape) if online else (),
        heads=hadamard_factors(shape.heads, block, "rotation.online") if online and heads and block > 1 else (),
    )


def _r4(config: RunConfig, shape: Shape) -> tuple[Tensor, ...]:
    rotation, size = config.rotation, shape.intermediate
    if not rotation.r4_block and rotation.block and size % rotation.block:
        problem = f"rotation.block={rotation.block} does not divide this model's intermediate size {size}"
        raise UserError(problem, f"give R4 a block of its own, rotation.r4_block={largest_block(size)} for example")
    block = rotation.r4_size or size
    if shape.dense and shape.dense_width % block:
        common = math.gcd(size, shape.dense_width)
        raise UserError(
            f"R4 of {block} channels, as experts are wide, does not divide the {shape.dense_width} of the layers without them",
            f"set rotation.r4_block={common & -common}, or rotation.online=false",
        )
    return hadamard_factors(size, rotation.r4_size, "rotation.r4_block")


def check_format_groups(config: RunConfig, shape: Shape) -> None:
    """Refuse formats whose groups do not divide what they are for.

    Raises:
        UserError: names the setting and the sizes.
    """
    q = config.quant
    inputs = [shape.hidden, shape.heads * shape.head_dim, shape.intermediate]
    for which, name, sizes in (
        ("w", q.w_format, inputs),
        ("a", q.a_format, inputs),
        ("kv", q.kv_format, [shape.head_dim]),
    ):
        group = FORMATS[name].group if name != "int" else 0
        if group and any(size % group for size in sizes):
            text = f"quant.{which}_format={name} has groups of {group}, which do not divide this model's sizes "
            raise UserError(text + ", ".join(map(str, sorted(set(sizes)))), "use fp8 or int")


def while_learning(config: RunConfig) -> RunConfig:
    """The configuration whose sites learning sees: activations, keys and values at `optimize.a_bits`, if that is set.

    Keys and values in a number format have its bits.
    """
    q, bits = config.quant, config.optimize.a_bits
    if not bits:
        return config
    kv = bits if q.kv_format == "int" else FORMATS[q.kv_format].bits
    return dataclasses.replace(config, quant=dataclasses.replace(q, a_bits=bits, k_bits=kv, v_bits=kv))


def check_learning_formats(config: RunConfig) -> None:
    """Refuse to learn at bits, or to learn clips, that the number formats have no place for.

    Raises:
        UserError: names both settings.
    """
    q, o = config.quant, config.optimize
    for setting, bits, which, kind in (
        ("optimize.w_bits", o.w_bits, "w", q.w_format),
        ("optimize.a_bits", o.a_bits, "a", q.a_format),
    ):
        if kind != "int" and bits not in (0, 16, FORMATS[kind].bits):
            raise UserError(f"{setting}={bits}, but quant.{which}_format={kind}", f"use {FORMATS[kind].bits}")
    if o.clips and (q.a_format, q.kv_format) != ("int", "int"):
        named = f"quant.a_format={q.a_format}" if q.a_format != "int" else f"quant.kv_format={q.kv_format}"
        raise UserError(
            f"optimize.clips=true learns to clip, which {named} has no place for", "use optimize.clips=false"
        )


def tell_key_bias(config: RunConfig, files: ModelFiles) -> None:
    """Say where keys are quantised together with a bias that is large enough to cost them their bits."""
    if config.quant.k_bits == 16 or config.quant.k_bias_apart:
        return
    names = (f"{layer_name(index)}.self_attn.k_proj.bias" for index in range(files.shape.layers))
    largest = max((float(files.weights.rows(n).abs().max()) for n in names if files.weights.has(n)), default=0.0)
    if largest > LARGE_BIAS:
        say(
            f"k_proj has biases of up to {largest:.0f}, which keys in few bits do not bear: set quant.k_bias_apart=true"
        )


def site_bits(config: RunConfig) -> dict[str, int]:
    """Bits of activations ("a"), keys ("k") and values ("v")."""
    return {"a": config.quant.a_bits, "k": config.quant.k_bits, "v": config.quant.v_bits}


def clips_at(config: RunConfig, learned_at: dict[str, int], clips: Tensor) -> Tensor:
    """Learned clip ratios [layers, CLIPS] for the sites of `config`: 1 wherever its bits are not those they were learned at.

    Clipping the range helps at 4 bits and costs accuracy at more; number formats other than int clip nothing. learned_at:
    `site_bits` of the learning.
    """
    formats = {"a": config.quant.a_format, "k": config.quant.kv_format, "v": config.quant.kv_format}
    bits = {site: width if formats[site] == "int" else 0 for site, width in site_bits(config).items()}
    same_bits = [bits[kind] == learned_at[kind] for kind in (site if site in bits else "a" for site in CLIP_SITES)]
    return torch.where(torch.tensor(same_bits, device=clips.device), clips, 1.0)


def learned_transforms(path: Path, config: RunConfig) -> dict[str, Tensor]:
    """What `load_transforms` reads, its clips for the bits of `config`. The clips of a file that does not say its bits are
    taken as they are, but by number formats that clip nothing.
    """
    transforms = load_transforms(path)
    if "clip" in transforms:
        transforms["clip"] = clips_at(config, clip_bits(path) or site_bits(config), transforms["clip"])
    return transforms
