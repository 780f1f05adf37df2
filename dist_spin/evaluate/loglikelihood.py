"""Log-likelihoods of continuations, layer by layer: what multiple-choice and last-word tasks ask of a model.

All requests are gathered first, so that every layer is built once for all of them. A 70B model is measured within one GPU:
a layer and a batch of hidden states are on it at a time, the others wait on the host where the device has no room for them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_spin.errors import Interrupted, UserError
from dist_spin.evaluate.layerwise_model import LayerwiseModel
from dist_spin.model.loss import LOGITS_AT_ONCE
from dist_spin.model.rotated_weights import Head
from dist_spin.numerics.dtypes import accumulation_dtype
from dist_spin.runtime.device_memory import device_bytes_free
from dist_spin.runtime.distributed import World, max_over_ranks, raise_on_any_failure, sum_over_ranks_
from dist_spin.runtime.host_memory import host_bytes_free
from dist_spin.runtime.signals import StopRequest

CPU_TOKENS = 4096  # of one batch; caches are small, and an allocation that fails there cannot be caught
GPU_TOKENS = 1 << 16  # to begin with; halved while memory does not take it
DEVICE_SHARE = 0.5  # of the device's free memory, for hidden states that wait there
HOST_SHARE = 0.25  # of the host's free memory, shared by its ranks


@dataclass
class Row:
    """One sequence that goes through the model, for every request whose tokens it ends with."""

    tokens: tuple[int, ...]
    requests: list[tuple[int, list[int]]] = field(default_factory=list)  # number of the request, its continuation


def sequences_for(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """The sequences that answer (context, continuation) pairs of token ids, longest first.

    The last token predicts nothing and is left off, and what is longer than `max_length` loses its beginning. Requests that
    agree in all but their last token share a row: so do the choices "no" and "yes" of one question.
    """
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        tokens = tuple((context + continuation)[-(max_length + 1) :][:-1])
        rows.setdefault(tokens, Row(tokens)).requests.append((number, continuation))
    return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))


def batches_of(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """Neighbouring rows, at most `tokens` of them once padded to the longest (which is the first); at least one row."""
    at = 0
    while at < len(rows):
        count = max(1, tokens // len(rows[at].tokens))
        yield rows[at : at + count]
        at += count


def groups_that_fit(batches: Iterable[list[Row]], tokens: int) -> Iterator[list[list[Row]]]:
    """Batches that are carried through the model together: at most `tokens` of hidden states, at least one batch."""
    group: list[list[Row]] = []
    held = 0
    for batch in batches:
        size = len(batch) * len(batch[0].tokens)
        if group and held + size > tokens:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group


class MemoryLimitedRunner:
    """Runs a function on as many rows at a time as the device's memory takes.

    tokens: how many to try. Halved whenever memory runs out, and kept so for the calls that follow.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`run` of hidden [batch, T, h], whose rows are independent of each other.

        Raises:
            UserError: memory does not take a single row.
        """
        while True:
            rows = min(len(hidden), max(1, self.tokens // hidden.shape[1]))
            try:
                return torch.cat([run(part) for part in hidden.split(rows)])
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    problem = f"one sequence of {hidden.shape[1]} tokens does not fit into the device's memory"
                    raise UserError(problem, "free memory on it, or use a larger device") from error
            self.tokens = rows // 2 * hidden.shape[1]
            torch.cuda.empty_cache()


def log_likelihoods(
    open_layerwise: Callable[[], LayerwiseModel],
    world: World,
    requests: list[tuple[list[int], list[int]]],
    *,
    layers: int,
    max_length: int,
    token_bytes: int,
    what: str,
    stop: StopRequest | None = None,
) -> list[tuple[float, bool]]:
    """Sum of the log-probabilities of each continuation after its context, and whether greedy decoding would write it.

    Args:
        open_layerwise: gives the model to measure, from its first layer.
        requests: (context, continuation) token ids, neither empty; the same on every rank, which share the work.
        layers: how many the model has.
        max_length: tokens that the model takes.
        token_bytes: size of one token's hidden state.
        what: named in the progress line.
        stop: asked after every batch of a layer.

    Raises:
        Interrupted: a signal came; the ranks leave together, after the layer at work.
        UserError: memory does not take a single sequence, or a continuation is longer than the model takes.
    """
    longest = max((len(continuation) for _, continuation in requests), default=0)
    if longest > max_length:
        problem = f"{what}: an answer of {longest} tokens is longer than the model's context of {max_length}"
        raise UserError(problem, "leave the task out of evaluate.tasks", shared=True)
    answers = torch.zeros(len(requests), 2, dtype=torch.float64)

    runner = MemoryLimitedRunner(GPU_TOKENS if world.device.type == "cuda" else CPU_TOKENS)
    batches = list(batches_of(sequences_for(requests, max_length)[world.rank :: world.size], runner.tokens))
    waiting_device, room = device_for_waiting_states(
        world, token_bytes * sum(len(b) * len(b[0].tokens) for b in batches)
    )
    groups = list(groups_that_fit(batches, room // token_bytes))
    for number in range(max_over_ranks(len(groups))):  # ranks whose own groups are done still agree with the others
        group = groups[number] if number < len(groups) else []
        label = what if number == 0 else f"{what}, pass {number + 1}"
        one_pass = _Pass(group, world.device, waiting_device, runner, label, stop)
        raise_on_any_failure(functools.partial(one_pass.begin, open_layerwise))
        for _ in range(layers):
            raise_on_any_failure(one_pass.next_layer)
        raise_on_any_failure(functools.partial(one_pass.fill, answers))
    return [(total, bool(greedy)) for total, greedy in sum_over_ranks_(answers).tolist()]


def device_for_waiting_states(world: World, wanted: int) -> tuple[torch.device, int]:
    """Where `wanted` bytes of hidden states wait between layers, and how many may: the device if it has room, or the host."""
    if world.device.type == "cuda":
        room = int(device_bytes_free(world.device) * DEVICE_SHARE)
        if wanted <= room:
            return world.device, room
    return torch.device("cpu"), int(host_bytes_free() * HOST_SHARE / world.local_size)


@dataclass
class _Pass:
    """Batches that are carried through the model together; without any, there is nothing to do."""

    batches: list[list[Row]]
    device: torch.device
    waiting_device: torch.device
    runner: MemoryLimitedRunner
    what: str
    stop: StopRequest | None
    hidden: list[Tensor] = field(default_factory=list)  # of each batch, [rows, T, h]

    @torch.no_grad()
    def begin(self, open_layerwise: Callable[[], LayerwiseModel]) -> None:
        """Embed the tokens."""
        if self.batches:
            self.model = open_layerwise()
            self.layers = self.model.layers(self.what)
            self.hidden = self.model.embed((padded(batch) for batch in self.batches), self.waiting_device)

    @torch.no_grad()
    def next_layer(self) -> None:
        """Through one more layer.

        Raises:
            Interrupted: a signal came.
        """
        if self.batches:
            layer = next(self.layers)
            for i in range(len(self.hidden)):
                self._leave_if_asked()
                self.hidden[i] = self.runner(layer, self.hidden[i].to(self.device)).to(self.waiting_device)
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self.stop:
            raise Interrupted(f"stopped by a signal: {self.what}", "the same command continues with that measurement")

    @torch.no_grad()
    def fill(self, answers: Tensor) -> None:
        """Fill each request's line of answers [n, 2] fp64: the log-probability, and whether greedy decoding would write it."""
        if self.batches:
            head = self.model.head()
            for hidden, batch in zip(self.hidden, self.batches, strict=True):
                for number, answer in _answers(head, hidden.to(self.device), batch):
                    answers[number] = torch.tensor(answer, dtype=torch.float64)


def padded(batch: list[Row]) -> Tensor:
    """Token ids [rows, T], padded on the right, where causal attention never looks back from."""
    ids = torch.zeros(len(batch), len(batch[0].tokens), dtype=torch.long)
    for i, row in enumerate(batch):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
    return ids


def _answers(head: Head, hidden: Tensor, batch: list[Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """From the last hidden states [rows, T, h] of a batch; log-probabilities in max(fp32, dtype), a chunk at a time."""
    line_of: dict[tuple[int, int], int] = {}  # (row, position) -> line of `scored`
    asked = [(number, continuation, j, row) for j, row in enumerate(batch) for number, continuation in row.requests]
    lines, labels = [], []  # of every token of every continuation; the position before a token predicts it
    for _, continuation, j, row in asked:
        first = len(row.tokens) - len(continuation)
        lines += [line_of.setdefault((j, first + t), len(line_of)) for t in range(len(continuation))]
        labels += continuation
    line, label = torch.tensor(lines, device=hidden.device), torch.tensor(labels, device=hidden.device)
    at = torch.tensor(list(line_of), device=hidden.device)
    scored = hidden[at[:, 0], at[:, 1]]  # [positions, h]
    wide = accumulation_dtype(hidden.dtype)
    value = torch.empty(len(lines), dtype=wide, device=hidden.device)
    hit = torch.empty(len(lines), dtype=torch.bool, device=hidden.device)
    step = max(1, LOGITS_AT_ONCE // len(head.weight))
    for low in range(0, len(scored), step):
        log_p = head.logits(scored[low : low + step]).to(wide).log_softmax(-1)  # [chunk, vocab]
        here = (line >= low) & (line < low + step)
        value[here] = log_p[line[here] - low, label[here]]
        hit[here] = log_p.argmax(-1)[line[here] - low] == label[here]
    lengths = [len(continuation) for _, continuation, _, _ in asked]
    parts = zip(asked, value.cpu().split(lengths), hit.cpu().split(lengths), strict=True)
    yield from ((number, (float(v.sum()), bool(h.all()))) for (number, *_), v, h in parts)
