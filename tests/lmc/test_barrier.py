"""Barriers: exact cases, the grid, batches, controls, calibration, distances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from permjax.lmc.barrier import (
    Barrier,
    barrier,
    barrier_of_pairs,
    calibrated_barrier,
    interpolate,
    l2_distance,
    l2_reduction_percent,
    mean_barrier,
    random_barrier,
)
from permjax.permutation import random_permutations
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

SHAPES = {"a": (5, 8), "b": (8,), "c": (8, 3)}
SPEC = PermutationSpec.from_axes(SHAPES, {"a": (None, "h"), "b": ("h",), "c": ("h", None)})
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((50, 5)).astype(np.float32), RNG.integers(0, 3, 50)


def mlp(seed: int):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def apply(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]


def metrics_of(logits, y):
    true = jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - true)
    return {"loss": loss, "accuracy": jnp.mean((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))}


def metrics(params, x, y):
    return metrics_of(apply(params, x), y)


def logits_in_numpy(params, x=X):
    p = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    return np.maximum(x @ p["a"] + p["b"], 0) @ p["c"]


def cross_entropy(z, y):
    return np.mean(logsumexp(z, axis=1) - z[np.arange(len(y)), y])


def in_numpy(params, x=X, y=Y):
    """Loss and accuracy in float64."""
    z = logits_in_numpy(params, x)
    return cross_entropy(z, y), (z.argmax(1) == y).mean()


def between(a, b, t):
    return {name: (1 - t) * a[name].astype(np.float64) + t * b[name].astype(np.float64) for name in a}


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


# exact cases


def hill(params, x):
    """A loss with maximum in the middle of the line from -1 to 1: 3 - w^2, and the share of x below w."""
    return {"loss": jnp.mean(3 - params["w"] ** 2 + 0 * x), "accuracy": jnp.mean((x < params["w"]).astype(jnp.float32))}


def test_a_quadratic_loss_has_its_exact_barrier():
    ends = [{"w": np.float32(-1)}, {"w": np.float32(1)}]
    found = barrier(hill, *ends, [np.linspace(-0.9, 0.9, 10, dtype=np.float32)])
    np.testing.assert_allclose(found.loss, 3 - (2 * found.t - 1) ** 2, rtol=1e-6)
    np.testing.assert_allclose([found.barrier_mid, found.barrier_max], 1, rtol=1e-6)
    np.testing.assert_allclose(found.accuracy[[0, 12, 24]], [0, 0.5, 1])


def test_unequal_ends_are_measured_against_the_line_between_them():
    curve = lambda p, x: {"loss": jnp.mean(p["w"] ** 3 + 0 * x), "accuracy": jnp.mean(x)}  # noqa: E731
    found = barrier(curve, {"w": np.float32(0)}, {"w": np.float32(2)}, [np.ones(3, np.float32)])
    np.testing.assert_allclose(found.barrier_mid, 1 - 4, rtol=1e-6)
    assert found.barrier_max == 0


def test_the_maximum_need_not_lie_in_the_middle():
    peak = lambda p, x: {"loss": jnp.mean(jnp.exp(-100 * (p["w"] - 0.25) ** 2) + 0 * x), "accuracy": jnp.mean(x)}  # noqa: E731
    found = barrier(peak, {"w": np.float32(0)}, {"w": np.float32(1)}, [np.ones(3, np.float32)])
    assert found.t[np.argmax(found.loss)] == 0.25
    assert found.barrier_max > 0.9
    assert abs(found.barrier_mid) < 0.01


def test_from_a_model_to_itself_there_is_no_barrier():
    found = barrier(metrics, mlp(0), mlp(0), (X, Y))
    np.testing.assert_allclose(found.loss, in_numpy(mlp(0))[0], rtol=1e-5)
    assert abs(found.barrier_mid) < 1e-6
    assert 0 <= found.barrier_max < 1e-6


# the grid and the batches


def test_the_grid_has_25_points_with_both_ends_and_the_middle():
    found = barrier(metrics, mlp(0), mlp(1), (X, Y))
    assert found.t.shape == found.loss.shape == found.accuracy.shape == (25,)
    assert found.t[[0, 12, 24]].tolist() == [0, 0.5, 1]
    assert found.pairs == 1
    assert found.inverse_temperature is None
    height = found.loss - (1 - found.t) * found.loss[0] - found.t * found.loss[-1]
    np.testing.assert_allclose([found.barrier_mid, found.barrier_max], [height[12], height.max()], atol=1e-12)


@pytest.mark.parametrize("batch_size", [50, 100, 25, 7, 1])
def test_every_point_agrees_with_numpy_however_the_data_are_cut(batch_size):
    a, b = mlp(0), mlp(1)
    found = interpolate(metrics, a, b, (X, Y), points=5, batch_size=batch_size)
    exact = [in_numpy(between(a, b, t)) for t in np.linspace(0, 1, 5)]
    np.testing.assert_allclose(found["loss"], [loss for loss, _ in exact], rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], [accuracy for _, accuracy in exact], rtol=1e-6)
    assert found["loss"].dtype == np.float64


def test_a_shorter_last_batch_counts_by_its_size():
    mean = lambda p, x: jnp.mean(x) + p["w"]  # noqa: E731
    x = np.asarray([0, 0, 0, 0, 0, 0, 7], np.float32)
    found = interpolate(mean, {"w": np.float32(0)}, {"w": np.float32(1)}, [x], points=3, batch_size=3)
    np.testing.assert_allclose(found, [1, 1.5, 2], rtol=1e-7)


def test_any_tree_of_metrics_and_any_number_of_arrays_will_do():
    many = lambda p, x, y, z: (jnp.mean(x * p["w"]), {"s": jnp.mean(y + z)})  # noqa: E731
    ones = np.ones(4, np.float32)
    product, rest = interpolate(many, {"w": np.float32(0)}, {"w": np.float32(2)}, [ones, ones, 2 * ones], points=3)
    np.testing.assert_allclose(product, [0, 1, 2])
    np.testing.assert_allclose(rest["s"], 3)


def test_the_line_is_compiled_once_for_pairs_of_one_architecture():
    traced = []

    def counting(params, x, y):
        traced.append(None)
        return metrics(params, x, y)

    barrier(counting, mlp(0), mlp(1), (X, Y), points=3)
    first = len(traced)
    barrier(counting, mlp(2), mlp(3), (X, Y), points=3)
    assert len(traced) == first <= 2


def test_jax_and_numpy_models_give_the_same():
    a, b = mlp(0), mlp(1)
    on_device = [jax.tree.map(jnp.asarray, m) for m in (a, b)]
    np.testing.assert_allclose(
        barrier(metrics, a, b, (X, Y)).loss, barrier(metrics, *on_device, (X, Y)).loss, rtol=1e-6
    )


# several pairs


def test_values_of_several_models_are_means_over_all_pairs():
    models = [mlp(seed) for seed in range(3)]
    found = barrier_of_pairs(metrics, models, (X, Y), points=5)
    single = [barrier(metrics, a, b, (X, Y), points=5) for a, b in itertools.combinations(models, 2)]
    assert found.pairs == 3
    for name in ("loss", "accuracy", "barrier_mid", "barrier_max"):
        np.testing.assert_allclose(getattr(found, name), np.mean([getattr(b, name) for b in single], 0), rtol=1e-6)
    assert isinstance(found.barrier_mid, float)
    nested = mean_barrier([mean_barrier(single[:2]), single[2]])
    np.testing.assert_allclose(nested.loss, found.loss)
    assert nested.pairs == 3


def test_the_mean_maximum_is_the_mean_of_the_maxima_of_the_pairs():
    t = np.linspace(0, 1, 3)
    a = Barrier(t, np.asarray([0, 1.0, 0]), t, 1.0, 1.0)
    b = Barrier(t, np.asarray([0, -1.0, 0]), t, -1.0, 0.0)
    assert mean_barrier([a, b]).barrier_max == 0.5
    assert mean_barrier([a, b]).barrier_mid == 0


# controls


def test_the_random_control_shuffles_the_second_model_by_its_key():
    a, b, key = mlp(0), mlp(1), jax.random.key(4)
    found = random_barrier(SPEC, metrics, a, b, (X, Y), key=key, points=5)
    h = np.asarray(random_permutations(SPEC, key)["h"])
    shuffled = {"a": b["a"][:, h], "b": b["b"][h], "c": b["c"][h]}
    np.testing.assert_allclose(found.loss, barrier(metrics, a, shuffled, (X, Y), points=5).loss, rtol=1e-6)
    plain = barrier(metrics, a, b, (X, Y), points=5)
    np.testing.assert_allclose(found.loss[[0, -1]], plain.loss[[0, -1]], rtol=1e-5)
    assert abs(found.barrier_mid - plain.barrier_mid) > 1e-3


def scaled(params, x):
    """A model whose logits are `w x`."""
    return params["w"] * x


def scaled_metrics(params, x, y):
    return metrics_of(scaled(params, x), y)


def labels_of(z, seed: int = 0):
    gumbel = np.random.default_rng(seed).gumbel(size=z.shape)
    return (z + gumbel).argmax(-1)


def test_calibration_recovers_a_planted_temperature():
    z = 2 * np.random.default_rng(1).standard_normal((20000, 4)).astype(np.float32)
    y = labels_of(z)
    found = calibrated_barrier(scaled, {"w": np.float32(0.25)}, {"w": np.float32(4)}, (z, y), (z, y), points=5)
    np.testing.assert_allclose(found.inverse_temperature * np.linspace(0.25, 4, 5), 1, rtol=0.05)
    assert abs(found.barrier_mid) < 1e-4
    naive = barrier(scaled_metrics, {"w": np.float32(0.25)}, {"w": np.float32(4)}, (z, y), points=5)
    assert naive.barrier_mid < -0.1


@pytest.mark.parametrize("batch_size", [50, 20])
def test_the_temperature_of_every_point_is_the_one_that_scipy_finds(batch_size):
    a, b = mlp(0), mlp(1)
    found = calibrated_barrier(apply, a, b, (X[:30], Y[:30]), (X, Y), points=5, batch_size=batch_size)
    for i, t in enumerate(found.t):
        z, beta = logits_in_numpy(between(a, b, t)), found.inverse_temperature[i]
        best = minimize_scalar(lambda s, z=z: cross_entropy(np.exp(s) * z, Y), bounds=(-7, 7), method="bounded")
        np.testing.assert_allclose(np.log(beta), best.x, atol=2e-3)
        np.testing.assert_allclose(found.loss[i], cross_entropy(beta * z[:30], Y[:30]), rtol=1e-5)
        np.testing.assert_allclose(found.accuracy[i], (z.argmax(1) == Y)[:30].mean(), rtol=1e-6)


def test_separable_and_hopeless_logits_get_a_finite_temperature():
    y = np.asarray([0, 1, 0, 1])
    z = np.asarray([[3, 0], [0, 3], [3, 0], [0, 3]], np.float32)
    found = calibrated_barrier(scaled, {"w": np.float32(-1)}, {"w": np.float32(1)}, (z, y), (z, y), points=3)
    assert np.isfinite(found.loss).all()
    np.testing.assert_allclose(np.log(found.inverse_temperature[[0, 2]]), [-7, 7], atol=1e-3)
    np.testing.assert_allclose(found.loss, [np.log(2), np.log(2), 0], atol=5e-3)
    assert found.accuracy.tolist() == [0, 0.5, 1]


def test_logits_and_labels_may_have_more_axes_as_in_sequences():
    z = np.random.default_rng(2).standard_normal((6, 5, 4)).astype(np.float32)
    y = labels_of(3 * z)
    ends = {"w": np.float32(0.5)}, {"w": np.float32(2)}
    whole = calibrated_barrier(scaled, *ends, (z, y), (z, y), points=3, batch_size=4)
    flat = calibrated_barrier(
        scaled, *ends, (z.reshape(30, 4), y.reshape(30)), (z.reshape(30, 4), y.reshape(30)), points=3
    )
    np.testing.assert_allclose(whole.loss, flat.loss, rtol=1e-5)
    np.testing.assert_allclose(whole.inverse_temperature, flat.inverse_temperature, rtol=1e-3)


def test_calibrated_barriers_are_averaged_with_their_temperatures():
    pair = calibrated_barrier(apply, mlp(0), mlp(1), (X, Y), (X, Y), points=3)
    np.testing.assert_allclose(mean_barrier([pair, pair]).inverse_temperature, pair.inverse_temperature)
    with raises("all calibrated or none"):
        mean_barrier([pair, barrier(metrics, mlp(0), mlp(1), (X, Y), points=3)])


# distances

ROLES = PermutationSpec.from_axes(
    {"w": (3,), "mean": (3,), "table": (3,)}, {}, roles={"mean": "statistic", "table": "frozen"}
)


@pytest.mark.parametrize("backend", [np, jnp])
def test_the_distance_counts_leaves_of_role_weight_only(backend):
    a = {name: backend.zeros(3, np.float32) for name in ("w", "mean", "table")}
    b = {"w": backend.asarray(np.float32([2, 3, 6])), "mean": a["mean"] + 1, "table": a["table"] + 1}
    assert l2_distance(ROLES, a, b) == l2_distance(ROLES, b, a) == 7
    assert l2_distance(ROLES, a, a) == 0


def test_the_distance_is_accumulated_in_float64():
    spec = PermutationSpec.from_axes({"w": (100_001,)}, {})
    step = np.full(100_001, 1e-2, np.float32)
    step[0] = 3e4
    exact = np.linalg.norm(step.astype(np.float64))
    assert abs(np.linalg.norm(step) - exact) > 1e-9 * exact
    np.testing.assert_allclose(l2_distance(spec, {"w": 0 * step}, {"w": step}), exact, rtol=1e-13)


def test_the_reduction_is_that_of_distances_in_percent():
    at = lambda x: {"w": np.float32([x, 0, 0]), "mean": np.zeros(3), "table": np.zeros(3)}  # noqa: E731
    assert l2_reduction_percent(ROLES, at(0), at(10), at(9)) == 10
    assert l2_reduction_percent(ROLES, at(0), at(10), at(-12)) == -20
    with raises("equal weights"):
        l2_reduction_percent(ROLES, at(1), at(1), at(0))


# bad input


@pytest.mark.parametrize("points", [0, 1, 2, 24])
def test_a_grid_without_a_middle_is_refused(points):
    for call in (barrier, lambda *args, **kw: calibrated_barrier(apply, *args[1:], (X, Y), **kw)):
        with raises(f"points must be odd.*not {points}"):
            call(metrics, mlp(0), mlp(1), (X, Y), points=points)
    if points < 2:
        with raises("at least 2"):
            interpolate(metrics, mlp(0), mlp(1), (X, Y), points=points)


def test_models_and_data_that_do_not_fit_are_refused():
    a, b = mlp(0), mlp(1)
    with raises("'b' of model 1 holds 8 NaN"):
        barrier(metrics, a, {**b, "b": b["b"] * np.nan}, (X, Y))
    with raises("'c' of model 0 is missing from model 1"):
        barrier(metrics, a, {"a": b["a"], "b": b["b"]}, (X, Y))
    for data in ((X, Y[:10]), (X[:0], Y[:0]), ()):
        with raises("data must be arrays of one length"):
            barrier(metrics, a, b, data)
    with raises("batch_size is 0"):
        barrier(metrics, a, b, (X, Y), batch_size=0)
    with raises("two models or more, not 1"):
        barrier_of_pairs(metrics, [a], (X, Y))
    with raises("one barrier or more"):
        mean_barrier([])
