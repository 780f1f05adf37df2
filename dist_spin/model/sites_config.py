"""What is quantised at run time, and where: the sites of a model, as plain values."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, LAYER_LINEARS, MLP_NORM, Shape
from dist_spin.model.output_norms import OUTPUT_NORMS
from dist_spin.model.rotate_quantize import NO_SCALE_OR_CLIP, RotationParam, ScaleAndClip
from dist_spin.model.sites import (
    DownProjInputQuant,
    KeyBiasApart,
    KeySite,
    NormSite,
    OProjInputQuant,
    QuantizedInputLinear,
    ValueSite,
    WideRMSNorm,
)
from dist_spin.model.stacked_experts import StackedExperts
from dist_spin.numerics.quantizer import QuantSpec

CLIP_SITES = ("attention", "o", "mlp", "down", "k", "v")  # where clips are learned, in the order in which they are kept
LINEARS_BY_SITE = (LAYER_LINEARS[:3], LAYER_LINEARS[3:4], LAYER_LINEARS[4:6], LAYER_LINEARS[6:])
INPUT_SCALES = (
    "input.tensor_scales"  # name, among a layer's tensors, of NVFP4's global scales [4] of the inputs of linears
)
SCALED_SITES = CLIP_SITES[:4]  # whose they are, in this order
SITE_OF_LINEAR = {role: i for i, roles in enumerate(LINEARS_BY_SITE) for role in roles}  # index among them


@dataclass(frozen=True)
class Sites:
    """What happens at each quantised site: quantisers, and the online Hadamards as Kronecker factors (empty: none).

    k_bias_apart: keys are quantised without the bias of k_proj.
    mlp, down: quantisers of these inputs where they are not those of `a`. clips: learned clip ratios [layers, sites] of
    merged layers, fp64 on the CPU, which `layer` puts into the quantisers.
    """

    a: QuantSpec = QuantSpec()
    o: QuantSpec = QuantSpec()
    k: QuantSpec = QuantSpec()
    v: QuantSpec = QuantSpec()
    r3: tuple[Tensor, ...] = ()
    r4: tuple[Tensor, ...] = ()
    heads: tuple[Tensor, ...] = ()
    mlp: QuantSpec | None = None
    down: QuantSpec | None = None
    clips: Tensor | None = None
    k_bias_apart: bool = False

    @property
    def bits(self) -> dict[str, int]:
        """Bits of the quantiser at each of CLIP_SITES."""
        specs = (self.a, self.o, self.mlp or self.a, self.down or self.a, self.k, self.v)
        return {site: spec.bits for site, spec in zip(CLIP_SITES, specs, strict=True)}

    def to(self, device: torch.device, dtype: torch.dtype) -> "Sites":
        """The same with the Hadamard factors on `device` in `dtype`."""
        moved = [tuple(f.to(device, dtype) for f in factors) for factors in (self.r3, self.r4, self.heads)]
        return dataclasses.replace(self, r3=moved[0], r4=moved[1], heads=moved[2])

    def layer(self, index: int) -> "Sites":
        """The sites of one merged layer, its learned clips on top of the configured ones."""
        if self.clips is None:
            return self
        ratios = dict(zip(CLIP_SITES, self.clips[index].tolist(), strict=True))

        def clip(spec: QuantSpec, site: str) -> QuantSpec:
            return dataclasses.replace(spec, clip_ratio=spec.clip_ratio * ratios[site])

        return dataclasses.replace(
            self,
            a=clip(self.a, "attention"),
            o=clip(self.o, "o"),
            mlp=clip(self.mlp or self.a, "mlp"),
            down=clip(self.down or self.a, "down"),
            k=clip(self.k, "k"),
            v=clip(self.v, "v"),
            clips=None,
        )

    def with_tensor_scales(self, scales: Tensor | None) -> "Sites":
        """The sites of one layer, with NVFP4's global scales [4] of SCALED_SITES; other formats, or None, change nothing."""
        if scales is None or self.a.format != "nvfp4":
            return self
        specs = (self.a, self.o, self.mlp or self.a, self.down or self.a)
        scaled = [dataclasses.replace(s, tensor_scale=scale) for s, scale in zip(specs, scales.tolist(), strict=True)]
        return dataclasses.replace(self, a=scaled[0], o=scaled[1], mlp=scaled[2], down=scaled[3])


def attach(
    layer: nn.Module,
    shape: Shape,
    sites: Sites,
    r1: RotationParam | None = None,
    r2: RotationParam | None = None,
    learned: dict[str, ScaleAndClip] | None = None,
    *,
    unfold: bool = False,
) -> None:
    """Put the sites into one decoder layer, in place.

    With `r1`, `r2`: for learning, on folded but unrotated weights; with `r2` alone where R1 is left out, on weights that are
    not folded either. Without: on merged (or never rotated) weights.
    `sites` must lie on the layer's device in its dtype (`Sites.to`) and be this layer's (`Sites.layer`).

    Args:
        learned: what is learned at the sites named in CLIP_SITES. unfold: R4 is not folded into down_proj.
    """
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    learned_at = dict.fromkeys(CLIP_SITES, NO_SCALE_OR_CLIP) if learned is None else learned
    d, mlp_spec, down_spec = shape.head_dim, sites.mlp or sites.a, sites.down or sites.a
    norm_spec = QuantSpec() if shape.experts else mlp_spec  # a router reads the norm too, unquantised
    shared = getattr(layer, MLP_NORM) is getattr(layer, ATTENTION_NORM)  # then both read one site
    for name, spec, site in ((ATTENTION_NORM, sites.a, "attention"), (MLP_NORM, norm_spec, "mlp")):
        setattr(layer, name, NormSite(getattr(layer, name), spec, r1, learned_at[site]))
    if shared:
        setattr(layer, MLP_NORM, getattr(layer, ATTENTION_NORM))
    attention.v_proj = ValueSite(attention.v_proj, sites.v, d, r2, learned_at["v"])
    input_quant = OProjInputQuant(sites.o, d, r2, sites.heads, learned_at["o"])
    attention.o_proj = QuantizedInputLinear(input_quant, attention.o_proj, keep=r2 is not None)
    if shape.experts:
        mlp.input_site = NormSite(nn.Identity(), mlp_spec, r1, learned_at["mlp"])
    down_site = partial(DownProjInputQuant, down_spec, sites.r4, learned_at["down"], unfold=unfold)
    stacked = bool(shape.experts) and isinstance(mlp.experts, StackedExperts)
    if stacked:
        mlp.experts.down_site = down_site()
    for gated in () if stacked else mlp.experts if shape.experts else (mlp,):
        gated.down_proj = QuantizedInputLinear(down_site(), gated.down_proj)
    if shape.shared:
        part = slice(shape.experts, None)
        mlp.shared_expert.down_proj = QuantizedInputLinear(down_site(part=part), mlp.shared_expert.down_proj)
    bias_apart = keeps_bias_apart(attention, sites)
    if bias_apart:
        attention.k_proj = KeyBiasApart(attention.k_proj)
    attention.key_site = KeySite(sites.k, sites.r3, learned_at["k"], bias_apart=bias_apart)


def keeps_bias_apart(attention: Any, sites: Sites) -> bool:
    """Whether keys are quantised without the bias of k_proj, which then hands it on behind the keys (`sites.KeyBiasApart`)."""
    if not (sites.k_bias_apart and sites.k.enabled) or attention.k_proj.bias is None:
        return False
    return not hasattr(attention, "k_norm")  # behind a norm it is no sum any more


def widen_norms(layer: nn.Module, *, folded: bool, kind: str = "rms") -> None:
    """Replace a layer's norms by ours, in place; where gains were folded, the two in front of linears lose theirs.

    Unless the merged layer was given new ones, which are learned scales: then they are not on the meta device any more.
    kind: of the norms (`families.Family.norm`).
    """
    wide: dict[Any, nn.Module] = {}  # one for both places where they share a norm
    for owner, name in (
        (layer, ATTENTION_NORM),
        (layer, MLP_NORM),
        *((layer, name) for name in OUTPUT_NORMS),
        (layer.self_attn, "q_norm"),
        (layer.self_attn, "k_norm"),
    ):
        norm: Any = getattr(owner, name, None)
        if norm is None or isinstance(norm, nn.Identity):
            continue
        if norm not in wide:
            gainless = folded and name in (ATTENTION_NORM, MLP_NORM) and norm.weight.is_meta
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            wide[norm] = WideRMSNorm(eps, None if gainless else norm.weight, kind)
        setattr(owner, name, wide[norm])
