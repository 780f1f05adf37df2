"""How checkpoints store the experts of a layer: one by one, or all of them in one tensor; and under which names."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from dist_spin.model.experts import CORRECTION, GLM_LIKE

MIXTRAL_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # as its checkpoints name them
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERTS = "mlp.experts."


class ExpertPart(NamedTuple):
    """A tensor of one expert within a stack [experts, ...] of all: rows `start`, `start + step`, ... of the expert's part.

    transposed: of the transpose of that part. shape: of the tensor.
    """

    shape: tuple[int, ...]
    expert: int
    start: int
    step: int = 1
    transposed: bool = False

    @property
    def is_block(self) -> bool:
        """Whether the tensor lies in the file as it is, one row after the other."""
        return self.step == 1 and not self.transposed

    def of(self, expert: Tensor) -> Tensor:
        """The tensor, as a view of the expert's part of the stack."""
        return (expert.T if self.transposed else expert)[self.start :: self.step]


def stores_interleaved(names: list[str]) -> bool:
    """Whether a checkpoint with tensors of these names is gpt-oss's, whose experts lie otherwise: see `expert_parts`."""
    return any(name.endswith(f".{EXPERTS}gate_up_proj_bias") for name in names)


def expert_parts(name: str, shape: tuple[int, ...], *, interleaved: bool = False) -> dict[str, ExpertPart]:
    """The tensors that a stack of all experts holds, by name.

    Newer checkpoints have `mlp.experts.gate_up_proj` [experts, 2 w, h], gate above up, and `mlp.experts.down_proj`
    [experts, h, w].

    Args:
        name, shape: of the stored tensor.
        interleaved: those of gpt-oss, [experts, h, 2 w] with gate and up in turns, [experts, w, h], and their biases
            `gate_up_proj_bias` [experts, 2 w] and `down_proj_bias` [experts, h].

    Returns:
        Nothing for any other tensor.
    """
    layer, _, stack = name.rpartition(f".{EXPERTS}")
    kind = "bias" if interleaved and stack.endswith("_bias") else "weight"
    linears = STACKS.get(stack.removesuffix("_bias") if kind == "bias" else stack, ())
    if not layer or not linears or len(shape) != (2 if kind == "bias" else 3):
        return {}
    transposed = interleaved and kind == "weight"
    outputs = shape[2] if transposed else shape[1]
    rows, inputs = outputs // len(linears), () if kind == "bias" else (shape[1] if transposed else shape[2],)
    return {
        f"{layer}.{EXPERTS}{e}.{linear}.{kind}": ExpertPart(
            (rows, *inputs),
            e,
            i if interleaved else i * rows,
            len(linears) if interleaved else 1,
            transposed,
        )
        for e in range(shape[0])
        for i, linear in enumerate(linears)
    }


def name_here(stored: str) -> str:
    """The name within our modules of a tensor as checkpoints of Mixtral, gpt-oss, GLM or MiniMax store it; others as they are."""
    name = stored.replace(".block_sparse_moe.", ".mlp.").replace(".mlp.router.", ".mlp.gate.")
    name = name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    name = name.replace(".mlp.e_score_correction_bias", f".{CORRECTION}")
    return re.sub(r"(\.experts\.\d+)\.(w[123])\.", lambda m: f"{m[1]}.{MIXTRAL_LINEARS[m[2]]}.", name)


def name_in_checkpoints(model_type: str, name: str) -> str:
    """The reverse of `name_here`, for a name within a layer."""
    if model_type == "gpt_oss":
        return name.replace("mlp.gate.", "mlp.router.", 1)
    if model_type in GLM_LIKE:
        return name.replace("mlp.shared_expert.", "mlp.shared_experts.", 1)
    if model_type not in ("mixtral", "minimax_m2") or not name.startswith("mlp."):
        return name
    if name == CORRECTION:
        return "block_sparse_moe.e_score_correction_bias"
    stored = {linear: w for w, linear in MIXTRAL_LINEARS.items()}
    name = re.sub(r"(experts\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{stored[m[2]]}.", name)
    return name.replace("mlp.", "block_sparse_moe.", 1)


def layer_in_checkpoints(model_type: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unquantised tensors of a layer as transformers and engines read them of this family, by their names within it."""
    if model_type == "gpt_oss":
        tensors = _interleaved(tensors)
    return {name_in_checkpoints(model_type, name): tensor for name, tensor in tensors.items()}


def _interleaved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `expert_parts` of gpt-oss."""
    count = sum(name.startswith(EXPERTS) and name.endswith("down_proj.weight") for name in tensors)
    out = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXPERTS)}
    for stack, linears in STACKS.items():
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            each = [[tensors[f"{EXPERTS}{e}.{linear}.{kind}"].t() for linear in linears] for e in range(count)]
            out[f"{EXPERTS}{stack}{ending}"] = torch.stack([torch.stack(parts, -1).flatten(-2) for parts in each])
    return out
