"""JSON that is read back: files that cannot be parsed are reported, and rows of figures carry a checksum of their content.

The checksum is one more entry of a row, so that files stay plain JSON for every other reader. Rows without one were written by
version 0.1 or by somebody else; whoever reads them checks that their entries make sense.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_spin.storage.atomic import parse_json
from dist_spin.storage.tensor_file import CorruptFile

CHECKSUM = "checksum"  # the entry of a row that holds it
LARGEST_INTEGER = 2**53  # what every JSON reader takes as it is; what we write stays far below


def read_json(path: Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        CorruptFile: it cannot be read, is torn, empty or not UTF-8, or is no JSON.
    """
    try:
        return parse_json(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CorruptFile(f"{path}: cannot be read ({reason})") from error


def add_checksum(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the checksum of all its entries."""
    content = {key: value for key, value in row.items() if key != CHECKSUM}
    return {**content, CHECKSUM: _checksum(content)}


def remove_checksum(row: Any, makes_sense: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A row as it was before `add_checksum`.

    Args:
        makes_sense: whether a row that carries no checksum may be taken as it is.

    Raises:
        ValueError: it is no row, its checksum does not match, or it carries none and makes no sense.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row is a {type(row).__name__}")
    content = {key: value for key, value in row.items() if key != CHECKSUM}
    if CHECKSUM not in row:
        if not makes_sense(content):
            raise ValueError("a row lacks figures or holds impossible ones")
    elif row[CHECKSUM] != _checksum(content):
        raise ValueError("the checksum of a row does not match")
    return content


def _checksum(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]


# What an entry may be. Each takes any value, None where the entry is missing.

Kind = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether it is an integer from 0 up to what JSON readers agree on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INTEGER


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    if isinstance(value, bool):
        return False
    return is_count(abs(value)) if isinstance(value, int) else isinstance(value, float) and math.isfinite(value)


def is_duration(value: Any) -> bool:
    """Whether it is a number of seconds that a clock may show, also since 1970."""
    return is_number(value) and 0 <= value < 1e11


def is_mapping(value: Any) -> bool:
    """Whether it is a JSON object."""
    return isinstance(value, dict)


def list_of(kind: Kind) -> Kind:
    """A check for lists whose items are all of a kind."""
    return lambda value: isinstance(value, list) and all(map(kind, value))


def optional(kind: Kind) -> Kind:
    """A check for entries that may be missing or null."""
    return lambda value: value is None or kind(value)


def has_entries(row: Mapping[str, Any], kinds: Mapping[str, Kind]) -> bool:
    """Whether each named entry of a row is of its kind; a row may have others."""
    return all(kind(row.get(name)) for name, kind in kinds.items())
