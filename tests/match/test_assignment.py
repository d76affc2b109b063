"""Assignment: all solvers find the same optimum."""

from functools import partial
from inspect import unwrap
from itertools import permutations
from threading import current_thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from permjax.match import solvers
from permjax.match.assignment import SOLVERS, solve
from permjax.match.solvers import choose, on_host

pytestmark = pytest.mark.fast


def draw_cost(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*batch, n, n)).astype(np.float32)


def value(cost, assignment) -> float:
    return float(np.take_along_axis(np.asarray(cost, np.float64), np.asarray(assignment)[..., None], -1).sum())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("maximize", [True, False])
def test_no_assignment_beats_the_solvers(solver, maximize):
    cost = draw_cost(4)
    found = solve(cost, solver, maximize)
    values = [cost[np.arange(4), list(p)].sum() for p in permutations(range(4))]
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


KINDS = {
    "normal": lambda rng, n: rng.standard_normal((n, n)),
    "ties": lambda rng, n: rng.integers(0, 3, (n, n)).astype(float),
    "repeated": lambda rng, n: rng.standard_normal((n, n))[rng.integers(0, n, n)][:, rng.integers(0, n, n)],
    "rank 1": lambda rng, n: rng.standard_normal((n, 1)) * rng.standard_normal(n),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_finds_the_value_of_scipy(solver, kind):
    for seed, n in enumerate((1, 2, 3, 3, 4, 4, 4, 20, 20, 20)):
        cost = KINDS[kind](np.random.default_rng(seed), n).astype(np.float32)
        best = cost.astype(np.float64)[linear_sum_assignment(cost)].sum()
        exact = 1e-4 if solver == "optax" else 1e-9
        assert value(cost, solve(cost, solver, maximize=False)) == pytest.approx(best, rel=exact, abs=exact)


@pytest.mark.parametrize("solver", ["optax", "auction", "auto"])
def test_solvers_of_the_device_work_under_jit_and_vmap(solver):
    costs = jnp.asarray(draw_cost(4, batch=(3,)))
    expected = solve(costs, "scipy")
    np.testing.assert_array_equal(jax.jit(lambda c: solve(c, solver))(costs), expected)
    np.testing.assert_array_equal(jax.vmap(lambda c: solve(c, solver))(costs), expected)


def test_the_choice_goes_by_place_size_and_batch(monkeypatch):
    assert [choose(n, 1, True) for n in (16, 255, 256)] == ["optax", "optax", "auction"]
    assert [choose(n, 8, True) for n in (16, 64)] == ["optax", "auction"]
    assert [choose(n, 1, False) for n in (8, 512)] == ["scipy", "lapx"]
    monkeypatch.setattr(solvers, "lapx", lambda: None)
    assert choose(512, 1, False) == "scipy"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(solvers, "lapx", lambda: None)
    with pytest.raises(ValueError, match=r"permjax\[fast\]"):
        solve(draw_cost(3), "lapx")
    assert solve(draw_cost(64)).shape == (64,)


@pytest.mark.parametrize("solver", ["scipy", "lapx"])
def test_threads_change_nothing(solver, monkeypatch):
    costs = draw_cost(40, batch=(5,))
    alone = [solve(cost, solver) for cost in costs]
    monkeypatch.setattr(solvers, "PARALLEL", 1)
    monkeypatch.setattr(solvers, "_cores", lambda: 3)
    np.testing.assert_array_equal(solve(costs, solver), alone)


def test_threads_share_the_work(monkeypatch):
    monkeypatch.setattr(solvers, "_cores", lambda: 3)
    seen = set()
    on_host(lambda cost: seen.add(current_thread().name) or np.arange(len(cost)), np.zeros((3, 128, 128)))
    assert not any(name == "MainThread" for name in seen)


def test_an_auction_out_of_rounds_is_finished_exactly(monkeypatch):
    costs = draw_cost(20, batch=(2,))
    monkeypatch.setattr(solvers, "auction", partial(solvers.auction, max_rounds=3))
    np.testing.assert_array_equal(solve(costs, "auction"), solve(costs, "scipy"))


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


def test_the_nearest_solver_is_named():
    with pytest.raises(ValueError, match="did you mean 'auction'"):
        solve(draw_cost(2), "action")


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_assign(solver):
    assert solve(np.zeros((3, 0, 0)), "auto" if solver == "optax" else solver).shape == (3, 0)
    assert solve(np.zeros((0, 2, 2), np.float32), solver).shape == (0, 2)
