"""How several ranks share the quantisation: all of them on each layer, or each on whole ranges of layers.

Sharing a layer splits its sequences and the rows of its weights; merging and factorising are done by every rank again. Whole
ranges split everything, but need hidden states that ranges start from, and enough ranges for all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_spin.model.architecture import Shape

# Seconds on one H200 for 1e15 operations of each kind, from the parts of `dist-spin bench quantize --shape 70b`. Only their
# ratios decide.
FORWARD, HESSIAN, SOLVE, FACTOR, MERGE = 1.8, 1.0, 69.0, 19.0, 23.5
MEMORY_SHARE = 0.9  # of what is free that a rank may be expected to fill


@dataclass(frozen=True)
class LayerCost:
    """Estimated seconds of one layer on one GPU: `forward` passes, other work that ranks can split, and work they cannot."""

    forward: float
    split: float
    whole: float


def layer_cost(shape: Shape, tokens: int) -> LayerCost:
    """What GPTQ of one layer takes, for `tokens` tokens of calibration."""
    products = shape.products
    forward = FORWARD * 2 * shape.active_weights * tokens * 1e-15
    hessians = sum(n * share * 2 * i * i * tokens for i, _, n, share in products)
    split = (HESSIAN * hessians + SOLVE * sum(n * o * i * i for i, o, n, _ in products)) * 1e-15
    whole = (FACTOR * sum(n * i**3 for i, _, n, _ in products) + MERGE * 2 * shape.weights * shape.hidden) * 1e-15
    return LayerCost(forward, split, whole)


def memory_needed(shape: Shape, tokens: int, itemsize: int) -> int:
    """Bytes that quantising with all sequences on one rank takes about: states, inputs of down_proj, matrices in fp32, the
    merge of the next layer in fp64, weights.
    """
    widest = max(shape.intermediate, shape.dense_width, shape.heads * shape.head_dim)
    merged = 8 * shape.weights if shape.experts else 3 * 8 * widest * shape.hidden
    states = tokens * (shape.hidden + widest) * itemsize
    return states + 3 * 4 * widest**2 + merged + 3 * shape.weights * itemsize


def assign(missing: Sequence[int], ranks: int) -> list[list[int]]:
    """Which ranges each rank takes, by their numbers: the longest first, each to the rank with the fewest layers."""
    taken: list[list[int]] = [[] for _ in range(ranks)]
    layers = [0] * ranks
    for number in sorted(range(len(missing)), key=lambda i: -missing[i]):
        rank = layers.index(min(layers))
        taken[rank].append(number)
        layers[rank] += missing[number]
    return taken


@dataclass(frozen=True)
class Choice:
    """How the ranks share the work, and why, for the user."""

    parallel: Literal["ranks", "layers"]
    reason: str


def choose(
    setting: Literal["auto", "ranks", "layers"],
    cost: LayerCost,
    missing: Sequence[int],
    states_to: int,
    sequences: int,
    ranks: int,
    *,
    fits: bool,
) -> Choice:
    """What `quantize.parallel` means for this work; both give the same files, up to how sums are rounded.

    Args:
        missing: layers that each open range lacks. states_to: the last layer whose entering states are still to be stored.
        fits: whether one rank holds all sequences.
    """
    if len(missing) < 2:
        return Choice("ranks", "one range of layers is left; quantize.layers_per_job cuts smaller ones")
    if setting != "auto":
        return Choice(setting, "quantize.parallel says so")
    if not fits:
        return Choice("ranks", "one of them does not hold all calibration sequences")
    longest = max(sum(missing[i] for i in numbers) for numbers in assign(missing, ranks))
    states = states_to * cost.forward / min(ranks, sequences)
    apart = states + longest * (cost.forward + cost.split + cost.whole)
    forward = cost.forward / min(ranks, sequences)
    together = states + sum(missing) * (forward + cost.split / ranks + cost.whole)
    if apart < together:
        return Choice("layers", f"about {together / apart:.1f} times as fast as sharing each layer")
    return Choice("ranks", f"about {apart / together:.1f} times as fast as whole ranges of layers")
