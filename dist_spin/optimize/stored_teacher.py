"""What the full-precision model predicts on the text that is learned from, stored, so that no step runs it again.

    RUN/teacher/000042.safetensors      of sequence 42: the most probable tokens of every position (`model.loss.Targets`)

Made in one pass before the first step, a file for each sequence that the steps take, which ranks share; kept over restarts, and
removed when learning is done. With 256 tokens a position takes 1.5 KB.
"""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from dist_spin.data import rank_share
from dist_spin.errors import UserError
from dist_spin.model.loss import Targets
from dist_spin.runtime.distributed import World, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import Progress, warn
from dist_spin.storage.tensor_file import CorruptFile, load_if_current, load_tensors, save_tensors

FREE_SHARE = 0.95  # of the free disk that may be filled


def entry_bytes(top_k: int, itemsize: int = 2) -> int:
    """Of one position: of each token its log-probability and its number in int32, and the probability of all others.

    itemsize: bytes of a number of the model. Those of 16 bits keep log-probabilities in fp16, and all others' in fp32.
    """
    return (itemsize + 4) * top_k + max(itemsize, 4)


class Predicts(Protocol):
    """The model that is learned on, as the teacher alone (`FakeQuantModel.forward`)."""

    def __call__(self, ids: Tensor, *, top_k: int) -> Tensor | Targets:
        """ids [batch, T] on the model's device to its most probable tokens."""


@dataclass(frozen=True)
class StoredTeacher:
    """Targets on disk. fingerprint: of what decides them. top_k: tokens of each position."""

    directory: Path
    fingerprint: str
    top_k: int

    def path(self, sequence: int) -> Path:
        """The file of a sequence of the learning text, by its number in it."""
        return self.directory / f"{sequence:06d}.safetensors"

    def _metadata(self, sequence: int) -> dict[str, str]:
        return {"fingerprint": self.fingerprint, "sequence": str(sequence)}

    def save(self, sequence: int, targets: Targets) -> None:
        """Write the targets of one sequence [1, T - 1, ...], atomically and with a checksum."""
        save_tensors(self.path(sequence), vars(targets), self._metadata(sequence))

    def missing(self, sequences: list[int]) -> list[int]:
        """Those that are not there whole; a file that cannot be used is set aside, saying so."""
        return [
            sequence
            for sequence in sequences
            if load_if_current(
                self.path(sequence),
                load_tensors,
                functools.partial(self._metadata(sequence).__eq__),
                "computing it again",
                warn,
            )
            is None
        ]

    def load(self, sequences: list[int]) -> list[Targets]:
        """The targets of some sequences, each [1, T - 1, ...] on the CPU.

        Raises:
            UserError: a file is damaged or gone since learning was started.
        """
        out = []
        for sequence in sequences:
            try:
                tensors, metadata = load_tensors(self.path(sequence))
            except CorruptFile as error:
                raise UserError(str(error), "start again: what is missing is computed again") from error
            if metadata != self._metadata(sequence):
                problem = f"{self.path(sequence)} was made from another model, text or setting"
                raise UserError(problem, "start again: what is missing is computed again")
            out.append(Targets(**tensors))
        return out

    def check_space(self, sequences: int, positions: int, itemsize: int) -> None:
        """Compare what so many more sequences will take with what the disk has. itemsize: as in `entry_bytes`.

        Raises:
            UserError: it does not fit.
        """
        wanted = sequences * positions * entry_bytes(self.top_k, itemsize)
        parent = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if wanted > FREE_SHARE * free:
            problem = f"the teacher's predictions take {wanted / 1e9:.1f} GB; {parent} has {free / 1e9:.1f} GB free"
            raise UserError(
                problem, "set optimize.teacher_top_k lower (0 stores nothing), or output_dir to a larger disk"
            )

    def remove(self) -> None:
        """Delete them all: steps alone read them."""
        shutil.rmtree(self.directory, ignore_errors=True)


def make_targets(
    teacher: StoredTeacher,
    model: Predicts,
    world: World,
    tokens: Tensor,
    sequences: list[int],
    micro: int,
    itemsize: int,
) -> None:
    """Store what the teacher predicts on those of `sequences` that are not stored yet; called by all ranks together.

    Every rank makes the same number of passes, since sharded layers are gathered by all.

    Args:
        tokens: the learning text [n, T] on the CPU. micro: sequences of one pass on one rank. itemsize: bytes of a
            number of the model.

    Raises:
        UserError: the disk has no room for them.
    """
    missing = on_rank0(lambda: teacher.missing(sequences))
    if not missing:
        return
    on_rank0(lambda: teacher.check_space(len(missing), tokens.shape[1] - 1, itemsize))
    passes = list(_passes(missing, world, micro))
    progress = Progress("store what full precision predicts: pass", len(passes), show=world.is_rank0)
    for batch, fresh in passes:
        with torch.no_grad():
            targets = cast(Targets, model(tokens[batch].to(world.device), top_k=teacher.top_k))
        raise_on_any_failure(functools.partial(_save, teacher, batch[:fresh], targets))
        progress.advance()


def _save(teacher: StoredTeacher, sequences: list[int], targets: Targets) -> None:
    for row, sequence in enumerate(sequences):
        teacher.save(sequence, Targets(*(tensor[row : row + 1] for tensor in vars(targets).values())))


def _passes(sequences: list[int], world: World, micro: int) -> Iterator[tuple[list[int], int]]:
    """This rank's share in passes of `micro` sequences, and how many of a pass are not repeated to fill it."""
    mine = rank_share(sequences, world.rank, world.size)
    count = -(-len(rank_share(sequences, 0, world.size)) // micro)
    for i in range(0, count * micro, micro):
        own = mine[i : i + micro]
        yield own + [sequences[0]] * (micro - len(own)), len(own)


def stacked(targets: list[Targets], device: torch.device) -> Targets:
    """The targets of several sequences as one batch on a device."""
    columns = zip(*(vars(one).values() for one in targets), strict=True)
    return Targets(*(torch.cat(column).to(device, non_blocking=True) for column in columns))
