"""Sinkhorn: doubly stochastic by measure, blind to order and offsets, near assignments when cold, differentiable."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from permjax.match.sinkhorn import balance, sinkhorn, soft_plan
from permjax.match.soft import from_permutations, rounded, soft_shape
from permjax.permutation import random_permutations

pytestmark = pytest.mark.fast


def drawn(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def unrolled(scores, rounds=200):
    def step(x, _):
        x = x - jax.nn.logsumexp(x, axis=-1, keepdims=True)
        return x - jax.nn.logsumexp(x, axis=-2, keepdims=True), None

    return jnp.exp(jax.lax.scan(step, scores, None, rounds)[0])


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (2, 3, 9, 9)])
def test_rows_and_columns_sum_to_one_within_the_reported_error(shape):
    found = sinkhorn(drawn(*shape), tolerance=1e-5)
    np.testing.assert_allclose(found.plan.sum(-1), 1, atol=1e-6)
    off = np.abs(np.asarray(found.plan).sum(-2) - 1).max(-1)
    np.testing.assert_allclose(found.error, off, atol=1e-6)
    assert found.error.shape == shape[:-2]
    assert (found.plan >= 0).all()
    assert (found.error <= 1e-5).all()
    assert found.converged.all()


def test_too_few_iterations_are_told():
    found = sinkhorn(np.stack([drawn(20, 20), np.zeros((20, 20), np.float32)]), temperature=0.1, iterations=2)
    assert not found.converged[0]
    assert found.error[0] > 1e-2
    assert found.converged[1]


def test_two_units_have_the_closed_form():
    scores, temperature = drawn(2, 2), 0.7
    exponent = (scores[0, 0] + scores[1, 1] - scores[0, 1] - scores[1, 0]) / (2 * temperature)
    share = 1 / (1 + np.exp(-exponent))
    expected = [[share, 1 - share], [1 - share, share]]
    np.testing.assert_allclose(sinkhorn(scores, temperature=temperature, tolerance=1e-6).plan, expected, atol=1e-5)


def test_the_plan_follows_permutations_and_ignores_offsets():
    scores, rng = drawn(8, 8), np.random.default_rng(1)
    p, q = rng.permutation(8), rng.permutation(8)
    plan = sinkhorn(scores, tolerance=1e-6).plan
    np.testing.assert_allclose(sinkhorn(scores[p][:, q], tolerance=1e-6).plan, plan[p][:, q], atol=1e-5)
    shifted = scores + drawn(8, 1, seed=2) + drawn(1, 8, seed=3)
    np.testing.assert_allclose(sinkhorn(shifted, tolerance=1e-6).plan, plan, atol=1e-5)


def test_a_cold_plan_is_the_best_assignment_and_a_hot_one_is_uniform():
    scores = drawn(12, 12)
    _, columns = linear_sum_assignment(-scores)
    cold = sinkhorn(scores, temperature=0.01, iterations=20_000)
    np.testing.assert_array_equal(np.argmax(cold.plan, axis=-1), columns)
    np.testing.assert_allclose(sinkhorn(scores, temperature=1e5).plan, 1 / 12, atol=1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e15, 1e30])
def test_huge_scores_stay_finite_and_are_told_when_they_do_not_balance(scale):
    found = sinkhorn(drawn(10, 10) * np.float32(scale), iterations=200)
    assert np.isfinite(found.plan).all()
    np.testing.assert_allclose(found.plan.sum(-1), 1, atol=1e-5)
    assert bool(found.converged) == bool(abs(found.plan.sum(-2) - 1).max() <= 1e-4)


def test_derivatives_are_those_of_the_exact_solution():
    with jax.enable_x64(True):
        scores, weights = (jnp.asarray(drawn(2, 5, 5, seed=i, dtype=np.float64)) for i in (0, 1))

        def value(s, temperature=0.5):
            return (sinkhorn(s, temperature=temperature, tolerance=1e-10).plan * weights).sum()

        expected = jax.grad(lambda s: (unrolled(s / 0.5) * weights).sum())(scores)
        np.testing.assert_allclose(jax.grad(value)(scores), expected, atol=1e-8)
        np.testing.assert_allclose(jax.jvp(value, (scores,), (weights,))[1], (expected * weights).sum(), atol=1e-8)
        step = (value(scores, 0.5 + 1e-5) - value(scores, 0.5 - 1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(value, argnums=1)(scores, 0.5), step, rtol=1e-5)


def test_it_can_be_compiled_and_mapped():
    scores = jnp.asarray(drawn(3, 6, 6))
    compiled = jax.jit(jax.vmap(lambda s: sinkhorn(s, tolerance=1e-6).plan))(scores)
    np.testing.assert_allclose(compiled, sinkhorn(scores, tolerance=1e-6).plan, atol=1e-5)


def test_bad_input_is_refused():
    good = drawn(3, 3)
    for scores, hyper, message in (
        (np.where(good > 0, np.nan, good), {}, "not finite.*NaN, Inf or overflow"),
        (good * 1e30, {"temperature": 1e-20}, "raise the temperature"),
        (good, {"temperature": 0.0}, "temperature must be a positive number, not 0.0"),
        (good, {"temperature": np.nan}, "positive number"),
        (good, {"iterations": 0}, "must be positive, not 0"),
        (good, {"tolerance": -1.0}, "-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn(scores.astype(np.float32), **hyper)
    with pytest.raises(ValueError, match=r"must be square.* \(3, 4\)"):
        unwrap(sinkhorn)(drawn(3, 4))  # without the shape check of the annotations


@pytest.mark.parametrize("name", ["mlp", "attention, fused and split"])
def test_soft_plans_of_clear_scores_round_to_the_planted_permutations(zoo, name):
    spec = zoo[name]
    p = random_permutations(spec, jax.random.key(0))
    scores = {g: 3 * x + 0.3 * drawn(*x.shape) for g, x in from_permutations(spec, p).items()}
    found = soft_plan(spec, scores)
    for group, rows in rounded(spec, found.soft).items():
        np.testing.assert_array_equal(rows, p[group])
        np.testing.assert_allclose(found.soft[group].sum(-2), 1, atol=1e-4)
        assert found.soft[group].shape == soft_shape(spec, group)
        assert found.converged[group].all()
        assert (found.error[group] <= 1e-4).all()


def test_soft_plans_need_scores_of_every_group_in_its_shape(zoo):
    spec = zoo["mlp"]
    scores = {g.name: np.zeros((g.size, g.size), np.float32) for g in spec.groups}
    with pytest.raises(ValueError, match=r"missing \['h0'\]"):
        soft_plan(spec, {"h1": scores["h1"]})
    with pytest.raises(ValueError, match=r"'h0' have shape \(4, 4\), the spec expects \(5, 5\)"):
        soft_plan(spec, {**scores, "h0": scores["h1"]})


def test_balanced_weights_are_nearly_doubly_stochastic_and_keep_what_is_so():
    weights = np.exp(drawn(2, 6, 6))
    found = balance(jnp.asarray(weights), 50)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.sum(-2), 1, atol=1e-4)
    np.testing.assert_allclose(found, sinkhorn(np.log(weights), tolerance=1e-6).plan, atol=1e-4)
    np.testing.assert_allclose(balance(found), found, atol=1e-5)
