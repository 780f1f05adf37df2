"""A model of one step of rotation learning on N GPUs of a host: what computes, what is gathered, and what hides what.

    step = compute + copies + exposed gathers + requantisation + all-reduce + Cayley + checkpoint wait

Compute is FLOP over a rate that is fitted to measured steps, plus a fixed time per layer and pass; everything else follows
from bytes and from what was measured at the fewest ranks. Under FSDP2 a decoder layer's frozen weights are gathered twice per
pass (forward, and again for the backward pass), the embedding and the head once. No gradient of a weight is ever reduced.
Times are seconds, memory is bytes, rates are per second, unless a name says otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_spin.model.activation_checkpoint import kept_bytes
from dist_spin.model.architecture import Shape
from dist_spin.optimize.sharding.memory_planner import RECOMPUTE_COST, Workload, layer_bytes, within

DTYPE = torch.bfloat16  # of weights and activations
GIB = 1 << 30
ELEMENTWISE_PASSES = (
    16  # times that a Cayley step reads or writes an fp32 [h, h] outside of its products, on every rank
)


@dataclass(frozen=True)
class Machine:
    """link: bytes/s that one rank receives in an all-gather. copy: bytes/s read plus written by copies on the device.

    contention: share of a gather's time that it costs although it runs behind compute, since it takes multiprocessors
    and memory bandwidth from it; 0: nothing, 1: as if nothing overlapped. memory: of one device.
    """

    link: float
    copy: float
    contention: float
    memory: float


@dataclass(frozen=True)
class Point:
    """One configuration. shards: ranks that one copy of the weights is spread over. micro: sequences of one pass of one rank.

    levels: layers at each level of recomputation (`activation_checkpoint.LEVELS`).
    """

    ranks: int
    shards: int
    sequences: int
    seq_len: int
    layers: int
    w_bits: int
    micro: int
    levels: dict[str, int]

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank in a step; a rank with fewer sequences pads, as `optimize.train.passes` does."""
        return -(-self.share // self.micro)

    @property
    def share(self) -> int:
        """Sequences of the rank that has most."""
        return -(-self.sequences // self.ranks)

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return self.micro * self.seq_len


@dataclass(frozen=True)
class Fixed:
    """Measured parts of a step outside of the layers, with the ranks they were measured at; seconds."""

    ranks: int
    reduce: float
    cayley: float
    checkpoint_wait: float
    requantize: float


@dataclass(frozen=True)
class Fit:
    """rate: FLOP/s of the products of layers and head. overhead: seconds per layer and pass, whatever it computes."""

    rate: float
    overhead: float


@dataclass(frozen=True)
class Prediction:
    """Parts of a step, seconds; `gather` is what is exposed. gathered: bytes that one rank receives in a step."""

    compute: float
    copies: float
    gather: float
    requantize: float
    reduce: float
    cayley: float
    checkpoint_wait: float
    gathered: float
    memory: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return (
            self.compute
            + self.copies
            + self.gather
            + self.requantize
            + self.reduce
            + self.cayley
            + self.checkpoint_wait
        )


def layer_flop(shape: Shape, seq_len: int, w_bits: int) -> tuple[float, float]:
    """FLOP per token of one decoder layer, the mean of all, forward and backward, nothing computed twice.

    With 16-bit weights the two sites rotate (two products of [h, h] forward, one backward each) and weights take no
    gradient; forward + backward is then `bench.optimize.step_flop`. With fewer bits nothing rotates, but every linear has
    one more product of its size and its gradients of R1 and R2 (model/weight_quant.py).
    """
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linears = 2 * shape.mean(lambda layer: layer.active_weights + h * layer.experts)
    attention = 2 * q * seq_len  # QK^T and PV, over half of the positions
    rotations = 8 * h * h if w_bits == 16 else 0
    forward = linears + attention + rotations
    if w_bits == 16:
        backward = linears + 2.5 * attention + 4 * h * h
    else:
        backward = 2 * linears + 2.5 * attention + 10 * h * h + 2 * h * q + 2 * h * kv
    return forward, backward


def mean_layer_bytes(shape: Shape, w_bits: int = 16) -> float:
    """Bytes of a decoder layer, the mean of all; w_bits: of the weights that are learned with."""
    return shape.mean(lambda layer: layer_bytes(layer, DTYPE, w_bits))


def shard_bytes(shape: Shape, point: Point) -> float:
    """Bytes of frozen weights on one rank."""
    embedding_and_head = 2 * shape.vocab * shape.hidden * DTYPE.itemsize
    return (point.layers * mean_layer_bytes(shape, point.w_bits) + embedding_and_head) / point.shards


def hidden_cost(gather: float, compute: float, contention: float) -> float:
    """Seconds that a gather of `gather` seconds adds to the `compute` seconds it runs beside."""
    return max(gather - compute, 0.0) + contention * min(gather, compute)


def layers_time(shape: Shape, point: Point, fit: Fit, machine: Machine) -> tuple[float, float, float, float]:
    """Forward and backward of one step: seconds of compute, copies and exposed gathers; bytes gathered by a rank.

    What is computed twice counts with its measured share, `memory_planner.RECOMPUTE_COST`. Nothing hides the
    gather of the embedding, at the start of a pass; the head is gathered behind the last layer.
    """
    forward, backward = layer_flop(shape, point.seq_len, point.w_bits)
    backward += (
        (forward + backward) * sum(RECOMPUTE_COST[kind] * count for kind, count in point.levels.items()) / point.layers
    )
    layer = mean_layer_bytes(shape, point.w_bits)
    vocab_matrix = shape.vocab * shape.hidden * DTYPE.itemsize
    received = (point.shards - 1) / point.shards

    def seconds(flop: float) -> float:
        return flop * point.tokens / fit.rate + fit.overhead / 2

    gather, gather_vocab = received * layer / machine.link, received * vocab_matrix / machine.link
    exposed = gather_vocab + hidden_cost(gather_vocab, seconds(forward), machine.contention)
    exposed += point.layers * sum(hidden_cost(gather, seconds(f), machine.contention) for f in (forward, backward))
    moved = 2 * point.layers * layer + 2 * vocab_matrix
    head = 4 * shape.vocab * shape.hidden * point.tokens / fit.rate
    compute = point.layers * (seconds(forward) + seconds(backward)) + head
    # FSDP2 copies what it has gathered into the parameters, on the stream that computes: bytes are read and written.
    copies = 2 * moved / machine.copy
    return tuple(point.micro_batches * x for x in (compute, copies, exposed, received * moved))  # type: ignore[return-value]


def fit(shape: Shape, measured: Sequence[tuple[Point, float]], machine: Machine) -> Fit:
    """Rate and overhead from measured seconds of forward and backward, requantisation left out, by relative least squares.

    So the achieved rate depends on the tokens of a pass, as t / (t + constant). Where all points have the same number of
    tokens per pass, or a negative overhead would fit best, the overhead is 0. How much of the gathers is exposed depends on
    the rate in turn, so both are found by iteration.
    """
    fitted = Fit(1e15, 0.0)
    for _ in range(50):
        rows = []
        for point, seconds in measured:
            _, copies, gather, _ = layers_time(shape, point, fitted, machine)
            unit = layers_time(shape, point, Fit(1.0, 0.0), machine)[0]  # FLOP
            rows.append((unit / seconds, point.micro_batches * point.layers / seconds, 1 - (copies + gather) / seconds))
        inverse, overhead = _least_squares(rows)
        if overhead <= 0 or len({point.tokens for point, _ in measured}) == 1:
            inverse, overhead = sum(a * y for a, _, y in rows) / sum(a * a for a, _, _ in rows), 0.0
        if inverse <= 0:
            raise ValueError("gathers alone take longer than was measured")
        fitted = Fit(1 / inverse, overhead)
    return fitted


def _least_squares(rows: list[tuple[float, float, float]]) -> tuple[float, float]:
    """x, y of the least squares solution of a x + b y = c; y is 0 where the rows do not tell them apart."""
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    ac, bc = (sum(r[i] * r[2] for r in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-9 * aa * bb:
        return ac / aa, 0.0
    return (ac * bb - bc * ab) / determinant, (bc * aa - ac * ab) / determinant


def reduce_time(shape: Shape, layers: int, ranks: int, measured: Fixed, machine: Machine) -> float:
    """The packed all-reduce of fp32 gradients: a ring sends 2 (N-1)/N of its bytes; the rest is as measured."""
    size = 4 * (shape.hidden**2 + layers * shape.head_dim**2) / machine.link

    def ring(n: int) -> float:
        return 2 * (n - 1) / n * size

    return max(measured.reduce - ring(measured.ranks), 0.0) + ring(ranks)


def cayley_time(shape: Shape, ranks: int, measured: Fixed, machine: Machine) -> float:
    """The Cayley step: products split over ranks by rows of R1, elementwise work done by all, shares gathered."""
    size = 4 * shape.hidden**2
    elementwise = min(ELEMENTWISE_PASSES * size / machine.copy, measured.cayley)

    def gather(n: int) -> float:
        return (n - 1) / n * size / machine.link

    split = max(measured.cayley - elementwise - gather(measured.ranks), 0.0) * measured.ranks
    return elementwise + split / ranks + gather(ranks)


def requantize_time(shape: Shape, point: Point, measured: Fixed, machine: Machine) -> float:
    """Quantising the merged weights anew: rows split over shards, but v, o and down are gathered first (exposed)."""
    kv, q = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    mixed = point.layers * shape.hidden * (kv + q + shape.intermediate) * DTYPE.itemsize

    def gather(n: int) -> float:
        return (n - 1) / n * mixed / machine.link + (2 * mixed / machine.copy if n > 1 else 0.0)

    return max(measured.requantize - gather(measured.ranks), 0.0) * measured.ranks / point.shards + gather(point.shards)


def memory(shape: Shape, point: Point) -> float:
    """Peak bytes on one rank: weights, layers being gathered, what passes keep, one layer at work, rotations and their copies."""
    tokens, element = point.tokens, DTYPE.itemsize
    rounded = point.w_bits < 16
    activations = sum(
        count * kept_bytes(shape, tokens, element, level, fake_quant_linears=rounded)
        for level, count in point.levels.items()
    )
    gathered = (3 + rounded) * layer_bytes(shape, DTYPE, point.w_bits)
    rotations = 6 * 4 * (shape.hidden**2 + point.layers * shape.head_dim**2)
    return (
        shard_bytes(shape, point)
        + gathered
        + activations
        + kept_bytes(shape, tokens, element, "none", fake_quant_linears=rounded)
        + rotations
    )


def planned(
    shape: Shape, ranks: int, shards: int, sequences: int, seq_len: int, layers: int, w_bits: int, machine: Machine
) -> Point:
    """The point that the run itself would choose on `ranks` GPUs: passes and recomputation from the memory there is."""
    one = Point(ranks, shards, sequences, seq_len, layers, w_bits, 1, {})
    free = machine.memory - GIB - shard_bytes(shape, one) - 14 * shape.hidden**2  # the context; rotations and gradient
    cut = Shape(**{**vars(shape), "layers": layers})
    workload = Workload(cut, one.share, seq_len, DTYPE, shards, w_bits)
    micro, levels = within(workload, int(free) - workload.reserved(int(machine.memory)))
    counts = {level: levels.count(level) for level in set(levels)}
    return Point(ranks, shards, sequences, seq_len, layers, w_bits, micro, counts)


def predict(shape: Shape, point: Point, fitted: Fit, fixed: Fixed, machine: Machine) -> Prediction:
    """A whole step of `point`."""
    compute, copies, gather, gathered = layers_time(shape, point, fitted, machine)
    return Prediction(
        compute,
        copies,
        gather,
        requantize_time(shape, point, fixed, machine) if point.w_bits < 16 else 0.0,
        reduce_time(shape, point.layers, point.ranks, fixed, machine),
        cayley_time(shape, point.ranks, fixed, machine),
        fixed.checkpoint_wait,
        gathered,
        memory(shape, point),
    )


def pipeline(
    layers: int,
    devices: int,
    *,
    step: float,
    steps: int,
    loading: float,
    layer: float,
    forward: float,
    merge: float,
    per_job: int,
    states_bytes: float,
    model_bytes: float,
    disk: float,
    starting: float,
) -> dict[str, float]:
    """Wall-clock seconds of every stage of a run on `devices` GPUs of one host.

    Args:
        step, steps, loading: of learning. layer: quantising one decoder layer; forward, merge: its parts that the pass
            which stores the jobs' first hidden states consists of, on one GPU. per_job: layers of one job.
        states_bytes: hidden states that enter one job. model_bytes: all layers as codes, read once to be assembled.
        disk: bytes/s. starting: seconds that a process takes before it works.
    """
    jobs = -(-layers // per_job)
    states = (jobs - 1) * per_job * (merge + forward) + (jobs - 1) * states_bytes / disk
    return {
        "learning": starting + loading + steps * step,
        "boundaries": starting + states if jobs > 1 else 0.0,
        "gptq": math.ceil(jobs / devices) * (starting + per_job * layer),
        "assembly": starting + model_bytes / disk,
    }
