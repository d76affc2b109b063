"""Landscapes: known surfaces, grids with corners and centre, the geometry of the plane, known traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.lmc.barrier import interpolate
from permjax.lmc.landscape import hessian_trace, plane, simplex, triangle

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((30, 5)).astype(np.float32), RNG.integers(0, 3, 30)


def mlp(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (5, 8)), ("c", (8, 3)))}


def metrics(params, x, y):
    logits = jax.nn.relu(x @ params["a"]) @ params["c"]
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0])
    return {"loss": loss, "accuracy": jnp.mean((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))}


def bowl(params, x):
    """The squared norm of a vector, and its first entry in place of an accuracy."""
    return {"loss": jnp.sum(params["w"] ** 2) * jnp.mean(x), "accuracy": params["w"][0]}


ONES = [np.ones(4, np.float32)]
CORNERS = [{"w": np.array(w, np.float32)} for w in ([1.0, 1, 0], [4.0, 5, 0], [1.0, 1, 6])]


def at(weights):
    return weights @ np.stack([c["w"] for c in CORNERS]).astype(np.float64)


# the simplex


@pytest.mark.parametrize(("count", "points", "grid"), [(2, 5, 5), (3, 13, 91), (4, 5, 35)])
def test_the_grid_is_even_and_holds_every_model_and_their_mean(count, points, grid):
    found = simplex(metrics, [mlp(i) for i in range(count)], (X, Y), points=points)
    assert found.weights.shape == (grid, count)
    assert len(np.unique(found.weights, axis=0)) == grid
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    np.testing.assert_allclose(found.weights[found.centre], 1 / count)
    assert all((found.weights == corner).all(axis=1).any() for corner in np.eye(count))


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_the_surface_of_a_known_loss_is_met_however_many_points_are_computed_at_once(at_once):
    found = simplex(bowl, CORNERS, ONES, points=4, at_once=at_once)
    here = at(found.weights)
    np.testing.assert_allclose(found.loss, (here**2).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, here[:, 0], rtol=1e-5)
    ends = np.array([(c["w"] ** 2).sum() for c in CORNERS])
    np.testing.assert_allclose(found.barrier, found.loss - found.weights @ ends, atol=1e-5)
    assert found.barrier.max() == pytest.approx(0, abs=1e-5)


def test_two_models_have_the_line_as_their_simplex_in_batches_too():
    line = interpolate(metrics, mlp(0), mlp(1), (X, Y), points=5)
    found = simplex(metrics, [mlp(0), mlp(1)], (X, Y), points=5, batch_size=7)
    np.testing.assert_allclose(found.loss[np.argsort(found.weights[:, 1])], line["loss"], rtol=1e-5)


def test_a_triangle_has_equal_sides_and_its_mean_inside():
    corners = triangle(np.eye(3))
    sides = np.linalg.norm(corners - corners[[1, 2, 0]], axis=1)
    np.testing.assert_allclose(sides, 1)
    np.testing.assert_allclose(triangle(np.full((1, 3), 1 / 3))[0], corners.mean(axis=0))


def test_grids_without_centre_and_bad_models_are_refused():
    with pytest.raises(ValueError, match="not for 9 points; take 10"):
        simplex(metrics, [mlp(i) for i in range(3)], (X, Y), points=9)
    with pytest.raises(ValueError, match="two models or more, not 1"):
        simplex(metrics, [mlp(0)], (X, Y))
    with pytest.raises(ValueError, match="'a' of model 1 holds"):
        simplex(metrics, [mlp(0), {**mlp(1), "a": mlp(1)["a"] * np.float32(np.nan)}], (X, Y), points=3)


# the plane


def test_the_plane_keeps_the_distances_of_the_models():
    found = plane(bowl, CORNERS, ONES, points=3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        wanted = np.linalg.norm(CORNERS[i]["w"] - CORNERS[j]["w"])
        np.testing.assert_allclose(np.linalg.norm(found.models[i] - found.models[j]), wanted, rtol=1e-6)
    np.testing.assert_array_equal(found.models[0], 0)
    assert found.models[1, 1] == 0


def test_every_point_of_the_plane_has_the_loss_of_its_model():
    found = plane(bowl, CORNERS, ONES, points=5, margin=0.5)
    first = np.array([3, 4, 0]) / 5
    second = np.array([0, 0, 1])
    x, y = np.meshgrid(found.x, found.y)
    model = np.array([1, 1, 0]) + x[..., None] * first + y[..., None] * second
    np.testing.assert_allclose(found.loss, (model**2).sum(axis=-1), rtol=1e-4)
    np.testing.assert_allclose(found.accuracy, model[..., 0], atol=1e-4)


def test_the_rectangle_reaches_beyond_the_models_by_its_margin():
    found = plane(bowl, CORNERS, ONES, points=3, margin=0.1)
    for axis, values in enumerate((found.x, found.y)):
        low, high = found.models[:, axis].min(), found.models[:, axis].max()
        np.testing.assert_allclose(values[[0, -1]], [low - 0.1 * (high - low), high + 0.1 * (high - low)], atol=1e-12)


def test_models_on_a_line_or_in_another_number_span_no_plane():
    line = [CORNERS[0], CORNERS[1], {"w": (CORNERS[0]["w"] + CORNERS[1]["w"]) / 2}]
    with pytest.raises(ValueError, match="lie on one line"):
        plane(bowl, line, ONES)
    with pytest.raises(ValueError, match="lie on one line"):
        plane(bowl, [CORNERS[0], CORNERS[0], CORNERS[2]], ONES)
    with pytest.raises(ValueError, match="3 models and has at least 2 points a side, not 2 and 21"):
        plane(bowl, CORNERS[:2], ONES)


# the trace


M = RNG.standard_normal((6, 6)).astype(np.float32)
H = M + M.T
W = {"w": np.arange(-2, 4, dtype=np.float32).reshape(2, 3), "steps": np.int32(3)}


def quadratic(params, x):
    w = params["w"].reshape(-1)
    return w @ H @ w / 2 * jnp.mean(x)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_trace_of_a_quadratic_loss_lies_within_its_error(weighted):
    found = hessian_trace(quadratic, W, ONES, key=jax.random.key(0), probes=400, weighted=weighted)
    wanted = (np.abs(W["w"]).ravel() if weighted else np.ones(6)) @ np.diag(H)
    assert found.probes.shape == (400,)
    assert 0 < found.standard_error < 1.5
    assert abs(found.mean - wanted) < 4 * found.standard_error


def test_a_diagonal_hessian_needs_one_probe():
    found = hessian_trace(lambda p, x: jnp.sum(p["w"] ** 4) * jnp.mean(x), W, ONES, key=jax.random.key(1), probes=1)
    np.testing.assert_allclose(found.mean, 12 * (W["w"] ** 2).sum(), rtol=1e-5)
    assert np.isnan(found.standard_error)


def test_a_trace_without_probes_is_refused():
    with pytest.raises(ValueError, match="one probe or more, not 0"):
        hessian_trace(quadratic, W, ONES, key=jax.random.key(0), probes=0)
