"""Figures of a report: lines with bands and grouped bars, on light and on dark paper."""

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

DPI = 192  # twice the usual, for screens of high density
WIDTH = 6.0  # inches
_LONGEST_NAME = 36


class Curve(NamedTuple):
    """One line, or one series of bars.

    Attributes:
        label: its name in the legend.
        x: positions of a line, or the names of the bars.
        mean: the values.
        low: lower ends of the band or of the error bars, with `high`.
        high: upper ends.
    """

    label: str
    x: Sequence | np.ndarray
    mean: Sequence | np.ndarray
    low: Sequence | np.ndarray | None = None
    high: Sequence | np.ndarray | None = None


class Figure(NamedTuple):
    """What to draw.

    Attributes:
        name: file name without ending.
        title: one line above.
        caption: a sentence or two for below.
        xlabel: what the positions, or the names of the bars, are.
        ylabel: what the values are.
        curves: one or more; those of "bars" have the same names.
        kind: "line" or "bars".
    """

    name: str
    title: str
    caption: str
    xlabel: str
    ylabel: str
    curves: tuple[Curve, ...]
    kind: Literal["line", "bars"] = "line"


class _Theme(NamedTuple):
    paper: str
    ink: str
    grid: str
    colours: tuple[str, ...]


# The colours of Okabe and Ito (2008), which the colour-blind can tell apart, lightened for dark paper.
_THEMES = {
    "light": _Theme(
        "#ffffff", "#24292f", "#e3e6ea", ("#d55e00", "#0072b2", "#009e73", "#b0558b", "#b58900", "#4d4d4d")
    ),
    "dark": _Theme("#171b21", "#d5dae1", "#323944", ("#ff8f40", "#5cb3f0", "#2ecc9c", "#e08fc0", "#f0e442", "#b8bfc8")),
}
_STROKES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)))


def draw(figure: Figure, theme: Literal["light", "dark"] = "light") -> bytes:
    """The figure as a PNG file.

    Raises:
        ValueError: there is no curve, or one has not as many values as positions; names figure and curve.
    """
    _check(figure)
    paper = _THEMES[theme]
    with matplotlib.rc_context(_style(paper)):  # pyright: ignore[reportArgumentType]
        canvas = Canvas(figsize=(WIDTH, _height(figure)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        (_draw_lines if figure.kind == "line" else _draw_bars)(axes, figure, paper)
        canvas.suptitle(figure.title, x=0.01, ha="left")
        _add_legend(canvas, figure)
        file = io.BytesIO()
        canvas.savefig(file, format="png")
    return file.getvalue()


def _check(figure: Figure) -> None:
    if not figure.curves:
        raise ValueError(f"The figure {figure.name!r} has no curve; give at least one.")
    for curve in figure.curves:
        lengths = {len(values) for values in curve[1:] if values is not None}
        if len(lengths) != 1:
            message = (
                f"The curve {curve.label!r} of the figure {figure.name!r} has {len(curve.x)} positions but values "
            )
            raise ValueError(f"{message}and bands of length {sorted(lengths - {len(curve.x)})}; they must be as many.")


def _style(theme: _Theme) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 11.5,
        "figure.titlesize": 12.5,
        "figure.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "legend.fontsize": 10.5,
        "legend.frameon": False,
        "legend.handlelength": 2.8,
        "lines.linewidth": 2.0,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "grid.color": theme.grid,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.paper),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), theme.ink),
    }


def _height(figure: Figure) -> float:
    if figure.kind == "line":
        return 4.1
    return 1.5 + sum(len(curve.x) for curve in figure.curves) * 0.17 + len(figure.curves[0].x) * 0.12


def _draw_lines(axes: Axes, figure: Figure, theme: _Theme) -> None:
    for i, curve in enumerate(figure.curves):
        colour, stroke = theme.colours[i % len(theme.colours)], _STROKES[i % len(_STROKES)]
        x, mean = np.asarray(curve.x), _finite(curve.mean)
        axes.plot(x, mean, color=colour, linestyle=stroke, label=curve.label, marker="o" if len(x) == 1 else None)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(x, _finite(curve.low), _finite(curve.high), color=colour, alpha=0.18, linewidth=0)
    axes.margins(x=0.01)
    axes.set(xlabel=figure.xlabel, ylabel=figure.ylabel)


def _draw_bars(axes: Axes, figure: Figure, theme: _Theme) -> None:
    """Bars lie, so that long names can be read, the first one on top."""
    count, rows = len(figure.curves), np.arange(len(figure.curves[0].x))
    thickness = 0.8 / count
    for i, curve in enumerate(figure.curves):
        places, mean = rows + (i - (count - 1) / 2) * thickness, _finite(curve.mean)
        error = None
        if curve.low is not None and curve.high is not None:
            error = np.stack([mean - _finite(curve.low), _finite(curve.high) - mean])
        colour = theme.colours[i % len(theme.colours)]
        thin = {"ecolor": theme.ink, "error_kw": {"elinewidth": 1.2}}
        axes.barh(places, mean, thickness * 0.88, xerr=error, color=colour, label=curve.label, **thin)
        ends = np.fmax(mean if curve.high is None else _finite(curve.high), 0)
        for text, place, end in zip(rounded(curve.mean), places, ends, strict=True):
            axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(rows, [_shortened(str(name)) for name in figure.curves[0].x], fontsize=9.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12, y=0.02)
    axes.set(xlabel=figure.ylabel, ylabel=figure.xlabel)


def _finite(values: Sequence | np.ndarray) -> np.ndarray:
    """Values with gaps where they are infinite."""
    array = np.asarray(values, float)
    return np.where(np.isfinite(array), array, np.nan)


def rounded(values: Sequence | np.ndarray) -> list[str]:
    """Numbers as text, all with the decimals that show three digits of the largest."""
    sizes = [abs(float(value)) for value in values]
    largest = max((size for size in sizes if math.isfinite(size)), default=0.0)
    if 0 < largest < 1e-3 or largest >= 1e6:
        return [f"{float(value):.2e}" for value in values]
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    return [f"{float(value):.{decimals}f}" for value in values]


def _shortened(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _add_legend(canvas: Canvas, figure: Figure) -> None:
    """Below the axes, where it covers nothing."""
    if len(figure.curves) > 1:
        longest = max(len(curve.label) for curve in figure.curves)
        columns = max(1, min(len(figure.curves), 78 // (longest + 8)))
        canvas.legend(loc="outside lower center", ncols=columns)
