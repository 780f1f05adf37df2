"""Checks that several groups of settings share."""

import difflib
import re
from collections.abc import Callable
from typing import Any

from dist_spin.errors import UserError

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


def _check(config: object, names: str, wanted: Callable[[Any], bool], remedy: str) -> None:
    """Raise UserError unless every named field is `wanted`, said as what is right so that NaN never passes."""
    group = type(config).__name__.removesuffix("Config").lower()
    for name in names.split():
        value = getattr(config, name)
        if not wanted(value):
            key = name if group == "run" else f"{group}.{name}"
            raise UserError(f"{key} is {value!r}", remedy)


def check_source(key: str, source: str) -> None:
    """Check the form of a text source; whether it can be read is known only when `dist_spin.data` reads it.

    Raises:
        UserError: `source` is neither a known name nor `hf:…`, `text:…` or `tokens:….npy`.
    """
    kind, _, rest = source.partition(":")
    if source in (*NAMED_SOURCES, SELF) or (kind in ("hf", "text") and rest):
        return
    if kind == "tokens" and rest.removesuffix("#all").endswith(".npy"):
        return
    close = difflib.get_close_matches(source, NAMED_SOURCES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    choices = f"{', '.join(NAMED_SOURCES)}, self, hf:NAME, text:PATH or tokens:PATH.npy"
    raise UserError(f"{key} is {source!r}, which is no text source", f"{hint}use {choices}")


def parse_bits(text: str) -> tuple[int, int, int] | None:
    """Bits of weights, activations, and of keys and values, of a text such as W4A4KV4; None if it is no such text."""
    found = re.fullmatch(r"W(\d+)A(\d+)(?:KV(\d+))?", text)
    if found is None:
        return None
    w, a, kv = (int(group or 16) for group in found.groups())
    return (w, a, kv) if {w, a, kv} <= set(BITS) else None
