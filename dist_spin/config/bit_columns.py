"""Names of bit widths and number formats as tables have them: W4A4KV4, W4A4-nvfp4, W4A16-mxfp4, W8A8-fp8, W4A4-mxfp4-KV8-fp8.

A format follows what it holds for; what has none is int, and 16 bits have none. KV is left out where it has 16 bits and a format
is named.
"""

import re

from dist_spin.config.checks import BITS
from dist_spin.numerics.formats import FORMATS

Widths = tuple[int, int, int]  # of weights, activations, and keys and values
Formats = tuple[str, str, str]
INTS: Formats = ("int", "int", "int")


def parse_column(text: str) -> tuple[Widths, Formats] | None:
    """Bits and formats of weights, activations, KV; None if it is no such text, or a format has other bits."""
    formats = {"W": "int", "A": "int", "KV": "int"}
    waiting: list[str] = []
    plain = ""
    for part in text.split("-"):
        if part in FORMATS and waiting:
            formats |= dict.fromkeys(waiting, part)
            waiting = []
            continue
        if not part:
            return None
        plain += part
        waiting = re.findall("[A-Z]+", part)
    found = re.fullmatch(r"W(\d+)A(\d+)(?:KV(\d+))?", plain)
    if found is None:
        return None
    w, a, kv = (int(group or 16) for group in found.groups())
    names = [name if bits < 16 else "int" for name, bits in zip(formats.values(), (w, a, kv), strict=True)]
    fits = all(name == "int" or FORMATS[name].bits == bits for name, bits in zip(names, (w, a, kv), strict=True))
    return ((w, a, kv), (names[0], names[1], names[2])) if fits and {w, a, kv} <= set(BITS) else None


def parse_bits(text: str) -> Widths | None:
    """The bits of `parse_column`."""
    column = parse_column(text)
    return None if column is None else column[0]


def column_name(widths: dict[str, int], formats: dict[str, str]) -> str:
    """The name of bits by W, A, K, V and formats by W, A, KV."""
    k, v = widths["K"], widths["V"]
    items = [(f"W{widths['W']}", widths["W"], formats["W"]), (f"A{widths['A']}", widths["A"], formats["A"])]
    items.append((f"KV{k}" if k == v else f"K{k}V{v}", min(k, v), formats["KV"]))
    if all(name == "int" or bits == 16 for _, bits, name in items):
        return "".join(text for text, _, _ in items)
    groups: list[tuple[str, str]] = []  # text, format; "" until something of less than 16 bits decides it
    for text, bits, name in items[:2] if k == v == 16 else items:
        kind = name if bits < 16 else ""
        before = groups[-1] if groups else ("", "")
        if groups and (not kind or before[1] in ("", kind)):
            groups[-1] = (before[0] + text, before[1] or kind)
        else:
            groups.append((text, kind))
    return "-".join(text if kind in ("", "int") else f"{text}-{kind}" for text, kind in groups)
