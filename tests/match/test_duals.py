"""Duals: the certificate proves an optimum, and a warm start finds the same one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from permjax.match import warm
from permjax.match.assignment import solve
from permjax.match.duals import certificate, potentials
from permjax.match.warm import Warm

pytestmark = pytest.mark.fast


def draw_cost(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*batch, n, n)).astype(np.float32)


def draw_drift(n: int, noise: float, calls: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    gain = rng.standard_normal((n, 4)) @ rng.standard_normal((4, n))
    return [(gain + k * noise * rng.standard_normal((n, n))).astype(np.float32) for k in range(calls)]


def value(cost, assignment) -> float:
    return float(np.take_along_axis(np.asarray(cost, np.float64), np.asarray(assignment)[..., None], -1).sum())


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


def test_nothing_to_certify():
    assert certificate(np.zeros((0, 0)), np.zeros(0, np.int32)).gap == 0


@pytest.mark.parametrize("n", [5, 70])
def test_potentials_from_any_start_are_duals(n):
    low = draw_cost(n).astype(np.float64)
    best = linear_sum_assignment(low)[1]
    for start in (None, np.random.default_rng(1).standard_normal(n)):
        reduced = low - potentials(low, best, start)
        np.testing.assert_allclose(reduced[np.arange(n), best], reduced.min(1), atol=1e-12)


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """Let small costs start warm, and count the duals that are worked out."""
    monkeypatch.setattr(warm, "SMALLEST", 1)
    calls: list[int] = []

    def counted(low, *args):
        calls.append(len(low))
        return potentials(low, *args)

    monkeypatch.setattr(warm, "potentials", counted)
    return calls


@pytest.mark.parametrize("solver", ["auto", "scipy", "lapx"])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.02, 0.5])
def test_a_warm_start_finds_the_same_value(solver, noise, used):
    assign = Warm(solver)
    for gain in draw_drift(40, noise):
        assert value(gain, assign(gain, key="h")) == pytest.approx(value(gain, solve(gain, "scipy")), rel=1e-12)
    assert noise == 0.5 or used  # duals were at work


def test_keys_and_batches_are_kept_apart(used):
    assign, gains = Warm(), [np.stack(pair) for pair in zip(draw_drift(30, 0.01), draw_drift(30, 0.02), strict=True)]
    for gain in gains:
        for key, sign in (("a", 1), ("b", -1)):
            found = assign(sign * gain[:, None], key=key)
            assert found.shape == (2, 1, 30)
            assert value(sign * gain[:, None], found) == pytest.approx(value(sign * gain, solve(sign * gain)))
    assert len(used) >= 4


def test_no_duals_are_worked_out_for_easy_or_wild_costs(used):
    easy, wild = Warm(), Warm()
    for seed in range(4):
        easy(5 * np.eye(20) + 0.1 * draw_cost(20, seed))
        wild(draw_cost(20, seed))
    assert not used


def test_a_change_of_size_starts_anew(used):
    assign = Warm()
    for n in (20, 20, 12, 20):
        gain = draw_drift(n, 0.0)[0]
        assert value(gain, assign(gain)) == pytest.approx(value(gain, solve(gain)))


def test_a_warm_start_takes_traced_costs_other_solvers_and_jax_arrays(used):
    gain = jnp.asarray(draw_drift(12, 0.0)[0])
    expected = solve(gain, "scipy")
    np.testing.assert_array_equal(jax.jit(Warm())(gain), expected)
    np.testing.assert_array_equal(Warm("optax")(gain), expected)
    np.testing.assert_array_equal(Warm()(gain), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_warm_start_refuses_what_is_not_finite(bad, used):
    assign, gain = Warm(what="the cost of group 'h'"), draw_drift(10, 0.0)[0]
    for _ in range(3):
        assign(gain)
    gain[3, 4] = bad
    with pytest.raises(ValueError, match=r"the cost of group 'h' .* first at \(3, 4\)"):
        assign(gain)


def test_a_warm_start_names_the_nearest_solver():
    with pytest.raises(ValueError, match="did you mean 'lapx'"):
        Warm("lapjx")(draw_cost(3))
