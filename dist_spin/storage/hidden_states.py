"""Hidden states on disk, at the layers where jobs begin, so that jobs need not wait for one another.

boundaries/LLL/CCCC.safetensors holds chunk C of the calibration sequences as they enter layer L. Each file appears whole or
not at all, with a checksum and a fingerprint, so the pass that writes them may be killed and started again at any time.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.storage.tensor_file import load_if_current, load_tensors, read_metadata, save_tensors

CHUNK_BYTES = 2**28  # of hidden states in one file, which bounds what is in memory beside a process's own share
CHUNKS_WANTED = 16  # where sequences are short, so that several processes find work
FREE_SHARE = 0.95  # of the free disk that may be filled
WARN_SHARE = 0.5


@dataclass(frozen=True)
class HiddenStateFiles:
    """The stored hidden states of one variant: [sequences, T, hidden] in `dtype` for each layer asked for."""

    directory: Path
    fingerprint: str
    sequences: int
    tokens: int  # T, per sequence
    hidden: int
    dtype: torch.dtype

    @property
    def _sequence_bytes(self) -> int:
        return self.tokens * self.hidden * self.dtype.itemsize

    def chunks(self) -> list[range]:
        """The sequences of each file; they depend on the shapes alone, not on who writes."""
        size = max(1, min(CHUNK_BYTES // self._sequence_bytes, -(-self.sequences // CHUNKS_WANTED)))
        return [range(i, min(i + size, self.sequences)) for i in range(0, self.sequences, size)]

    def path(self, layer: int, chunk: int) -> Path:
        """The file of a chunk."""
        return self.directory / f"{layer:03d}" / f"{chunk:04d}.safetensors"

    def _metadata(self, layer: int, chunk: int) -> dict[str, str]:
        return {"fingerprint": self.fingerprint, "layer": str(layer), "chunk": str(chunk)}

    def save(self, layer: int, chunk: int, hidden: Tensor) -> None:
        """Write one chunk [n, T, hidden], atomically; the disk is not waited for, since a lost chunk can be made again."""
        save_tensors(self.path(layer, chunk), {"hidden": hidden}, self._metadata(layer, chunk), durable=False)

    def load(
        self, layer: int, chunk: int, warn: Callable[[str], None], device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """One chunk [n, T, hidden]; None if it is not there. One that cannot be used is set aside, saying so."""
        expected, load = self._metadata(layer, chunk), functools.partial(load_tensors, device=device)
        tensors = load_if_current(
            self.path(layer, chunk), load, lambda metadata: metadata == expected, "computing it again", warn
        )
        return None if tensors is None else tensors["hidden"]

    def present(self, layer: int) -> bool:
        """Whether every chunk is there and belongs here, by headers alone; contents are checked when they are loaded."""
        return all(
            read_metadata(self.path(layer, chunk)) == self._metadata(layer, chunk)
            for chunk in range(len(self.chunks()))
        )

    def outdated(self, layer: int) -> bool:
        """Whether a chunk is there that was made from something else."""
        paths = [(self.path(layer, chunk), self._metadata(layer, chunk)) for chunk in range(len(self.chunks()))]
        return any(path.exists() and read_metadata(path) != expected for path, expected in paths)

    def check_space(self, layers: list[int], warn: Callable[[str], None]) -> None:
        """Compare what `layers` will take with what the disk has.

        Raises:
            UserError: it does not fit.
        """
        wanted = len(layers) * self.sequences * self._sequence_bytes
        parent = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        size = (
            f"hidden states at {len(layers)} layers take {wanted / 1e9:.1f} GB; {parent} has {free / 1e9:.1f} GB free"
        )
        if wanted > FREE_SHARE * free:
            raise UserError(size, "set quantize.layers_per_job higher (0 needs none), or output_dir to a larger disk")
        if wanted > WARN_SHARE * free:
            warn(f"{size}; a higher quantize.layers_per_job takes less")

    def remove(self) -> None:
        """Delete them all; they are only needed until the layers are done."""
        shutil.rmtree(self.directory, ignore_errors=True)
