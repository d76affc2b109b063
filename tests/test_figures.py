"""Figures are drawn from their numbers, on both papers, or refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from permjax.figures import DPI, WIDTH, Contour, Curve, Figure, Mark, Matrix, draw, rounded

pytestmark = pytest.mark.fast

X = np.linspace(0, 1, 5)
LINES = Figure("loss", "Loss", "Along the line.", "position", "loss", (Curve("naive", X, X**2), Curve("matched", X, X)))
BARS = Figure("groups", "Groups", "By group.", "group", "value", (Curve("a", ["x", "y"], [1.0, 2.0]),), "bars")

SIDES = np.linspace(-1, 1, 9)
BOWL = 0.1 + SIDES[None, :] ** 2 + SIDES[:, None] ** 2
GRID = Contour("plane", "Plane", "Loss.", "first", "second", "loss", SIDES, SIDES, BOWL, (Mark("a", 0.0, 0.0),))
TRIANGLE = GRID._replace(
    name="triangle", xlabel="", ylabel="", x=np.array([0, 1, 0.5, 0.5]), y=np.array([0, 0, 1, 0.3]), z=np.arange(4.0)
)
CELLS = np.array([[np.nan, 0.5], [1.0, np.nan]])
MATRIX = Matrix("pairs", "Pairs", "Barriers.", "model", "model", "barrier", ("a", "b"), ("a", "b"), CELLS)


def pixels(figure, theme="light"):
    return np.asarray(Image.open(io.BytesIO(draw(figure, theme))).convert("RGB"))


def share(image, colour):
    """The share of pixels that are close to a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(image.astype(int) - wanted).max(axis=-1) < 12).mean()


@pytest.mark.parametrize("figure", [LINES, BARS, GRID, TRIANGLE, MATRIX])
def test_a_figure_has_the_resolution_of_a_good_screen_and_the_colour_of_its_paper(figure):
    light, dark = pixels(figure), pixels(figure, "dark")
    assert light.shape == dark.shape
    assert light.shape[1] == round(WIDTH * DPI)
    assert share(light, "#ffffff") > 0.25
    assert share(dark, "#171b21") > 0.25
    assert figure.title in figure.alt


def test_every_curve_is_drawn_in_its_own_colour():
    image = pixels(LINES)
    assert share(image, "#d55e00") > 1e-3
    assert share(image, "#0072b2") > 1e-3
    assert share(image, "#009e73") == 0


def test_a_band_is_drawn_between_low_and_high():
    banded = LINES._replace(curves=(LINES.curves[0]._replace(low=X**2 - 0.3, high=X**2 + 0.3), LINES.curves[1]))
    tint = "#f7e2d1"  # 18 % of the first colour on white
    assert share(pixels(LINES), tint) < 0.01
    assert share(pixels(banded), tint) > 0.05


def test_a_longer_bar_covers_more_and_more_groups_need_more_height():
    longer = BARS._replace(curves=(Curve("a", ["x", "y"], [2.0, 2.0]),))
    assert share(pixels(longer), "#d55e00") > 1.2 * share(pixels(BARS), "#d55e00")
    many = Curve("a", [f"group {i}" for i in range(30)], np.ones(30), np.zeros(30), np.full(30, 2.0))
    assert pixels(BARS._replace(curves=(many,))).shape[0] > 2 * pixels(BARS).shape[0]


def test_values_that_are_not_finite_leave_gaps_instead_of_failing():
    holes = np.where(np.arange(5) == 2, np.nan, X)
    assert pixels(LINES._replace(curves=(Curve("holes", X, holes),))).size
    assert pixels(BARS._replace(curves=(Curve("a", ["x", "y"], [np.inf, np.nan]),))).size


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(LINES, "dark")
    assert dict(matplotlib.rcParams) == before


def test_a_figure_without_curves_or_with_curves_of_uneven_length_is_refused_by_name():
    with pytest.raises(ValueError, match="figure 'loss' has no curve"):
        draw(LINES._replace(curves=()))
    with pytest.raises(ValueError, match=r"curve 'short' of the figure 'loss' has 5 positions.*length \[3\]"):
        draw(LINES._replace(curves=(Curve("short", X, X[:3]),)))


def ends(image):
    """The shares of pixels that are dark blue and bright yellow, the ends of the colours of a surface."""
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    low, high = (red < 40) & (green < 70) & (blue > 70), (red > 235) & (green > 200) & (blue < 100)
    return low.mean(), high.mean()


@pytest.mark.parametrize("figure", [GRID, TRIANGLE, GRID._replace(scale="log")])
def test_level_lines_show_the_lowest_and_the_highest_values_in_their_colours(figure):
    assert min(ends(pixels(figure))) > 0.003


def test_a_surface_without_any_slope_is_drawn_too():
    for scale in ("linear", "log"):
        assert max(ends(pixels(GRID._replace(z=np.ones((9, 9)), scale=scale)))) < 0.03


def test_on_a_logarithmic_scale_small_values_get_more_of_the_colours():
    steep = GRID._replace(z=np.exp(4 * BOWL))
    linear, logarithmic = (ends(pixels(steep._replace(scale=scale)))[0] for scale in ("linear", "log"))
    assert linear > 2 * logarithmic > 0


def test_marks_are_drawn_and_axes_are_left_out_where_they_mean_nothing():
    assert share(pixels(GRID), "#000000") > 1.5 * share(pixels(GRID._replace(marks=())), "#000000")
    named = TRIANGLE._replace(xlabel="first", ylabel="second")
    assert share(pixels(named), "#24292f") > 1.2 * share(pixels(TRIANGLE), "#24292f")


@pytest.mark.parametrize("figure", [GRID, TRIANGLE])
def test_points_without_a_value_leave_holes_in_a_surface(figure):
    z = figure.z.copy()
    z.flat[0] = np.inf
    assert share(pixels(figure._replace(z=z)), "#ffffff") > share(pixels(figure), "#ffffff")


def test_a_matrix_shows_larger_numbers_in_stronger_colours_and_leaves_empty_cells_empty():
    image = pixels(MATRIX)
    assert share(image, "#0072b2") > 0.1
    assert share(image, "#e8f0f7") > 0.1
    full = pixels(MATRIX._replace(values=np.ones((2, 2))))
    assert share(full, "#ffffff") < share(image, "#ffffff")


def test_many_rows_and_long_names_of_columns_need_more_height():
    names = [f"a long name of model {i}" for i in range(6)]
    long = MATRIX._replace(columns=names, values=np.ones((2, 6)))
    many = MATRIX._replace(rows=names, values=np.ones((6, 2)))
    assert pixels(MATRIX).shape[0] < pixels(long).shape[0]
    assert pixels(MATRIX).shape[0] < pixels(many).shape[0]


def test_surfaces_and_matrices_that_do_not_fit_their_positions_are_refused_by_name():
    with pytest.raises(ValueError, match=r"figure 'plane' have shape \(9, 8\), its positions are 9 by 9"):
        draw(GRID._replace(z=BOWL[:, :8]))
    with pytest.raises(ValueError, match=r"figure 'triangle' have shape \(3,\)"):
        draw(TRIANGLE._replace(z=np.arange(3.0)))
    with pytest.raises(ValueError, match=r"logarithmic scale positive ones; they are 0\.0 at least"):
        draw(TRIANGLE._replace(scale="log"))
    with pytest.raises(ValueError, match="they are all not finite at least"):
        draw(TRIANGLE._replace(z=np.full(4, np.nan)))
    with pytest.raises(ValueError, match=r"matrix 'pairs' has 3 rows and 2 columns.*shape \(2, 2\)"):
        draw(MATRIX._replace(rows=("a", "b", "c")))


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.97, 0.7], ["0.970", "0.700"]),
        ([97.04, 0.1], ["97.0", "0.1"]),
        ([1234.5, -3.0], ["1234", "-3"]),
        ([1e-5, 0.0], ["1.00e-05", "0.00e+00"]),
        ([0.0, 0.0], ["0", "0"]),
        ([np.nan, 0.5], ["nan", "0.500"]),
        ([], []),
    ],
)
def test_numbers_of_one_column_have_the_same_decimals(values, texts):
    assert rounded(values) == texts
