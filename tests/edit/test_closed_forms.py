"""Key, residual and covariance to a change: all in NumPy float64, against derivations of another kind."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space as scipy_null_space
from scipy.linalg import sqrtm

from permjax.edit.alphaedit import null_space, projected_solution
from permjax.edit.memit import mixed_keys, ridge_solution
from permjax.edit.rome import rank_one

pytestmark = pytest.mark.fast

M, D = 9, 5


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def moment(seed, m=M):
    """A second moment of condition number 1e4."""
    turn = np.linalg.qr(drawn(seed, m, m))[0]
    return (turn * np.logspace(-4, 0, m)) @ turn.T


def constrained(covariance, key, residual):
    """`argmin tr(dW C dW^T)` with `dW k = r`, by the linear system of the Lagrangian."""
    system = np.block([[covariance, key[:, None]], [key[None], np.zeros((1, 1))]])
    return np.outer(residual, np.linalg.solve(system, np.eye(len(key) + 1)[-1])[:-1])


@given(st.integers(0, 10**6))
def test_the_change_of_rank_one_writes_its_value_with_the_least_effect_on_other_keys(seed):
    covariance, key, residual = moment(seed), drawn(seed + 1, M), drawn(seed + 2, D)
    found = rank_one(np.linalg.solve(covariance, key), key, residual)
    change = np.outer(found.u, found.v)
    np.testing.assert_allclose(change @ key, residual, atol=1e-9 * np.abs(residual).max())
    assert np.linalg.matrix_rank(change) == 1
    np.testing.assert_allclose(change, constrained(covariance, key, residual), rtol=1e-6, atol=1e-9)
    cost = np.trace(change @ covariance @ change.T)
    np.testing.assert_allclose(cost, residual @ residual / (key @ np.linalg.solve(covariance, key)), rtol=1e-6)
    other = change + drawn(seed + 3, D, M - 1) @ scipy_null_space(key[None]).T
    np.testing.assert_allclose(other @ key, residual, atol=1e-7)
    assert np.trace(other @ covariance @ other.T) > cost


@given(st.integers(0, 10**6))
def test_the_length_of_the_change_is_that_of_the_residual_over_the_denominator(seed):
    direction, key, residual = drawn(seed, M), drawn(seed + 1, M), drawn(seed + 2, D)
    found = rank_one(direction, key, residual)
    change = np.outer(found.u, found.v)
    np.testing.assert_allclose(np.linalg.norm(change), np.linalg.norm(residual) / abs(found.denominator), rtol=1e-10)
    np.testing.assert_allclose(found.denominator, key @ direction / np.linalg.norm(direction), rtol=1e-10)
    np.testing.assert_allclose(change @ key, residual, atol=1e-7 * np.linalg.norm(change))


def test_a_key_across_the_direction_gives_no_finite_change_and_no_warning():
    found = rank_one(np.eye(3)[0], np.eye(3)[1], np.ones(2))
    assert not np.isfinite(found.u).any()


@pytest.mark.parametrize("facts", [1, 4, 30])
def test_the_solution_of_memit_is_that_of_its_least_squares(facts):
    covariance, keys, residuals, weight = moment(0), drawn(1, M, facts), drawn(2, D, facts), 3.0
    solution = ridge_solution(np.linalg.solve(weight * covariance, keys), keys)
    change = residuals @ solution.T
    direct = residuals @ keys.T @ np.linalg.inv(weight * covariance + keys @ keys.T)
    np.testing.assert_allclose(change, direct, rtol=1e-7, atol=1e-9)
    rows = np.concatenate([keys.T, np.sqrt(weight) * np.real(sqrtm(covariance))])
    wanted = np.concatenate([residuals.T, np.zeros((M, D))])
    np.testing.assert_allclose(change, np.linalg.lstsq(rows, wanted)[0].T, rtol=1e-6, atol=1e-8)


def test_the_order_of_facts_does_not_matter_to_memit():
    covariance, keys, residuals, order = moment(0), drawn(1, M, 4), drawn(2, D, 4), [2, 0, 3, 1]
    one = residuals @ ridge_solution(np.linalg.solve(covariance, keys), keys).T
    other = residuals[:, order] @ ridge_solution(np.linalg.solve(covariance, keys[:, order]), keys[:, order]).T
    np.testing.assert_allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e4])
def test_one_fact_by_memit_is_that_by_rome_shrunk(weight):
    covariance, key, residual = moment(0), drawn(1, M), drawn(2, D)
    solved = np.linalg.solve(covariance, key)
    rome = rank_one(solved, key, residual)
    memit = np.outer(residual, ridge_solution(solved[:, None] / weight, key[:, None])[:, 0])
    share = key @ solved / (weight + key @ solved)
    np.testing.assert_allclose(memit, share * np.outer(rome.u, rome.v), rtol=1e-9)


def test_the_mixed_key_gives_the_bare_prompt_half_of_the_weight():
    keys = drawn(0, 2, 4, M)
    wanted = (keys[:, 0] + (keys[:, 1] + keys[:, 2] + keys[:, 3]) / 3) / 2
    np.testing.assert_allclose(mixed_keys(keys), wanted.T)
    np.testing.assert_allclose(mixed_keys(keys[:, :1]), keys[:, 0].T)


def test_the_projector_of_alphaedit_is_one_and_forgets_the_keys_to_be_preserved():
    preserved = drawn(0, M, 4)
    basis = null_space(*np.linalg.eigh(preserved @ preserved.T / 4), 1e-9)
    projector = basis @ basis.T
    assert basis.shape == (M, M - 4)
    np.testing.assert_allclose(projector @ projector, projector, atol=1e-12)
    np.testing.assert_array_equal(projector, projector.T)
    np.testing.assert_allclose(projector @ preserved, 0, atol=1e-12)
    change = drawn(1, D, 2) @ projected_solution(basis, drawn(2, M, 3), drawn(3, M, 2), 0.5).T
    np.testing.assert_allclose(change @ preserved, 0, atol=1e-12)
    assert np.abs(change).max() > 1e-2


@pytest.mark.parametrize("before", [0, 3])
def test_the_solution_of_alphaedit_is_its_formula(before):
    keys, past, residuals, ridge = drawn(1, M, 2), drawn(2, M, before), drawn(3, D, 2), 0.7
    basis = null_space(*np.linalg.eigh(moment(0)), 0.02)
    projector = basis @ basis.T
    system = projector @ (keys @ keys.T + past @ past.T) + ridge * np.eye(M)
    transposed = np.linalg.solve(system, projector @ keys @ residuals.T)
    np.testing.assert_allclose(residuals @ projected_solution(basis, past, keys, ridge).T, transposed.T, atol=1e-12)


def test_the_rules_of_the_null_space_compare_values_means_and_shares():
    values, vectors = np.asarray([1.0, 2.0, 3.0, 14.0]), np.eye(4)
    assert null_space(values, vectors, 3.0, "absolute").shape[1] == 2
    assert null_space(values, vectors, 0.5, "relative").shape[1] == 2  # the mean is 5
    assert null_space(values, vectors, 0.31, "energy").shape[1] == 3  # 1, 3, 6, 20 of 20
    assert null_space(100 * values, vectors, 0.5, "relative").shape[1] == 2
    assert null_space(100 * values, vectors, 0.31, "energy").shape[1] == 3


@pytest.mark.parametrize("rule", ["absolute", "relative", "energy"])
def test_an_empty_null_space_is_refused(rule):
    with pytest.raises(ValueError, match=f"null space of the keys is empty.*{rule}.*threshold 0.02"):
        null_space(np.ones(4), np.eye(4), 0.02, rule)


def test_alphaedit_without_a_ridge_is_refused():
    with pytest.raises(ValueError, match="`ridge` is 0"):
        projected_solution(np.eye(3), np.ones((3, 0)), np.ones((3, 1)), 0.0)
