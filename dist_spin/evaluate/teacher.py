"""The full-precision model, which every other one is compared with: its final hidden states, kept for each text.

Hidden states are kept instead of logits, which are vocab / h times as large and cost one product with lm_head to make again. They
wait in the host's memory, or in a file of the run's directory where that has no room; the file has no name, so that nothing
is left of it whatever ends the process.
"""

import functools
import itertools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.evaluate.windows import final_states, mean_losses
from dist_spin.model.architecture import norm_eps
from dist_spin.model.rotated_weights import Head
from dist_spin.model.weights import ModelFiles
from dist_spin.runtime.distributed import World, raise_on_any_failure
from dist_spin.runtime.host_memory import host_bytes_free
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.atomic import user_error
from dist_spin.storage.run_directory import run_dir

HOST_SHARE = 0.25  # of the host's free memory, shared by its ranks


class Teacher:
    """The full-precision model of a run, and what it makes of each text.

    Ranks call the methods together; each has the states of its own windows (`windows.final_states`).
    """

    def __init__(
        self, config: RunConfig, world: World, files: ModelFiles, target: EvalTarget, stop: StopRequest | None
    ) -> None:
        self._parts = (config, world, files, target)
        self._world, self._stop, self._run = world, stop, run_dir(config)
        self._states: dict[str, KeptStates] = {}

    def head(self) -> Head:
        """Its final norm and lm_head; not kept here, since the device's memory is wanted between two measurements."""
        _, _, files, target = self._parts
        return target.variant.weights.head(norm_eps(files.config), None)

    def losses(self, texts: dict[str, Tensor], what: str) -> list[Tensor]:
        """Mean next-token cross entropy of every window of each text [n, T], fp64 [n]; keeps their hidden states.

        Raises:
            Interrupted, NumericsError: as `final_states`.
            UserError: neither memory nor disk has room for the states.
        """
        config, world, files, target = self._parts
        jobs = [(target.variant.sites, tokens) for tokens in texts.values()]
        head, finals = final_states(config, world, files, target, jobs, what, self._stop)
        out = []
        for (source, tokens), final in zip(texts.items(), finals, strict=True):
            out.append(mean_losses(head, final, len(tokens), world))
            raise_on_any_failure(functools.partial(self._keep, source, final.hidden))
        return out

    def states(self, texts: dict[str, Tensor]) -> list["KeptStates"]:
        """The states of each text; those that are not kept yet are computed first."""
        if new := {source: tokens for source, tokens in texts.items() if source not in self._states}:
            self.losses(new, f"full precision on {', '.join(new)}, to compare with")
        return [self._states[source] for source in texts]

    def forget(self, source: str) -> None:
        """Free the states of a text."""
        self._states.pop(source, None)

    def _keep(self, source: str, hidden: list[Tensor]) -> None:
        room = host_bytes_free() * HOST_SHARE / self._world.local_size
        fits = sum(part.nbytes for part in hidden) <= room
        self._states[source] = KeptStates(hidden, None if fits else self._run.path)


class KeptStates:
    """Batches of hidden states [batch, T, h] that wait on the CPU, or in a file without a name."""

    def __init__(self, hidden: list[Tensor], directory: Path | None) -> None:
        """directory: where the file lies; None keeps them in memory. Raises UserError if it cannot be written."""
        self._in_memory, self._file = [], None
        if directory is None:
            self._in_memory = [part.cpu() for part in hidden]
            return
        self._like = [torch.empty_like(part, device="meta") for part in hidden]
        self._starts = [0, *itertools.accumulate(part.nbytes for part in hidden)]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed with this object)
            for part in hidden:
                left = _bytes(part.cpu().contiguous())
                while left:  # one call writes 2 GiB at most
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise user_error(error, directory) from error

    def load(self, index: int) -> Tensor:
        """One batch, on the CPU."""
        if self._file is None:
            return self._in_memory[index]
        out = torch.empty_like(self._like[index], device="cpu")
        self._file.seek(self._starts[index])
        left = _bytes(out)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise UserError("hidden states on disk end early", "see whether its disk is sound, and start again")
            left = left[count:]
        return out


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data
