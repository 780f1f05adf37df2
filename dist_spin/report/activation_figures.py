"""Figures of activations at the quantised sites: outliers by layer, magnitudes by channel and by token."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dist_spin.numerics.activations import SUMMARY
from dist_spin.report.run_summary import RunSummary, order
from dist_spin.report.style import (
    COLOUR_MAP,
    HEIGHT,
    NAMES,
    WIDTH,
    Drawing,
    ink,
    legend,
    logarithmic,
    markers_every,
    one_axes,
    short,
    style_of,
    whole_numbers,
)
from dist_spin.storage.activation_stats import SITES
from dist_spin.storage.run_directory import LEARNED

MEAN, LARGEST = SUMMARY.index("mean"), SUMMARY.index("max")
GAUSSIAN = 3.0  # kurtosis
DECADES = 4.0  # of magnitude that colours tell apart at most, from the largest down
DARKEST = 0.01  # share of the values below the colour scale

FIGURES = {"peak": "peak / RMS of a token", "kurtosis": "kurtosis of a token"}


def drawings(summary: RunSummary) -> Iterator[Drawing]:
    """Every figure of activations that can be drawn."""
    if not summary.activations:
        return
    variants = order(summary.activations)
    for figure, label in FIGURES.items():
        for site, title in SITES.items():
            values = {v: summary.activations[v][site][figure] for v in variants}
            caption = f"{label[0].upper()}{label[1:]}. " + _each(
                values, lambda x: f"mean {short(float(x[:, MEAN].mean()))}, largest {short(float(x[:, LARGEST].max()))}"
            )
            yield Drawing(f"{figure}-{_slug(site)}", figure, title, caption, _by_layer(values, label))
    for site, title in SITES.items():
        values = {v: summary.activations[v][site]["channels"] for v in variants}
        caption = "Largest magnitude of every channel in every layer. " + _each(values, _up_to)
        yield Drawing(f"channels-{_slug(site)}", "channels", title, caption, _channel_map(values))
    pair = dict.fromkeys([variants[0], LEARNED if LEARNED in variants else variants[-1]])
    for site, title in SITES.items():
        values = {v: summary.activations[v][site]["surface"] for v in pair}
        layers = min(map(len, values.values()))
        layer = int(summary.activations[variants[0]][site]["peak"][:layers, LARGEST].argmax())
        one_layer = {v: x[layer] for v, x in values.items()}
        caption = "Largest magnitude in the first sequence: " + _each(one_layer, lambda x: short(float(x.max())))
        yield Drawing(f"surface-{_slug(site)}", "surface", f"{title}, layer {layer}", caption, _surface(one_layer))
        caption = f"Magnitude by token (down) and channel (across), all {layers} layers."
        yield Drawing(f"surfaces-{_slug(site)}", "surfaces", title, caption, _all_surfaces(values))


def _each(values: dict[str, np.ndarray[Any, Any]], say: Callable[[np.ndarray[Any, Any]], str]) -> str:
    """A few words on every variant."""
    return "; ".join(f"{NAMES.get(variant, variant)}: {say(x)}" for variant, x in values.items()) + "."


def _up_to(x: np.ndarray[Any, Any]) -> str:
    return f"up to {short(float(x.max()))}"


def _slug(site: str) -> str:
    return site.replace("_", "-")


def _by_layer(values: dict[str, np.ndarray[Any, Any]], label: str) -> Callable[[], Figure]:
    """Mean over tokens as a line with markers, the largest token as a thin one."""

    def draw() -> Figure:
        figure, axes = one_axes()
        for number, (variant, x) in enumerate(values.items()):
            layers = np.arange(len(x))
            style, every = style_of(variant), markers_every(len(x), number)
            axes.plot(layers, x[:, MEAN], **style, markevery=every, label=NAMES.get(variant, variant))
            axes.plot(layers, x[:, LARGEST], **{**style, "marker": ""}, linewidth=0.7, alpha=0.8)
        gaussian = "kurtosis" in label
        if gaussian:
            axes.axhline(GAUSSIAN, color=ink(), linewidth=0.8, linestyle=":")
        axes.set_xlabel("layer (thin: the largest token" + "; dotted: Gaussian" * gaussian + ")")
        axes.set_ylabel(label)
        whole_numbers(axes)
        logarithmic(axes)
        legend(figure, axes)
        return figure

    return draw


def _scale(parts: Any) -> LogNorm:
    """One logarithmic colour scale for everything that is compared; the smallest hundredth shares its darkest colour."""
    values = np.concatenate([x.ravel() for x in parts])
    largest = float(values.max()) or 1.0
    smallest = max(float(np.quantile(values, DARKEST)), largest / 10**DECADES)
    return LogNorm(min(smallest, largest / 2), largest, clip=True)


def _channel_map(values: dict[str, np.ndarray[Any, Any]]) -> Callable[[], Figure]:
    """Layers by channels, one map below the other, on one colour scale."""

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH, 0.75 + 0.95 * len(values)), layout="constrained")
        norm = _scale(values.values())
        axes = figure.subplots(len(values), 1, squeeze=False)[:, 0]
        for plot, (variant, x) in zip(axes, values.items(), strict=True):
            image = plot.imshow(x, norm=norm, cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
            plot.set_title(NAMES.get(variant, variant), loc="left")
            plot.set_ylabel("layer")
            plot.set_xticks([])
        axes[-1].set_xlabel("channel")
        bar = figure.colorbar(image, ax=list(axes), aspect=30, pad=0.02)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        bar.ax.yaxis.set_major_formatter(lambda value, _: short(value))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.set_label("largest |x|")
        return figure

    return draw


def _surface(values: dict[str, np.ndarray[Any, Any]]) -> Callable[[], Figure]:
    """Magnitude over tokens and channels as a surface, one for each variant, all on one scale of height and colour."""

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH, HEIGHT * 0.65))
        norm = _scale(values.values())
        highest = max(float(x.max()) for x in values.values()) or 1.0
        for column, (variant, x) in enumerate(values.items()):
            left, width = column / len(values), 1 / len(values)
            plot: Any = figure.add_axes((left - 0.01, -0.02, width - 0.07, 1.06), projection="3d")
            plot.set_box_aspect((1.1, 1.1, 0.95), zoom=1.08)
            tokens, channels = np.meshgrid(np.arange(x.shape[0]), np.arange(x.shape[1]), indexing="ij")
            colours = colormaps[COLOUR_MAP](norm(_highest_corner(x)))
            plot.plot_surface(
                channels,
                tokens,
                x,
                facecolors=colours,
                rcount=60,
                ccount=100,
                linewidth=0,
                shade=False,
                rasterized=True,
            )
            plot.set_xticks([])
            plot.set_yticks([])
            plot.set_zlim(0, highest)
            plot.zaxis.set_major_locator(MaxNLocator(nbins=4))
            plot.tick_params(axis="z", pad=-2, labelsize=7.5)
            plot.zaxis.set_major_formatter(lambda value, _: short(value))
            plot.set_xlabel("channel", labelpad=-15)
            plot.set_ylabel("token", labelpad=-15)
            for axis in (plot.xaxis, plot.yaxis, plot.zaxis):
                axis.set_pane_color((0, 0, 0, 0))
                axis.line.set_color(ink())
            plot.grid(visible=False)
            plot.view_init(24, -60)
            figure.text(left + 0.02, 0.93, NAMES.get(variant, variant))
        return figure

    return draw


def _highest_corner(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each patch of a surface, which is drawn in one colour, the largest of its corners: a peak has its own colour then.

    Otherwise a peak one cell wide has the colour of the ground beside it, which is dark in a dark page.
    """
    padded = np.pad(x, ((0, 1), (0, 1)), mode="edge")
    return np.maximum.reduce([padded[:-1, :-1], padded[1:, :-1], padded[:-1, 1:], padded[1:, 1:]])


def _all_surfaces(values: dict[str, np.ndarray[Any, Any]]) -> Callable[[], Figure]:
    """A small map of tokens by channels for every layer: variants side by side, layers two to a row."""

    def draw() -> Figure:
        layers = min(map(len, values.values()))
        rows, columns = values[next(iter(values))].shape[1:]
        gap, per_row = 20, 2
        cell = len(values) * (columns + 2) + gap
        height = rows + 6
        lines = -(-layers // per_row)
        sheet = np.full((lines * height, per_row * cell), np.nan)
        for index in range(layers):
            top, left = (index // per_row) * height, (index % per_row) * cell + gap
            for number, x in enumerate(values.values()):
                at = left + number * (columns + 2)
                sheet[top : top + rows, at : at + columns] = x[index][:, : sheet.shape[1] - at]
        figure = Figure(figsize=(WIDTH, WIDTH * sheet.shape[0] / sheet.shape[1] + 0.3))
        inches = figure.get_size_inches()[1]
        axes = figure.add_axes((0.06, 0, 0.94, 1 - 0.28 / inches))
        axes.imshow(sheet, norm=_scale(values.values()), cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
        axes.set_axis_off()
        for index in range(layers):
            left, middle = (index % per_row) * cell + gap, (index // per_row) * height + rows / 2
            axes.text(left - 2, middle, str(index), ha="right", va="center", fontsize=7.5)
        names = " | ".join(NAMES.get(variant, variant) for variant in values)
        axes.set_title(f"each layer: {names}", loc="left", fontsize=8)
        return figure

    return draw
