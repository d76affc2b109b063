"""Figures of a report: lines with bands, grouped bars, level lines and matrices, on light and on dark paper."""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

DPI = 192  # twice the usual, for screens of high density
WIDTH = 6.0  # inches
_LONGEST_NAME = 36
_LEVELS = 14  # of a contour figure
_NARROW = 8  # columns of a matrix whose cells hold three digits


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

    @property
    def alt(self) -> str:
        """What a reader who cannot see the figure is told."""
        return f"{self.title}: {self.ylabel} by {self.xlabel}"


class Mark(NamedTuple):
    """A named point of a contour figure."""

    label: str
    x: float
    y: float


class Contour(NamedTuple):
    """Level lines of a surface, such as the loss over the plane of three models; both axes have one scale.

    Attributes:
        name: file name without ending.
        title: one line above.
        caption: a sentence or two for below.
        xlabel: what the horizontal positions are; without both labels no axes are drawn, as fits a triangle.
        ylabel: what the vertical positions are.
        zlabel: what the values are.
        x: positions of the columns of a grid, or of scattered points.
        y: positions of the rows of a grid, or of scattered points.
        z: values `[rows, columns]` of a grid, or one for every scattered point.
        marks: points to name.
        scale: "log" where values of different size matter alike; they must be positive.
    """

    name: str
    title: str
    caption: str
    xlabel: str
    ylabel: str
    zlabel: str
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    marks: tuple[Mark, ...] = ()
    scale: Literal["linear", "log"] = "linear"

    @property
    def alt(self) -> str:
        """What a reader who cannot see the figure is told."""
        return f"{self.title}: level lines of {self.zlabel}"


class Matrix(NamedTuple):
    """A number for every pair of names, in coloured cells, such as the barriers between all pairs of models.

    Attributes:
        name: file name without ending.
        title: one line above.
        caption: a sentence or two for below.
        xlabel: what the columns are.
        ylabel: what the rows are.
        zlabel: what the numbers are.
        rows: names of the rows, the first on top.
        columns: names of the columns.
        values: the numbers `[rows, columns]`; cells that are not finite stay empty.
    """

    name: str
    title: str
    caption: str
    xlabel: str
    ylabel: str
    zlabel: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray

    @property
    def alt(self) -> str:
        """What a reader who cannot see the figure is told."""
        return f"{self.title}: {self.zlabel} by {self.ylabel} and {self.xlabel}"


Drawing: TypeAlias = Figure | Contour | Matrix
"""Everything that `draw` can draw."""


class _Theme(NamedTuple):
    paper: str
    ink: str
    grid: str
    cell: str
    colours: tuple[str, ...]


# The colours of Okabe and Ito (2008), which the colour-blind can tell apart, lightened for dark paper.
_THEMES = {
    "light": _Theme(
        "#ffffff", "#24292f", "#e3e6ea", "#e8f0f7", ("#d55e00", "#0072b2", "#009e73", "#b0558b", "#b58900", "#4d4d4d")
    ),
    "dark": _Theme(
        "#171b21", "#d5dae1", "#323944", "#26323f", ("#ff8f40", "#5cb3f0", "#2ecc9c", "#e08fc0", "#f0e442", "#b8bfc8")
    ),
}
_STROKES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)))


def draw(figure: Drawing, theme: Literal["light", "dark"] = "light") -> bytes:
    """The figure as a PNG file.

    Raises:
        ValueError: there is nothing to draw, or numbers do not fit their positions; names the figure, and the curve.
    """
    paint = _prepared(figure)
    paper = _THEMES[theme]
    with matplotlib.rc_context(_style(paper)):  # pyright: ignore[reportArgumentType]
        canvas = Canvas(figsize=(WIDTH, _height(figure)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(canvas)
        paint(canvas, canvas.add_subplot(), paper)
        canvas.suptitle(figure.title, x=0.01, ha="left")
        file = io.BytesIO()
        canvas.savefig(file, format="png")
    return file.getvalue()


def _prepared(figure: Drawing) -> Callable[[Canvas, Axes, _Theme], None]:
    """Check a figure and return what draws it."""
    match figure:
        case Figure():
            _check(figure)
            return partial(_draw_curves, figure)
        case Contour():
            _check_contour(figure)
            return partial(_draw_contour, figure)
        case Matrix():
            _check_matrix(figure)
            return partial(_draw_matrix, figure)


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


def _check_contour(figure: Contour) -> None:
    sizes = (len(figure.x), len(figure.y))
    wanted = sizes[::-1] if np.ndim(figure.z) == 2 else (sizes[0],)
    if np.shape(figure.z) != wanted or (np.ndim(figure.z) == 1 and sizes[0] != sizes[1]):
        message = f"The values of the figure {figure.name!r} have shape {np.shape(figure.z)}, its positions are "
        raise ValueError(f"{message}{sizes[0]} by {sizes[1]}; give values [y, x] of a grid, or one for every point.")
    z = _finite(figure.z)
    if np.isnan(z).all() or (figure.scale == "log" and np.nanmin(z) <= 0):
        message = (
            f"The figure {figure.name!r} needs values to draw, and on a logarithmic scale positive ones; they are "
        )
        raise ValueError(f"{message}{np.nanmin(z) if np.isfinite(z).any() else 'all not finite'} at least.")


def _check_matrix(figure: Matrix) -> None:
    wanted = (len(figure.rows), len(figure.columns))
    if np.shape(figure.values) != wanted or 0 in wanted:
        message = f"The matrix {figure.name!r} has {wanted[0]} rows and {wanted[1]} columns by name, but its values "
        raise ValueError(f"{message}have shape {np.shape(figure.values)}; they must agree, and there must be some.")


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


def _height(figure: Drawing) -> float:
    match figure:
        case Contour():
            return 0.7 + 0.78 * WIDTH * float(np.clip(np.ptp(figure.y) / max(np.ptp(figure.x), 1e-300), 0.4, 1.2))
        case Matrix():
            return 1.6 + 0.42 * len(figure.rows) + (0.8 if _is_steep(figure) else 0)
    if figure.kind == "line":
        return 4.1
    return 1.5 + sum(len(curve.x) for curve in figure.curves) * 0.17 + len(figure.curves[0].x) * 0.12


def _draw_curves(figure: Figure, canvas: Canvas, axes: Axes, theme: _Theme) -> None:
    (_draw_lines if figure.kind == "line" else _draw_bars)(axes, figure, theme)
    _add_legend(canvas, figure)


def _draw_lines(axes: Axes, figure: Figure, theme: _Theme) -> None:
    for i, curve in enumerate(figure.curves):
        colour, stroke = theme.colours[i % len(theme.colours)], _STROKES[(i + i // len(theme.colours)) % len(_STROKES)]
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


def _is_steep(figure: Matrix) -> bool:
    """Tell whether the names of the columns are too long to stand side by side."""
    return sum(len(name) + 2 for name in figure.columns) > 60


def _draw_contour(figure: Contour, canvas: Canvas, axes: Axes, theme: _Theme) -> None:
    z = np.ma.masked_invalid(_finite(figure.z))
    x, y = np.asarray(figure.x, float), np.asarray(figure.y, float)
    norm, levels = _levels(z, figure.scale)
    filled, lines = (axes.contourf, axes.contour) if z.ndim == 2 else (axes.tricontourf, axes.tricontour)
    if z.ndim == 1:
        x, y, z = x[~z.mask], y[~z.mask], z.compressed()
    surface = filled(x, y, z, levels=levels, norm=norm, cmap="cividis")
    lines(x, y, z, levels=levels, colors=theme.paper, linewidths=0.5, alpha=0.7)
    bar = canvas.colorbar(surface, ax=axes, label=figure.zlabel, shrink=0.85, pad=0.02)
    bar.set_ticks(list(levels[::2]), labels=[f"{level:.3g}" for level in levels[::2]])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    halo = [withStroke(linewidth=3, foreground="#ffffff")]
    for mark in figure.marks:
        axes.plot(mark.x, mark.y, "o", color="#000000", markeredgecolor="#ffffff", markersize=8, clip_on=False)
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "annotation_clip": False}
        axes.annotate(mark.label, (mark.x, mark.y), color="#000000", path_effects=halo, weight="bold", **place)
    axes.set(xlabel=figure.xlabel, ylabel=figure.ylabel, aspect="equal")
    axes.grid(visible=False)
    if not (figure.xlabel or figure.ylabel):
        axes.set_axis_off()


def _levels(z: np.ma.MaskedArray, scale: str) -> tuple[Normalize, np.ndarray]:
    """Return round levels over all values, and the colours' scale."""
    low, high = float(z.min()), float(z.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 1e-3 - abs(low) / 1e3, high + 1e-3 + abs(high) / 1e3
    if scale == "linear" or low <= 0:
        levels = np.asarray(MaxNLocator(_LEVELS).tick_values(low, high))
        return Normalize(levels[0], levels[-1]), levels
    levels = np.geomspace(low, high, _LEVELS)
    return LogNorm(low, high), levels


def _draw_matrix(figure: Matrix, _: Canvas, axes: Axes, theme: _Theme) -> None:
    values = _finite(figure.values)
    colours = LinearSegmentedColormap.from_list("cells", [theme.cell, theme.colours[1]])
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, aspect="auto")
    axes.set_title(figure.zlabel, loc="left", fontsize=10.5)
    digits, size = (3, 9.5) if values.shape[1] <= _NARROW else (2, 7.5)
    texts = iter(rounded(values[np.isfinite(values)], digits))
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = np.dot(colours(image.norm(value))[:3], (0.299, 0.587, 0.114)) < 0.5
            ink = "#ffffff" if dark else "#000000"
            axes.text(j, i, next(texts), ha="center", va="center", color=ink, fontsize=size)
    steep = _is_steep(figure)
    names = [_shortened(str(name)) for name in figure.columns]
    axes.set_xticks(range(len(names)), names, rotation=35 if steep else 0, ha="right" if steep else "center")
    axes.set_yticks(range(len(figure.rows)), [_shortened(str(name)) for name in figure.rows])
    axes.tick_params(labelsize=9.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=figure.xlabel, ylabel=figure.ylabel)


def _finite(values: Sequence | np.ndarray) -> np.ndarray:
    """Values with gaps where they are infinite."""
    array = np.asarray(values, float)
    return np.where(np.isfinite(array), array, np.nan)


def rounded(values: Sequence | np.ndarray, digits: int = 3) -> list[str]:
    """Numbers as text, all with the decimals that show this many digits of the largest."""
    sizes = [abs(float(value)) for value in values]
    largest = max((size for size in sizes if math.isfinite(size)), default=0.0)
    if 0 < largest < 1e-3 or largest >= 1e6:
        return [f"{float(value):.{digits - 1}e}" for value in values]
    decimals = max(0, digits - 1 - math.floor(math.log10(largest))) if largest > 0 else 0
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
