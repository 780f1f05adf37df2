"""Errors a user can cause, and the exit codes that scripts and schedulers may rely on.

Every error here is reported by `dist_spin.cli` as one line (what is wrong, where, what to do) without a traceback.
A traceback therefore always means a bug of ours.
"""

import re

SHORT_TEXT = 600  # characters of an error that stands for several

EXIT_OK = 0
EXIT_BUG = 1  # an uncaught exception: ours to fix
EXIT_USER = 2  # wrong configuration, input or environment: the line printed says what to change
EXIT_NUMERICS = 3  # NaN or infinite loss or weights: the last good checkpoint is kept
EXIT_HANG = 4  # a collective timed out: another rank died or hangs; start again to resume
EXIT_MEMORY = 5  # a GPU ran out of memory: settings that take less, or another moment where others use it too
EXIT_SERVED_OTHERWISE = 6  # serve-check: an engine does not load an export, or computes something else of it
EXIT_ABORTED = 130  # ended at once by ctrl-C: what was saved before is kept, and the same command continues
EXIT_INTERRUPTED = 75  # stopped by a signal after saving (EX_TEMPFAIL): the same command continues
EXIT_PIPE = 141  # whoever read our output has left (`| head`): 128 + SIGPIPE, as a shell says of its own tools


class UserError(Exception):
    """Something the user can put right. `exit_code` is what the process returns."""

    exit_code = EXIT_USER
    shared = False  # every rank raises it alike, so that rank 0 speaks for all

    def __init__(self, problem: str, remedy: str = "", *, shared: bool = False) -> None:
        """`problem` says what is wrong and where; `remedy` says what to do about it. shared: see the class."""
        self.problem, self.remedy = problem, remedy
        if shared:
            self.shared = True
        super().__init__(f"{problem}; {remedy}" if remedy else problem)

    def as_shared(self) -> "UserError":
        """The same mistake as one that every rank raises alike."""
        return type(self)(self.problem, self.remedy, shared=True).with_traceback(self.__traceback__)

    def lines(self) -> list[str]:
        """What is printed: a line for each mistake."""
        return [str(self)]


class Mistakes(UserError):
    """Several mistakes that were found together, such as those of one configuration; each is a line of its own."""

    def __init__(self, mistakes: "list[UserError]", *, shared: bool = False) -> None:
        """mistakes: at least one."""
        self.mistakes = mistakes
        shown = [str(mistakes[0])]
        for mistake in mistakes[1:]:
            if sum(map(len, shown)) + len(str(mistake)) < SHORT_TEXT:
                shown.append(str(mistake))
        left = len(mistakes) - len(shown)
        more = f" | {left} more mistake{'s' * (left > 1)}" if left else ""
        super().__init__(" | ".join(shown) + more, "", shared=shared)
        self.remedy = mistakes[0].remedy

    def as_shared(self) -> "Mistakes":
        """As of one mistake."""
        return Mistakes(self.mistakes, shared=True).with_traceback(self.__traceback__)

    def lines(self) -> list[str]:
        """A line for each mistake."""
        return [line for mistake in self.mistakes for line in mistake.lines()]


class NumericsError(UserError):
    """The computation left the finite numbers; nothing that was saved before is touched."""

    exit_code = EXIT_NUMERICS
    shared = True


class DamagedWeights(UserError):
    """The model's own weights hold NaN or infinity; under several ranks only those that read them know."""

    exit_code = EXIT_NUMERICS


class Interrupted(UserError):
    """A signal asked us to stop; the state is saved and the same command continues."""

    exit_code = EXIT_INTERRUPTED
    shared = True


class RankLost(UserError):
    """Another rank did not answer in time, or its connection broke; the process group cannot be used any more."""

    exit_code = EXIT_HANG


class RankFailed(UserError):
    """Another rank met a bug of ours and shows its traceback; this one has nothing to add."""

    exit_code = EXIT_BUG
    shared = True


class OutOfMemory(UserError):
    """A GPU is full; a fan-out tries the job again, since its own jobs may share one."""

    exit_code = EXIT_MEMORY


class NotServed(UserError):
    """A serving engine does not load an export, or computes something else of it."""

    exit_code = EXIT_SERVED_OTHERWISE


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """The line for a GPU that ran out of memory; None where `error` is something else."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's, by its name: this module needs no torch
        return None
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return OutOfMemory(
        "a GPU ran out of memory" + (f" when {asked[1]} more were needed" if asked else ""),
        "end other programs on it, or use more GPUs; learning takes less with optimize.micro_batch_size=1, "
        "optimize.recompute=layer or a larger distributed.offload_layers",
    )
