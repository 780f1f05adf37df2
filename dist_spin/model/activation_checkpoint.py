"""What a layer keeps of its forward pass for the backward pass, and how to choose that from the memory there is."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_spin.model.architecture import Shape

# From most memory to least. "none": keep everything. "sites": keep x_hat of both norm sites and the output of o_proj, so
# that neither the rotations nor o_proj and down_proj run twice. "layer": keep the layer's input only.
LEVELS = ("none", "sites", "layer")


def _sites(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept_matmul = op == torch.ops.dist_spin.kept_matmul.default
    return CheckpointPolicy.MUST_SAVE if is_kept_matmul else _layer(ctx, op)


def _layer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_routing = op == torch.ops.dist_spin.chosen_experts.default
    return CheckpointPolicy.MUST_SAVE if is_routing else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS = {
    "sites": partial(create_selective_checkpoint_contexts, _sites),
    "layer": partial(create_selective_checkpoint_contexts, _layer),
}


def run(layer: nn.Module, level: str, hidden: Tensor, **call: Any) -> Tensor:
    """layer(hidden, **call), keeping for the backward pass what `level` says."""
    if level == "none" or not torch.is_grad_enabled():
        return layer(hidden, **call)
    # "layer" needs a policy only where it is compiled: without one, torch 2.11 keeps more than "sites" does, because what
    # happens inside a custom autograd function is not marked for recomputation. Run eagerly, it costs time per operation.
    policy = level == "sites" or torch.compiler.is_compiling()
    options: dict[str, Any] = {"context_fn": _CONTEXTS[level]} if policy else {}
    return checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False, **options, **call)


def kept_bytes(
    shape: Shape,
    tokens: int,
    element: int,
    level: str,
    *,
    compiled: bool = True,
    fake_quant_linears: bool = False,
    transformed: bool = False,
) -> int:
    """Bytes that one layer keeps for `tokens` tokens of one pass, its input included.

    compiled: by torch.compile. fake_quant_linears: rotations are learned with rounded weights, whose gradients need the
    inputs of o_proj and down_proj too. transformed: scales or clips are learned beside them.

    "none" in a compiled layer is what torch.compile's partitioner was measured to keep (0.70 GiB for 6144 tokens of the
    Llama-3-8B shape; 1.9 GiB for 8192 tokens with scales and clips, counted with a quarter to spare); in an eager one it
    counts the tensors between the matmuls and their fp32 companions in quantisers and norms.
    """
    h, i = shape.hidden, shape.mlp_width
    most = (24 * h + 10 * i) if not compiled else (20 * h + 5 * i) if transformed else (8 * h + 2 * i)
    elements = {"layer": h, "sites": 4 * h, "none": most}[level]
    if fake_quant_linears and level == "none" and compiled:
        elements += shape.heads * shape.head_dim + i
    if level == "none":
        elements += 2 * shape.experts_per_token * h  # tokens in the order of their experts, and their experts' outputs
    return tokens * elements * element


def plan(shape: Shape, tokens: int, element: int, free: int, **kind: bool) -> list[str]:
    """The level of every layer, so that what is kept fits into `free` bytes: as many layers as possible keep more.

    One layer's whole working set is set aside, since recomputation builds it once at a time. kind: the keywords of
    `kept_bytes`.
    """
    need = {level: kept_bytes(shape, tokens, element, level, **kind) for level in LEVELS}
    free -= 2 * need["none"]
    for rich, poor in (("none", "sites"), ("sites", "layer")):
        spare = free - shape.layers * need[poor]
        if spare >= 0:
            count = min(shape.layers, spare // (need[rich] - need[poor]))
            return [rich] * count + [poor] * (shape.layers - count)
    return ["layer"] * shape.layers
