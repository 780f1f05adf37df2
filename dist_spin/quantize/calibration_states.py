"""The pass that stores the hidden states entering the first layer of each job, and the way back in.

    dist-spin quantize CONFIG.yaml --hidden-states quantize.layers_per_job=10

A 16-bit network is run layer by layer (`states_network`), so a job sees the rounding errors of its own layers only. A job
whose hidden states are missing or damaged computes them itself, so every job can be started alone.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from dist_spin.errors import Interrupted, UserError
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.quantize.background_writer import BackgroundWriter
from dist_spin.quantize.states_network import StatesNetwork
from dist_spin.runtime.distributed import (
    World,
    any_rank,
    gather_parts,
    made_on_all,
    on_rank0,
    raise_on_any_failure,
    taken_together,
)
from dist_spin.runtime.prefetch import prefetched
from dist_spin.runtime.progress import Progress, say
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.hidden_states import HiddenStateFiles

TOKENS_AT_ONCE = 8192  # that go through a layer together on a GPU
SAVED_AT_ONCE = 4  # chunks: a thread alone copies and writes them at about 1 GB/s


def sequences_at_once(length: int, device: torch.device) -> int:
    """Sequences of `length` tokens that go through a layer together: several on a GPU, which would wait for Python otherwise."""
    return max(1, TOKENS_AT_ONCE // length) if device.type == "cuda" else 1


class CalibrationStates:
    """Hidden states of one variant at any layer. Every method is called by all ranks together."""

    def __init__(
        self,
        stored: HiddenStateFiles,
        network: StatesNetwork,
        weights: RotatedWeights,
        tokens: Tensor,
        world: World,
        stop: StopRequest,
        note: Callable[[int], None],
        handed: dict[int, list[Tensor]],
    ) -> None:
        """network: computes what is stored. weights: the variant's, for what enters the first layer. tokens: [n, T]. note:
        told of every layer whose states are complete, by rank 0. handed: what `make` hands to this rank, by layer.
        """
        self.stored, self.network, self.weights, self.tokens = stored, network, weights, tokens
        self.world, self.stop, self.note, self.handed = world, stop, note, handed
        self._unfinished: tuple[BackgroundWriter, int] | None = None

    def entering(self, layer: int) -> list[Tensor]:
        """What enters `layer` on the device: every size-th sequence, from this rank's number on, in batches [b, T, h].

        Raises:
            Interrupted: a signal came while they were made.
            UserError: no room for them, or they cannot be read back.
        """
        mine = range(self.world.rank, len(self.tokens), self.world.size)
        if layer == 0:
            return made_on_all(lambda: self._embedded(self.weights, list(mine)))
        hidden = self.handed.pop(layer, None) if self.world.size == 1 else None
        hidden = hidden or self._loaded(layer, mine)
        if hidden is None:
            self.make([layer])
            hidden = self._loaded(layer, mine)
        if hidden is None:
            raise UserError(f"{self.stored.directory} does not give back what was written", "check the disk")
        return [self.network.rotated(h) for h in hidden]

    def make(
        self,
        layers: list[int],
        begins: Mapping[int, int] | None = None,
        writers: contextlib.ExitStack | None = None,
    ) -> None:
        """Store what enters each of `layers`, except where it is there; chunks are shared out over ranks.

        begins: of a layer, the rank that will go on from it alone: it is handed all sequences as soon as they are made.
        writers: given, the last of `layers` is still being written on return; `finish` waits for it, before the stack is closed.

        Raises:
            Interrupted: a signal came; finished layers are kept.
            UserError: the disk has no room for them.
        """
        missing = on_rank0(lambda: [layer for layer in sorted(layers) if layer and not self.stored.present(layer)])
        if not missing:
            return
        on_rank0(lambda: self._prepare_disk(missing))
        start, hidden = self._nearest(missing[0])
        network, end = self.network, missing[-1]
        progress = Progress("hidden states: layer", end, start, show=self.world.is_rank0)

        def build(index: int) -> nn.Module:
            return network.runner.build(index, network.weights.layer(index))

        modules = prefetched(build, range(start, end), self.world.device)
        with contextlib.ExitStack() as own, contextlib.closing(modules):
            writer = (own if writers is None else writers).enter_context(BackgroundWriter(self.world.device))
            written = 0
            for index, module in enumerate(taken_together(modules), start):
                hidden = made_on_all(functools.partial(self._through, module, index, hidden))
                del module  # its memory is free for the next but one
                if index + 1 in missing:
                    if begins and index + 1 in begins:
                        self._hand_over(index + 1, begins[index + 1], hidden)
                    self._finish(writer, written)
                    written = index + 1
                    writer.start(functools.partial(self._save, written, hidden))
                progress.advance()
                if index + 1 < end and any_rank(bool(self.stop)):
                    self._finish(writer, written)
                    raise Interrupted(f"stopped by a signal before layer {index + 1}", "the same command continues")
            self._unfinished = writer, written
            if writers is None:
                self.finish()

    def finish(self) -> None:
        """Wait until every rank has written what `make` has made; every rank calls it."""
        if self._unfinished is not None:
            (writer, layer), self._unfinished = self._unfinished, None
            self._finish(writer, layer)

    def _hand_over(self, layer: int, rank: int, hidden: dict[int, list[Tensor]]) -> None:
        """Put all sequences that enter `layer` into `handed` of one rank; `hidden`: this rank's chunks of them."""
        chunks, world = self.stored.chunks(), self.world
        largest = (len(chunks[0]), self.tokens.shape[1], self.stored.hidden)

        def padded(states: list[Tensor]) -> Tensor:
            whole = torch.zeros(largest, dtype=self.stored.dtype, device=world.device)
            if states:
                whole[: len(states)] = torch.cat(states)
            return whole.view(torch.uint8)  # which every backend sends

        received: list[Tensor] = []
        for first in range(0, len(chunks), world.size):
            own = made_on_all(functools.partial(padded, hidden.get(first + world.rank, [])))
            parts = gather_parts(own)
            if rank == world.rank:
                for chunk, part in zip(chunks[first : first + world.size], parts, strict=False):
                    received += self._split(part.view(self.stored.dtype)[: len(chunk)])
        if rank == world.rank:
            self.handed[layer] = received

    def _through(self, module: nn.Module, index: int, hidden: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
        return {c: [self.network.runner.run(module, index, h) for h in states] for c, states in hidden.items()}

    def _prepare_disk(self, missing: list[int]) -> None:
        outdated = [str(layer) for layer in missing if self.stored.outdated(layer)]
        if outdated:
            say(
                f"hidden states at layers {', '.join(outdated)} belong to other settings or another version: made again"
            )
        self.stored.check_space(missing, say)

    def _save(self, layer: int, hidden: dict[int, list[Tensor]]) -> None:
        stream = torch.cuda.current_stream(self.world.device) if self.world.device.type == "cuda" else None

        def save(chunk: int) -> None:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):  # a thread has its own
                self.stored.save(layer, chunk, torch.cat(hidden[chunk]))

        with ThreadPoolExecutor(SAVED_AT_ONCE, "states") as threads:
            list(threads.map(save, hidden))

    def _finish(self, writer: BackgroundWriter, layer: int) -> None:
        """Wait until every rank has written what enters `layer`; 0 if nothing was begun."""
        raise_on_any_failure(writer.finish)
        if layer and self.world.is_rank0:
            self.note(layer)

    def _nearest(self, below: int) -> tuple[int, dict[int, list[Tensor]]]:
        """The last layer before `below` whose states are stored and whole, with this rank's chunks of them."""
        numbers = range(self.world.rank, len(self.stored.chunks()), self.world.size)
        for layer in on_rank0(lambda: [i for i in range(below - 1, 0, -1) if self.stored.present(i)]):
            parts = made_on_all(functools.partial(self._parts, layer, numbers))
            if not any_rank(any(part is None for part in parts.values())):
                return layer, {c: self._split(part) for c, part in parts.items() if part is not None}
        chunks = self.stored.chunks()
        return 0, made_on_all(lambda: {c: self._embedded(self.network.weights, list(chunks[c])) for c in numbers})

    def _parts(self, layer: int, numbers: range) -> dict[int, Tensor | None]:
        return {c: self.stored.load(layer, c, say, self.world.device) for c in numbers}

    def _loaded(self, layer: int, wanted: range) -> list[Tensor] | None:
        """The wanted sequences, or None on every rank if one of them misses a chunk."""
        found = made_on_all(lambda: self._own_loaded(layer, wanted))
        return None if any_rank(found is None) else found

    def _own_loaded(self, layer: int, wanted: range) -> list[Tensor] | None:
        out: list[Tensor] = []
        complete = True
        for number, chunk in enumerate(self.stored.chunks()):
            rows = [i - chunk.start for i in chunk if i in wanted]
            part = self.stored.load(layer, number, say, self.world.device) if rows and complete else None
            if part is not None:
                out += self._split(part[rows])
            complete = complete and (part is not None or not rows)
        return out if complete else None

    def _split(self, part: Tensor) -> list[Tensor]:
        return list(part.split(sequences_at_once(self.tokens.shape[1], self.world.device)))

    def _embedded(self, weights: RotatedWeights, sequences: list[int]) -> list[Tensor]:
        embedding = weights.embedding()
        if not sequences:
            return []
        batches = self.tokens[sequences].split(sequences_at_once(self.tokens.shape[1], self.world.device))
        return [weights.embedded(ids, embedding) for ids in batches]
