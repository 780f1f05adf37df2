"""The rotations of a model: made, attached to its sites for learning, and merged into its weights.

Row-vector convention, weights [out, in], d = head size, h = hidden size (Liu et al. 2024, SpinQuant):
R1 [h, h] turns the residual stream, R2 [d, d] of each layer its values, R3 and R4 are fixed Hadamards on q, k and on the
input of down_proj; QuaRot (Ashkboos et al. 2024) adds one across the heads that o_proj reads. All weight arithmetic here
is fp64.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_spin.model.architecture import ATTENTION_NORM, FINAL_NORM, HEAD, MLP_NORM, Shape, layer_name
from dist_spin.model.loading import WeightSource
from dist_spin.model.sites import (
    NOTHING,
    Basis,
    DownFront,
    FrontedLinear,
    KeySite,
    Learned,
    NormSite,
    OutputFront,
    ValueSite,
    WideRMSNorm,
    across_heads,
)
from dist_spin.numerics.hadamard import (
    hadamard_transform,
    kronecker_apply,
    largest_block,
    random_hadamard,
    random_orthogonal,
)
from dist_spin.numerics.quantizer import QuantSpec

# The norm whose gain folds into each linear.
NORM_BEFORE = {
    "self_attn.q_proj": ATTENTION_NORM,
    "self_attn.k_proj": ATTENTION_NORM,
    "self_attn.v_proj": ATTENTION_NORM,
    "mlp.gate_proj": MLP_NORM,
    "mlp.up_proj": MLP_NORM,
}
CLIPS = ("attention", "o", "mlp", "down", "k", "v")  # where clips are learned, in the order in which they are kept
VOCAB_ROWS_AT_ONCE = 8192
ROWS_AT_ONCE = 512  # rows widened to fp64 at a time, which bounds the memory of folding


@dataclass(frozen=True)
class Sites:
    """What happens at each quantised site: quantisers, and the online Hadamards as Kronecker factors (empty: none).

    mlp, down: quantisers of these inputs where they are not those of `a`. clips: learned clip ratios [layers, CLIPS] of
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

    @property
    def bits(self) -> dict[str, int]:
        """Bits of the quantiser at each of CLIPS."""
        specs = (self.a, self.o, self.mlp or self.a, self.down or self.a, self.k, self.v)
        return {site: spec.bits for site, spec in zip(CLIPS, specs, strict=True)}

    def to(self, device: torch.device, dtype: torch.dtype) -> "Sites":
        """The same with the Hadamard factors on `device` in `dtype`."""
        moved = [tuple(f.to(device, dtype) for f in factors) for factors in (self.r3, self.r4, self.heads)]
        return dataclasses.replace(self, r3=moved[0], r4=moved[1], heads=moved[2])

    def layer(self, index: int) -> "Sites":
        """The sites of one merged layer, its learned clips on top of the configured ones."""
        if self.clips is None:
            return self
        kept = dict(zip(CLIPS, self.clips[index].tolist(), strict=True))

        def clip(spec: QuantSpec, site: str) -> QuantSpec:
            return dataclasses.replace(spec, clip_ratio=spec.clip_ratio * kept[site])

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


def initial(kind: str, shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded starting rotations R1 [h, h] and R2 [layers, d, d], fp64 on the CPU, drawn R1 first, then layer by layer.

    Args:
        kind: "hadamard" (random signs times a Hadamard), "orthogonal" (Haar), "identity", or "quarot": R1 as "hadamard"
            has it and R2 the Hadamard itself, the same in every layer (Ashkboos et al. 2024).
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "quarot":
        r1, d = random_hadamard(shape.hidden, generator), shape.head_dim
        r2 = hadamard_transform(torch.eye(d, dtype=torch.float64), largest_block(d))
        return r1, r2.expand(shape.layers, d, d).clone()
    make: dict[str, Callable[[int], Tensor]] = {
        "hadamard": lambda n: random_hadamard(n, generator),
        "orthogonal": lambda n: random_orthogonal(n, generator),
        "identity": lambda n: torch.eye(n, dtype=torch.float64),
    }
    r1 = make[kind](shape.hidden)
    return r1, torch.stack([make[kind](shape.head_dim) for _ in range(shape.layers)])


class Rotations:
    """The master copies of R1 and R2 on one device, what the sites see of them, and one packed gradient buffer.

    r1 [h, h], r2 [layers, d, d]: fp32 masters (fp64 when compute is fp64). bases: what the sites hold.
    gradient: packed [h*h + layers*d*d] in the masters' dtype; backward accumulates straight into it: the gradients of the
        tilts (see `Basis`), or with `euclidean` those of R1 and R2 as plain matrices until `to_tilt` is called.
    """

    def __init__(
        self,
        r1: Tensor,
        r2: Tensor,
        device: torch.device,
        compute: torch.dtype,
        learn: bool = False,
        euclidean: bool = False,
    ) -> None:
        self.euclidean = euclidean
        master = torch.float64 if compute == torch.float64 else torch.float32
        self.r1, self.r2 = (r.to(device, master, copy=True) for r in (r1, r2))
        self._seen1, self._seen2 = self.r1.to(compute, copy=True), self.r2.to(compute, copy=True)
        tilts: list[Tensor | None] = [None] * (1 + len(r2))
        self.gradient = torch.zeros(0, dtype=master, device=device)
        if learn:
            self.gradient = torch.zeros(self.r1.numel() + self.r2.numel(), dtype=master, device=device)
            grads = [self.tilt1, *self.tilt2]
            for i, grad in enumerate(grads):
                leaf = torch.zeros_like(grad).requires_grad_()
                leaf.grad = grad  # a view: packed as it accumulates
                tilts[i] = leaf
        self.basis1 = Basis(self._seen1, tilts[0])
        self.basis2 = [Basis(seen, tilt) for seen, tilt in zip(self._seen2, tilts[1:], strict=True)]

    @property
    def tilt1(self) -> Tensor:
        """R1's part of the gradient buffer, as [h, h]."""
        return self.gradient[: self.r1.numel()].view_as(self.r1)

    @property
    def tilt2(self) -> Tensor:
        """R2's part of the gradient buffer, as [layers, d, d]."""
        return self.gradient[self.r1.numel() :].view_as(self.r2)

    def to_tilt(self) -> None:
        """Turn gradients of R into those of the tilt, in place: R(Omega) = (I + Omega) R, so dOmega = dR R^T."""
        if self.euclidean:
            self.tilt1.copy_(self.tilt1 @ self.r1.T)
            self.tilt2.copy_(self.tilt2 @ self.r2.mT)

    def refresh(self) -> None:
        """Show the sites the masters as they are now."""
        self._seen1.copy_(self.r1)
        self._seen2.copy_(self.r2)


def attach(
    layer: nn.Module,
    shape: Shape,
    sites: Sites,
    r1: Basis | None = None,
    r2: Basis | None = None,
    learned: dict[str, Learned] | None = None,
    unfold: bool = False,
) -> None:
    """Put the sites into one decoder layer, in place.

    With `r1`, `r2`: for learning, on folded but unrotated weights. Without: on merged (or never rotated) weights.
    `sites` must lie on the layer's device in its dtype (`Sites.to`) and be this layer's (`Sites.layer`).

    Args:
        learned: what is learned at the sites named in CLIPS. unfold: R4 is not folded into down_proj.
    """
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    at = dict.fromkeys(CLIPS, NOTHING) if learned is None else learned
    d, mlp_spec, down_spec = shape.head_dim, sites.mlp or sites.a, sites.down or sites.a
    for name, spec, site in ((ATTENTION_NORM, sites.a, "attention"), (MLP_NORM, mlp_spec, "mlp")):
        setattr(layer, name, NormSite(getattr(layer, name), spec, r1, at[site]))
    attention.v_proj = ValueSite(attention.v_proj, sites.v, d, r2, at["v"])
    front = OutputFront(sites.o, d, r2, sites.heads, at["o"])
    attention.o_proj = FrontedLinear(front, attention.o_proj, keep=r2 is not None)
    mlp.down_proj = FrontedLinear(DownFront(down_spec, sites.r4, at["down"], unfold), mlp.down_proj)
    attention.key_site = KeySite(sites.k, sites.r3, at["k"])


def widen_norms(layer: nn.Module, folded: bool) -> None:
    """Replace a layer's norms by ours, in place; where gains were folded, the two layer norms lose theirs.

    Unless the merged layer was given new ones, which are learned scales: then they are not on the meta device any more.
    """
    for owner, name in (
        (layer, ATTENTION_NORM),
        (layer, MLP_NORM),
        (layer.self_attn, "q_norm"),
        (layer.self_attn, "k_norm"),
    ):
        norm = getattr(owner, name, None)
        if norm is not None:
            gainless = folded and owner is layer and norm.weight.is_meta
            setattr(owner, name, WideRMSNorm(norm.variance_epsilon, None if gainless else norm.weight))


def _gain_before(source: WeightSource, parameter: str) -> Tensor | None:
    """The gain [in] of the norm in front of a weight, fp64; None for weights that no norm feeds."""
    if parameter == f"{HEAD}.weight":
        return source.rows(f"{FINAL_NORM}.weight").double()
    parts = parameter.split(".")
    role = ".".join(parts[3:-1])
    if parts[-1] == "weight" and role in NORM_BEFORE:
        return source.rows(f"{'.'.join(parts[:3])}.{NORM_BEFORE[role]}.weight").double()
    return None


def folded_rows(
    source: WeightSource,
    parameter: str,
    out: Tensor,
    start: int = 0,
    r4: tuple[Tensor, ...] = (),
    device: torch.device | None = None,
) -> None:
    """Fill `out` with rows [start, start + len(out)) of a parameter, the norm's gain and R4 folded in.

    Both act on the input side only, so any row shard of any parameter can be made alone and no more than ROWS_AT_ONCE
    rows are ever held in fp64.

    Args:
        parameter: checkpoint name. out: [rows, ...], any floating dtype and device. r4: fp64 Kronecker factors.
        device: where to compute; None: where `out` lies.
    """
    gain = _gain_before(source, parameter)
    rotate = bool(r4) and parameter.endswith("mlp.down_proj.weight")
    for lo in range(0, len(out), ROWS_AT_ONCE):
        hi = min(lo + ROWS_AT_ONCE, len(out))
        rows = source.rows(parameter, start + lo, start + hi, device or out.device)
        if gain is not None or rotate:
            rows = rows.double()
        if gain is not None:
            rows = rows * gain.to(rows.device)
        if rotate:
            rows = kronecker_apply(rows, tuple(f.to(rows.device) for f in r4))
        out[lo:hi].copy_(rows.to(out.dtype))  # before the copy, which may lead to the host: a quarter of the bytes


def rotated_layer(
    source: WeightSource,
    index: int,
    shape: Shape,
    r1: Tensor,
    r2: Tensor,
    r4: tuple[Tensor, ...],
    device: torch.device,
    heads: tuple[Tensor, ...] = (),
    scales: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """All parameters of decoder layer `index` with its norms folded and R1, R2, R4 and scales merged; fp64 on `device`.

    Scales merge exactly: those at the attention and MLP input become the norms' gains, R1 diag(1/s) goes into the weights
    behind; up_proj's rows times s before down_proj's columns over s; R2 diag(s) between v and o; keys times and queries
    over t, in the gains of their norms where there are any.

    Args:
        r1 [h, h], r2 [d, d]: fp64. r4, heads: fp64 Kronecker factors, empty for none. scales: of this layer, by the names of
            `transforms.scale_shapes`.

    Returns:
        name within the layer (`self_attn.q_proj.weight`, ...) to tensor; q/k norms as they are, layer norms left out
        unless they are scales.
    """
    r1, r2 = r1.to(device), r2.to(device)
    r4, heads = (tuple(f.to(device) for f in factors) for factors in (r4, heads))
    s = {name: scale.to(device, torch.float64) for name, scale in (scales or {}).items()}
    d = shape.head_dim

    def read(role: str, kind: str) -> Tensor | None:
        name = f"{layer_name(index)}.{role}.{kind}"
        if not source.has(name):
            return None
        w = source.rows(name, device=device).double()
        gain = _gain_before(source, name)
        return w if gain is None else w * gain.to(device)

    rows: dict[str, Tensor] = {}  # what the rows of a linear are multiplied by
    out: dict[str, Tensor] = {}
    if "up" in s:
        rows["mlp.up_proj"] = s["up"]
    if "key" in s:
        t = torch.cat((s["key"], s["key"]), -1)  # [kv_heads or 1, d]
        rows["self_attn.k_proj"] = t.expand(shape.kv_heads, d).flatten()
        rows["self_attn.q_proj"] = (1 / t).repeat_interleave(shape.heads // len(t), 0).flatten()
    for role in ("self_attn.q_norm", "self_attn.k_norm"):
        norm = read(role, "weight")
        if norm is not None:
            scale = rows.pop(role.replace("norm", "proj"), None)
            out[f"{role}.weight"] = norm if scale is None else norm * scale[:d]
    for role, before in NORM_BEFORE.items():
        w, b = read(role, "weight"), read(role, "bias")
        assert w is not None
        w = w @ r1
        if before in s:
            w = w / s[before]
            out[f"{before}.weight"] = s[before]
        if role == "self_attn.v_proj":
            w = (r2.T @ w.unflatten(0, (-1, d))).flatten(0, 1)  # each head's rows
            b = None if b is None else (b.unflatten(0, (-1, d)) @ r2).flatten()
            if "value" in s:
                rows[role] = s["value"].flatten()
        if role in rows:
            w, b = w * rows[role][:, None], None if b is None else b * rows[role]
        _put(out, role, w, b)
    for role in ("self_attn.o_proj", "mlp.down_proj"):
        w, b = read(role, "weight"), read(role, "bias")
        assert w is not None
        if role == "self_attn.o_proj":
            w = w.unflatten(1, (-1, d)) @ r2  # each head's columns
            if "value" in s:
                w = w / s["value"].repeat_interleave(shape.heads // shape.kv_heads, 0)
            w = w.flatten(1)
            w = across_heads(w, heads, d) if heads else w
        else:
            if "up" in s:
                w = w / s["up"]
            w = kronecker_apply(w, r4) if r4 else w
        _put(out, role, r1.T @ w, None if b is None else b @ r1)
    return out


def _put(out: dict[str, Tensor], role: str, weight: Tensor, bias: Tensor | None) -> None:
    out[f"{role}.weight"] = weight
    if bias is not None:
        out[f"{role}.bias"] = bias


def rotated_end(source: WeightSource, name: str, r1: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The embedding E R1 or the head (W gain) R1, [vocab, h] in `dtype` on `device`; fp64 inside, in row chunks."""
    r1, gain = r1.to(device), _gain_before(source, f"{name}.weight")
    rows = source.rows(f"{name}.weight", device=device)
    out = torch.empty(rows.shape, dtype=dtype, device=device)
    for lo in range(0, len(rows), VOCAB_ROWS_AT_ONCE):
        part = rows[lo : lo + VOCAB_ROWS_AT_ONCE].double()
        out[lo : lo + len(part)] = (part if gain is None else part * gain.to(device)) @ r1
    return out
