"""Checks that several groups of settings share, and the upper limits of numbers.

Every check raises UserError with the setting, its value and a remedy. A range is written as what is right, `low <= x <= high`,
so that NaN never passes.
"""

import difflib
import unicodedata
from collections.abc import Sequence

from dist_spin.errors import UserError

# Limits far above any sensible value, so that a slip of the keyboard is refused at once instead of filling the memory.
MAX_SEED = 2**63 - 1  # generators take 64 bits, and a few add the number of an epoch
MAX_COUNT = 2**31 - 1  # of steps, sequences, items, layers: where a large number does no harm
MAX_BATCH = 65_536  # sequences of one step
MAX_CHANNELS = 2**20  # twenty times the widest linear layer of today's models
MAX_SEQ_LEN = 2**24  # tokens; the longest contexts of today's models are 10 million
MAX_TOKENS = 2**31  # that are held in memory at once, 16 GiB of int64
MAX_THREADS = 1024  # of one process; the OpenMP runtime dies where threads cannot be created
MAX_LOCAL_PROCESSES = 1024  # that one machine starts
FP32_TINY, FP32_MAX = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # of normal numbers; learning computes in fp32

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
NAMED_SOURCES = ("pydoc", "wikitext2", "c4")
SELF = "self"  # text that the model writes, to learn or calibrate from
TASKS = (
    "boolq",
    "piqa",
    "siqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "lambada_openai",
)


def shown(value: object) -> str:
    """A value for a message of one line: its repr, the middle left out where it is long."""
    return _shortened(repr(value), 120)


def one_line(text: str) -> str:
    """A path for a message: as it is, or its repr where a line break or control character would tear the line."""
    return _shortened(text if text.isprintable() else repr(text), 400)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 3 :]}"


def require(correct: bool, key: str, value: object, remedy: str) -> None:  # noqa: FBT001 (a condition, as of assert)
    """Raise UserError, naming the setting `key` and its value, unless `correct`."""
    if not correct:
        raise UserError(f"{key} is {shown(value)}", remedy)


def check_range(key: str, value: float, low: float, high: float, remedy: str) -> None:
    """Check that `low <= value <= high`; `remedy` is said of values that are too small, or no number.

    Raises:
        UserError: the value is outside.
    """
    most = f"{high}" if isinstance(high, int) else f"{high:.4g}"
    require(low <= value <= high, key, value, f"use at most {most}" if value > high else remedy)


def check_positive(key: str, value: float, remedy: str) -> None:
    """Check that a number is above 0 in fp32, which would round smaller ones to 0, and finite in it."""
    check_range(key, value, FP32_TINY, FP32_MAX, remedy)


def check_unique(key: str, values: Sequence[str] | Sequence[int], remedy: str) -> None:
    """Check that no value stands twice in a list."""
    require(len(set(values)) == len(values), key, values, remedy)


def check_text(key: str, text: str) -> None:
    """Check that a text has no NUL, newline or other control character and can be written as UTF-8."""
    clean = not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
    require(clean, key, text, "write it in UTF-8, without control characters or line breaks")


def check_path(key: str, path: str | None) -> None:
    """Check that a path (or hub id) can be one: text as `check_text` wants it, not longer than file systems take."""
    if path is None:
        return
    check_text(key, path)
    short = len(path.encode()) < 4096 and all(len(part.encode()) <= 255 for part in path.split("/"))
    require(short, key, path, "use a shorter path: 4095 bytes, and 255 for each part of it")


def check_source(key: str, source: str) -> None:
    """Check the form of a text source; whether it can be read is known only when `dist_spin.data` reads it.

    Raises:
        UserError: `source` is neither a known name nor `hf:…`, `text:…` or `tokens:….npy`.
    """
    check_text(key, source)
    kind, _, rest = source.partition(":")
    if source in (*NAMED_SOURCES, SELF) or (kind in ("hf", "text") and rest):
        return
    if kind == "tokens" and rest.removesuffix("#all").endswith(".npy"):
        return
    close = difflib.get_close_matches(source, NAMED_SOURCES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    choices = f"{', '.join(NAMED_SOURCES)}, self, hf:NAME, text:PATH or tokens:PATH.npy"
    raise UserError(f"{key} is {shown(source)}, which is no text source", f"{hint}use {choices}")
