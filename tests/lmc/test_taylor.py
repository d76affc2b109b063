"""The Taylor estimate of a barrier: exact where the loss is quadratic, NumPy's derivatives, batches, integer leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.lmc.barrier import barrier
from permjax.lmc.taylor import taylor_barrier

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((23, 4)).astype(np.float32), RNG.standard_normal((23, 2)).astype(np.float32)


def model(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((4, 2)).astype(np.float32),
        "b": rng.standard_normal(2).astype(np.float32),
        "steps": np.int32(7),
    }


def squares(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)


def quartic(params, x):
    return jnp.mean(x) * jnp.sum(params["w"] ** 4)


def test_the_estimate_is_exact_for_a_quadratic_loss_and_does_not_depend_on_the_batches():
    a, b = model(0), model(1)
    wanted = barrier(
        lambda p, x, y: {"loss": squares(p, x, y), "accuracy": jnp.zeros(())}, a, b, (X, Y), points=3
    ).barrier_mid
    for batch_size in (5, 1000):
        found = taylor_barrier(squares, a, b, (X, Y), batch_size=batch_size)
        np.testing.assert_allclose(found.barrier, wanted, rtol=1e-4)
        np.testing.assert_allclose(found.barrier, found.slope + found.curvature)


def test_its_terms_are_those_of_the_formula():
    a, b = ({"w": np.array(w, np.float32)} for w in ([1.0, 2.0], [2.0, -1.0]))
    mu = b["w"] - a["w"]
    found = taylor_barrier(quartic, a, b, [np.ones(3, np.float32)])
    np.testing.assert_allclose(found.slope, (4 * a["w"] ** 3 - 4 * b["w"] ** 3) @ mu / 4, rtol=1e-5)
    np.testing.assert_allclose(found.curvature, (12 * a["w"] ** 2 + 12 * b["w"] ** 2) @ mu**2 / 16, rtol=1e-5)


def test_the_error_of_the_estimate_falls_with_the_fourth_power_of_the_distance():
    a, step = np.array([1.0, 2.0]), np.array([1.0, -3.0])

    def error(size):
        with jax.enable_x64(True):
            ends = [{"w": a}, {"w": a + size * step}]
            true = sum(((e + a) / 2) ** 4 for e in (ends[1]["w"],)).sum() - (a**4 + ends[1]["w"] ** 4).sum() / 2
            return abs(taylor_barrier(quartic, *ends, [np.ones(3)]).barrier - true)

    np.testing.assert_allclose(error(0.1) / error(0.05), 16, rtol=1e-3)


def test_the_estimate_does_not_depend_on_the_order_of_the_ends():
    a, b = model(0), model(1)
    one, other = taylor_barrier(squares, a, b, (X, Y)), taylor_barrier(squares, b, a, (X, Y))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_models_that_differ_or_are_not_finite_are_refused():
    a = model(0)
    with pytest.raises(ValueError, match="Leaf 'w' has shape"):
        taylor_barrier(squares, a, {**a, "w": a["w"][:2]}, (X, Y))
    with pytest.raises(ValueError, match="'b' of model 1 holds 2 NaN"):
        taylor_barrier(squares, a, {**a, "b": a["b"] * np.float32(np.nan)}, (X, Y))
