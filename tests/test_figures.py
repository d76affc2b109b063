"""Figures are drawn from their numbers, on both papers, or refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from permjax.figures import DPI, WIDTH, Curve, Figure, draw, rounded

pytestmark = pytest.mark.fast

X = np.linspace(0, 1, 5)
LINES = Figure("loss", "Loss", "Along the line.", "position", "loss", (Curve("naive", X, X**2), Curve("matched", X, X)))
BARS = Figure("groups", "Groups", "By group.", "group", "value", (Curve("a", ["x", "y"], [1.0, 2.0]),), "bars")


def pixels(figure, theme="light"):
    return np.asarray(Image.open(io.BytesIO(draw(figure, theme))).convert("RGB"))


def share(image, colour):
    """The share of pixels that are close to a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(image.astype(int) - wanted).max(axis=-1) < 12).mean()


@pytest.mark.parametrize("figure", [LINES, BARS])
def test_a_figure_has_the_resolution_of_a_good_screen_and_the_colour_of_its_paper(figure):
    light, dark = pixels(figure), pixels(figure, "dark")
    assert light.shape == dark.shape
    assert light.shape[1] == round(WIDTH * DPI)
    assert share(light, "#ffffff") > 0.5
    assert share(dark, "#171b21") > 0.5


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
