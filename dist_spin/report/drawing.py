"""One figure of a report."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    section: where in the report it stands (`page.SECTIONS`). words: what it shows, as a caption and for who does not see it.
    folded: shown only when it is asked for.
    """

    name: str
    section: str
    title: str
    words: str
    draw: Callable[[], Figure]
    folded: bool = False
