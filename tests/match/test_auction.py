"""The auction: an optimum within its certificate, whatever the cost."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from permjax.match.auction import auction

pytestmark = pytest.mark.fast

TOGETHER = jax.jit(jax.vmap(auction))


def value(gain, columns) -> float:
    return float(np.asarray(gain, np.float64)[np.arange(len(gain)), np.asarray(columns)].sum())


def optimum(gain) -> float:
    return value(gain, linear_sum_assignment(np.asarray(gain, np.float64), maximize=True)[1])


def size(gain) -> float:
    return float(abs(np.asarray(gain, np.float64)).max(initial=0))


def repeated(rng, n):
    return rng.standard_normal((n, n))[rng.integers(0, n, n)][:, rng.integers(0, n, n)]


def dead(rng, n):
    return rng.standard_normal((n, n)) * (np.arange(n) % 2) * (np.arange(n) % 3 > 0)[:, None]


KINDS = {
    "normal": lambda rng, n: rng.standard_normal((n, n)),
    "negative": lambda rng, n: -rng.random((n, n)) - 5,
    "ties": lambda rng, n: rng.integers(-1, 2, (n, n)),
    "repeated rows and columns": repeated,
    "dead units": dead,
    "rank 1": lambda rng, n: rng.standard_normal((n, 1)) * rng.standard_normal(n),
    "constant": lambda _, n: np.full((n, n), -2.5),
    "huge": lambda rng, n: 1e38 * rng.uniform(-1, 1, (n, n)),
    "tiny": lambda rng, n: 1e-30 * rng.standard_normal((n, n)),
    "uneven rows": lambda rng, n: rng.standard_normal((n, n)) + 1e4 * rng.standard_normal((n, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_value_is_the_optimum_within_the_certificate(kind, n):
    for seed in range(4):
        gain = KINDS[kind](np.random.default_rng(seed), n).astype(np.float32)
        found = auction(gain)
        lacking = optimum(gain) - value(gain, found.columns)
        assert found.converged
        assert sorted(np.asarray(found.columns)) == list(range(n))
        assert lacking <= found.gap + 1e-14 * n * size(gain)
        assert found.gap <= n * 2**-19 * 2 * size(gain)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("n", [2, 3])
def test_integers_are_solved_exactly(maximize, n):
    for seed in range(5):
        cost = np.random.default_rng(seed).integers(-50, 50, (n, n))
        values = [cost[np.arange(n), list(p)].sum() for p in permutations(range(n))]
        assert value(cost, auction(cost, maximize=maximize).columns) == (max if maximize else min)(values)


def test_the_prices_are_duals_that_prove_the_gap():
    gain = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    for maximize, sign in ((True, 1.0), (False, -1.0)):
        found = auction(gain, maximize=maximize, epsilon=0.05)
        prices = np.asarray(found.prices, np.float64)
        bound = (sign * gain - prices).max(1).sum() + prices.sum()
        assert found.gap == pytest.approx(bound - sign * value(gain, found.columns), abs=1e-12)
        assert bound >= optimum(sign * gain)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        gain = np.random.default_rng(0).standard_normal((8, 8))
        found = auction(gain)
        assert found.prices.dtype == np.float64
        assert found.gap < 1e-10


def test_jit_and_vmap_change_nothing():
    gains = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8)), jnp.float32)
    together = TOGETHER(gains)
    assert together.gap.dtype == jnp.float32
    for place, gain in enumerate(gains):
        alone = auction(gain)
        np.testing.assert_array_equal(together.columns[place], alone.columns)
        np.testing.assert_allclose(together.gap[place], alone.gap, atol=1e-5)


def test_an_auction_starts_from_prices():
    rng = np.random.default_rng(0)
    gain = rng.standard_normal((20, 4)) @ rng.standard_normal((4, 20))
    cold = auction(gain)
    again = auction(gain, prices=cold.prices)
    near = auction(gain + 1e-3 * rng.standard_normal(gain.shape), prices=cold.prices)
    assert again.rounds < cold.rounds
    assert value(gain, again.columns) == pytest.approx(optimum(gain), abs=1e-3)
    assert near.converged


def test_any_prices_will_do_to_start_from():
    gain = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    found = auction(gain, prices=np.float32(1e3) * np.random.default_rng(2).standard_normal(8).astype(np.float32))
    assert optimum(gain) - value(gain, found.columns) <= found.gap + 1e-12


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_an_auction_out_of_rounds_says_so_and_still_assigns(budget):
    gain = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    found = auction(gain, max_rounds=budget, block=16)
    assert not found.converged
    assert found.rounds == budget
    assert sorted(np.asarray(found.columns)) == list(range(20))
    assert optimum(gain) - value(gain, found.columns) <= found.gap + 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_refused_or_flagged(bad):
    gains = np.zeros((4, 8, 8), np.float32)
    gains[:, 1, 2] = bad
    with pytest.raises(ValueError, match=r"not finite, the first at \(1, 2\)"):
        auction(gains[0])
    traced = TOGETHER(gains)
    assert not traced.converged.any()
    np.testing.assert_array_equal(np.sort(traced.columns), np.broadcast_to(np.arange(8), (4, 8)))


def test_nothing_to_auction():
    found = auction(np.zeros((0, 0)))
    assert found.columns.shape == (0,)
    assert found.gap == 0
    assert found.converged
