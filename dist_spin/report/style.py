"""How figures look: one drawing for light and dark, and colours that colour-blind readers tell apart.

Axes and text are drawn in a colour that stands for "whatever the page writes in"; as SVG it becomes `currentColor`. Series
have colours of the Okabe-Ito palette with 3:1 contrast on white and on near-black, and differ in line and marker besides.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK = "#010203"  # stands for currentColor; no series has it
PAPER = {"light": ("#1f2328", "#ffffff"), "dark": ("#e6e6e6", "#14161a")}  # ink and background of PNG files

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito 2008
# Variant or series -> colour, line, marker.
STYLES: dict[str, tuple[str, Any, str]] = {
    "none": (VERMILLION, "--", "x"),
    "hadamard": (BLUE, "-.", "s"),
    "orthogonal": (PURPLE, ":", "^"),
    "learned": (GREEN, "-", "o"),
    "R1": (BLUE, "-", "o"),
    "R2": (VERMILLION, "--", "s"),
}
NAMES = {
    "none": "no rotation",
    "hadamard": "random Hadamard",
    "orthogonal": "random orthogonal",
    "learned": "learned",
}
WIDTH, HEIGHT = 3.75, 2.7  # inches: 360 x 259 CSS pixels, which a phone shows without shrinking
NARROW = 4.0  # ratio of largest to smallest below which an axis stays linear
COLOUR_MAP = "cividis"  # even in lightness, made for colour-blind readers

SETTINGS: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.family": "sans-serif",
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dist_spin",  # the same figure, the same file
    "image.composite_image": False,
}


def ink() -> str:
    """The neutral colour of the drawing at hand."""
    return mpl.rcParams["text.color"]


def style_of(name: str) -> dict[str, Any]:
    """Colour, line and marker of a series; one that is not known is drawn in the neutral colour."""
    colour, line, marker = STYLES.get(name, (ink(), (0, (3, 1, 1, 1)), "d"))
    return {"color": colour, "linestyle": line, "marker": marker}


@contextmanager
def drawing(neutral: str = INK) -> Iterator[None]:
    """Inside, figures are made with our settings and with `neutral` for axes and text."""
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    colours: dict[Any, Any] = dict.fromkeys(parts, neutral)
    grounds: dict[Any, Any] = dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none")
    with mpl.rc_context({**SETTINGS, **colours, **grounds, "grid.color": neutral}):
        yield


def one_axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes and a faint grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def whole_numbers(axes: Axes) -> None:
    """Steps and layers have no halves."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis labelled in plain numbers; left linear where the values hardly differ or reach 0."""
    low, high = axes.get_ylim()
    if axes.dataLim.ymin <= 0 or high < NARROW * max(low, axes.dataLim.ymin):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 500 else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number in few characters: 0.012, 3.4, 560, 12k, 3e-7."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    if 999.5 <= abs(value) < 999.5e3:
        return f"{value / 1e3:.3g}k"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def markers_every(points: int, series: int = 0) -> tuple[int, int]:
    """(first, step) of the points that carry a marker; `series` numbers the curves, so that markers of equal ones stand apart."""
    step = max(1, points // 8)
    return (series * step // 3, step)


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """The series' names above the axes, if there are any."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside upper left", ncols=columns, frameon=False, handlelength=2.4, borderaxespad=0.2
        )


def as_svg(draw: Callable[[], Figure], title: str, *, standalone: bool = False) -> str:
    """An `<svg>` element with transparent ground that takes its neutral colour from the page, or its own where it is a file.

    title: what a reader hears who does not see it.
    """
    from xml.sax.saxutils import escape, quoteattr

    stream = io.StringIO()
    with drawing():
        draw().savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    head, rest = text.split(">", 1)
    head = head.replace("<svg", f'<svg role="img" aria-label={quoteattr(title)}')
    own = ""
    if standalone:
        (light, paper), (dark, night) = PAPER["light"], PAPER["dark"]
        own = (
            f"<style>svg{{color:{light};background:{paper}}}"
            f"@media (prefers-color-scheme:dark){{svg{{color:{dark};background:{night}}}}}</style>"
        )
    return f"{head}><title>{escape(title)}</title>{own}{rest}"


def as_png(draw: Callable[[], Figure], theme: str = "light", dpi: int = 200) -> bytes:
    """A PNG file with its own ground: "light" or "dark"."""
    neutral, paper = PAPER[theme]
    stream = io.BytesIO()
    with drawing(neutral):
        draw().savefig(stream, format="png", dpi=dpi, facecolor=paper)
    return stream.getvalue()


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    section: where in the report it stands (`page.SECTIONS`). caption: what it shows, also for who does not see it.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[], Figure]
