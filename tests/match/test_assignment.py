"""Assignment: all solvers find the same optimum, and the certificate proves it."""

from inspect import unwrap
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.match.assignment import SOLVERS, certificate, solve

pytestmark = pytest.mark.fast


def draw_cost(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*batch, n, n)).astype(np.float32)


def value(cost, assignment) -> float:
    return float(np.take_along_axis(np.asarray(cost, np.float64), np.asarray(assignment)[..., None], -1).sum())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("maximize", [True, False])
def test_no_assignment_beats_the_solvers(solver, maximize):
    cost = draw_cost(5)
    found = solve(cost, solver, maximize)
    values = [cost[np.arange(5), list(p)].sum() for p in permutations(range(5))]
    assert value(cost, found) == pytest.approx(max(values) if maximize else min(values))
    assert found.dtype == np.int32


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_solved_one_by_one(solver):
    costs = draw_cost(4, batch=(2, 3))
    found = np.asarray(solve(costs, solver))
    assert found.shape == (2, 3, 4)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(found[index], solve(costs[index]))


def test_row_i_takes_column_i_of_the_answer():
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(solve(np.eye(3)[order]), order)


def test_optax_works_under_jit_and_vmap():
    costs = jnp.asarray(draw_cost(4, batch=(3,)))
    expected = solve(costs, "scipy")
    np.testing.assert_array_equal(jax.jit(lambda c: solve(c, "optax"))(costs), expected)
    np.testing.assert_array_equal(jax.vmap(lambda c: solve(c, "optax"))(costs), expected)


def test_a_function_is_a_solver():
    def backwards(cost):
        return np.arange(cost.shape[0])[::-1]

    np.testing.assert_array_equal(solve(draw_cost(3, batch=(2,)), backwards), [[2, 1, 0]] * 2)


def test_a_function_that_gives_no_assignment_is_refused():
    with pytest.raises(ValueError, match=r"each of the columns 0\.\.2 once"):
        solve(draw_cost(3), lambda cost: np.zeros(cost.shape[0], int))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", [np, jnp])
def test_costs_that_are_not_finite_are_refused(solver, bad, backend):
    cost = draw_cost(3)
    cost[1, 2] = cost[2, 0] = bad
    with pytest.raises(
        ValueError, match=r"the cost of group 'h' .* 2 values that are not finite, the first at \(1, 2\)"
    ):
        solve(backend.asarray(cost), solver, what="the cost of group 'h'")


def test_costs_must_be_square():
    with pytest.raises(ValueError, match=r"must be square.* \(3, 4\)"):
        unwrap(solve)(np.zeros((3, 4)))  # without the shape check of the annotations


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match=r"no solver 'simplex'.*optax.*scipy"):
        solve(draw_cost(2), "simplex")


def test_nothing_to_assign():
    assert solve(np.zeros((3, 0, 0))).shape == (3, 0)
    assert certificate(np.zeros((0, 0)), np.zeros(0, np.int32)).gap == 0


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_the_certificate_of_an_optimum_has_no_gap(maximize, seed):
    cost = draw_cost(12, seed)
    proof = certificate(cost, solve(cost, maximize=maximize), maximize)
    assert proof.gap == pytest.approx(0, abs=1e-9)
    assert proof.primal == pytest.approx(value(cost, solve(cost, maximize=maximize)))


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_the_duals_are_feasible_and_the_gap_is_the_distance_to_the_optimum(maximize, seed):
    cost, given = draw_cost(9, seed), np.random.default_rng(seed).permutation(9)
    proof = certificate(cost, given, maximize)
    slack = proof.u[:, None] + proof.v - cost
    assert (slack >= -1e-9).all() if maximize else (slack <= 1e-9).all()
    best = value(cost, solve(cost, maximize=maximize))
    assert proof.gap > 0
    assert proof.gap == pytest.approx(abs(best - value(cost, given)))
    assert proof.dual == pytest.approx(best)


def test_the_certificate_stands_ties():
    proof = certificate(np.zeros((6, 6)), np.arange(6)[::-1])
    assert proof.gap == pytest.approx(0, abs=1e-12)


def test_the_certificate_refuses_what_is_no_assignment():
    with pytest.raises(ValueError, match="once"):
        certificate(draw_cost(3), np.array([0, 0, 1]))
