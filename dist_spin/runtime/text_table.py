"""Plain text tables."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words, all of one length, as lines of left-aligned columns."""
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines]
