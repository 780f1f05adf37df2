"""Merging R1, R2 and R4, norm gains and learned scales into weights, in fp64."""

import re

import torch
from torch import Tensor

from dist_spin.model.architecture import ATTENTION_NORM, FINAL_NORM, HEAD, MLP_NORM, Shape, layer_name
from dist_spin.model.attention import SINKS
from dist_spin.model.experts import CORRECTION, ROUTERS
from dist_spin.model.output_norms import OUTPUT_NORMS
from dist_spin.model.sites import across_heads
from dist_spin.model.weight_source import WeightSource
from dist_spin.numerics.block_rotation import apply_rotation, apply_rotation_left, left_out
from dist_spin.numerics.hadamard_transform import kronecker_apply

# The norm whose gain folds into each linear.
NORM_BEFORE = {
    "self_attn.q_proj": ATTENTION_NORM,
    "self_attn.k_proj": ATTENTION_NORM,
    "self_attn.v_proj": ATTENTION_NORM,
    "mlp.gate_proj": MLP_NORM,
    "mlp.up_proj": MLP_NORM,
}


def norms_before(shape: Shape) -> dict[str, str]:
    """The norm whose gain folds into each linear of a layer, by their names within it; a router is one of them."""
    if not shape.experts:
        return NORM_BEFORE
    attention = {role: norm for role, norm in NORM_BEFORE.items() if norm == ATTENTION_NORM}
    reading = [role for role in shape.linears if role.startswith("mlp.") and not role.endswith("down_proj")]
    return attention | dict.fromkeys((*ROUTERS[: 2 if shape.shared else 1], *reading), MLP_NORM)


STACKED = re.compile(r"\.mlp\.experts\.\w+_proj\.(weight|bias)$")
VOCAB_ROWS_AT_ONCE = 8192
ROWS_AT_ONCE = 512  # rows widened to fp64 at a time, which bounds the memory of folding


def _gain_before(source: WeightSource, parameter: str) -> Tensor | None:
    """The gain [in] of the norm in front of a weight, fp64; None for weights that no norm feeds."""
    if parameter == f"{HEAD}.weight":
        return source.rows(f"{FINAL_NORM}.weight").double()
    parts = parameter.split(".")
    role = ".".join(parts[3:-1])
    of_mlp = re.sub(r"(shared_expert|experts(\.\d+)?)\.", "", role)
    norm = NORM_BEFORE.get(of_mlp, MLP_NORM if role in ROUTERS else None)
    if parts[-1] == "weight" and norm is not None:
        return source.rows(f"{'.'.join(parts[:3])}.{norm}.weight").double()
    return None


def folded_rows(
    source: WeightSource,
    parameter: str,
    out: Tensor,
    start: int = 0,
    r4: tuple[Tensor, ...] = (),
    device: torch.device | None = None,
    *,
    gains: bool = True,
) -> None:
    """Fill `out` with rows [start, start + len(out)) of a parameter, the norm's gain and R4 folded in.

    Both act on the input side only, so any row shard of any parameter can be made alone and no more than ROWS_AT_ONCE
    rows are ever held in fp64.

    Args:
        parameter: checkpoint name, or that of all experts' matrices, one below the other (`mlp.experts.up_proj.weight`).
        out: [rows, ...], any floating dtype and device. r4: fp64 Kronecker factors.
        device: where to compute; None: where `out` lies. gains: whether norms are folded, which they are not without R1.
    """
    if STACKED.search(parameter):
        each, done = source.row_count(parameter.replace(".experts.", ".experts.0.")), 0
        while done < len(out):
            expert, first = divmod(start + done, each)
            rows, name = out[done : done + each - first], parameter.replace(".experts.", f".experts.{expert}.")
            folded_rows(source, name, rows, first, r4, device, gains=gains)
            done += len(rows)
        return
    gain = _gain_before(source, parameter) if gains else None
    rotate = bool(r4) and parameter.endswith("down_proj.weight")
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
        r1 [h, h], r2 [d, d]: fp64, or their blocks; where R1 is left out, no norm is folded. r4, heads: fp64 Kronecker
            factors, empty for none. scales: of this layer, by the names of `scales_and_clips.scale_shapes`.

    Returns:
        name within the layer (`self_attn.q_proj.weight`, ...) to tensor; q/k norms, SINKS and CORRECTION
        as they are, layer norms left out unless they are scales or not folded.
    """
    r1, r2, shape = r1.to(device), r2.to(device), shape.layer(index)
    turned = not left_out(r1)
    r4, heads = (tuple(f.to(device) for f in factors) for factors in (r4, heads))
    s = {name: scale.to(device, torch.float64) for name, scale in (scales or {}).items()}
    d = shape.head_dim

    def read(role: str, kind: str) -> Tensor | None:
        name = f"{layer_name(index)}.{role}.{kind}"
        if not source.has(name):
            return None
        w = source.rows(name, device=device).double()
        gain = _gain_before(source, name) if turned else None
        return w if gain is None else w * gain.to(device)

    rows: dict[str, Tensor] = {}  # what the rows of a linear are multiplied by
    out: dict[str, Tensor] = {}
    if "up" in s:
        rows |= dict(zip(shape.of_mlp("up_proj"), _per_expert(s["up"], shape), strict=True))
    if "key" in s:
        t = torch.cat((s["key"], s["key"]), -1)  # [kv_heads or 1, d]
        rows["self_attn.k_proj"] = t.expand(shape.kv_heads, d).flatten()
        rows["self_attn.q_proj"] = (1 / t).repeat_interleave(shape.heads // len(t), 0).flatten()
    for role in ("self_attn.q_norm", "self_attn.k_norm"):
        norm = read(role, "weight")
        if norm is not None:
            scale = rows.pop(role.replace("norm", "proj"), None)
            out[f"{role}.weight"] = norm if scale is None else norm * scale[: len(norm)]
    for name in (SINKS, CORRECTION):
        if source.has(f"{layer_name(index)}.{name}"):
            out[name] = source.rows(f"{layer_name(index)}.{name}", device=device).double()
    for role, before in norms_before(shape).items():
        w, b = read(role, "weight"), read(role, "bias")
        if w is None and role == ROUTERS[1]:  # a shared expert that counts in full
            continue
        assert w is not None
        if turned:
            w = apply_rotation(w, r1)
        if before in s:
            w = w / s[before]
            out[f"{before}.weight"] = s[before]
        if role == "self_attn.v_proj":
            w = apply_rotation_left(r2, w)  # each head's rows
            b = None if b is None else apply_rotation(b.unflatten(0, (-1, d)), r2).flatten()
            if "value" in s:
                rows[role] = s["value"].flatten()
        if role in rows:
            w, b = w * rows[role][:, None], None if b is None else b * rows[role]
        _put(out, role, w, b)
    over = dict(zip(shape.of_mlp("down_proj"), _per_expert(s["up"], shape), strict=True)) if "up" in s else {}
    for role in (role for role in shape.linears if role.endswith(("o_proj", "down_proj"))):
        w, b = read(role, "weight"), read(role, "bias")
        assert w is not None
        if role == "self_attn.o_proj":
            w = apply_rotation(w.unflatten(1, (-1, d)), r2)  # each head's columns
            if "value" in s:
                w = w / s["value"].repeat_interleave(shape.heads // shape.kv_heads, 0)
            w = w.flatten(1)
            w = across_heads(w, heads, d) if heads else w
        else:
            if role in over:
                w = w / over[role]
            w = kronecker_apply(w, r4) if r4 else w
        if turned:
            w, b = apply_rotation_left(r1, w), None if b is None else apply_rotation(b, r1)
        _put(out, role, w, b)
    for role in () if turned else (ATTENTION_NORM, MLP_NORM, *OUTPUT_NORMS):
        if (gain := read(role, "weight")) is not None:
            out[f"{role}.weight"] = gain
    return out


def _per_expert(scale: Tensor, shape: Shape) -> list[Tensor]:
    """Scales of up_proj's rows, one vector for each MLP of the layer, in the order of `Shape.of_mlp`."""
    if not shape.experts:
        return [scale]
    return [*scale[: shape.experts], *([scale[shape.experts :].flatten()] if shape.shared else [])]


def _put(out: dict[str, Tensor], role: str, weight: Tensor, bias: Tensor | None) -> None:
    out[f"{role}.weight"] = weight
    if bias is not None:
        out[f"{role}.bias"] = bias


def rotated_embedding(source: WeightSource, name: str, r1: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The embedding E R1 or the head (W gain) R1, [vocab, h] in `dtype` on `device`; fp64 inside, in row chunks."""
    r1, gain = r1.to(device), _gain_before(source, f"{name}.weight")
    rows = source.rows(f"{name}.weight", device=device)
    out = torch.empty(rows.shape, dtype=dtype, device=device)
    for lo in range(0, len(rows), VOCAB_ROWS_AT_ONCE):
        part = rows[lo : lo + VOCAB_ROWS_AT_ONCE].double()
        out[lo : lo + len(part)] = apply_rotation(part if gain is None else part * gain.to(device), r1)
    return out
