"""Linear assignment as an auction: on the device, under `jit` and `vmap`, with a certified gap."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from permjax.match.square import check_cost
from permjax.permutation import is_traced

SHRINK = 8.0  # from the epsilon of one phase to that of the next
COLD, WARM = 2.0**-7, 2.0**-13  # the first epsilon, without and with prices to start from
FINEST = 2.0**-40  # the last epsilon by default, where the dtype allows it


class Auction(NamedTuple):
    """Outcome of an auction.

    Attributes:
        columns: column of every row; always an assignment, even if the rounds ran out.
        prices: one for every column, in units of the cost. Row `i` finds the columns with the largest
            `gain[i] - prices` cheapest, where the gain is the cost, or minus the cost if minimising.
        gap: what the assignment lacks at most to the optimum, by the prices. Concrete costs: a float64 scalar from the
            cost as given; under a trace: in the dtype of the auction, up to its rounding.
        rounds: rounds of bidding.
        converged: whether every row is within `epsilon` of its best column; if not, only `gap` says how good it is.
    """

    columns: Int[Array, " n"]
    prices: Float[Array, " n"]
    gap: Float[Array, ""] | np.float64
    rounds: Int[Array, ""]
    converged: Bool[Array, ""]


def auction(
    cost: Real[Array | np.ndarray, "n n"],
    *,
    maximize: bool = True,
    prices: Float[Array | np.ndarray, " n"] | None = None,
    epsilon: float | None = None,
    max_rounds: int | None = None,
    block: int | None = None,
) -> Auction:
    """Assign rows to columns by bidding: `sum_i gain[i, columns[i]]` within `n * epsilon * spread` of the largest.

    Rows without a column bid for their best one, by what it is better than their second best, plus epsilon; epsilon
    falls from phase to phase. By the prices, `sum_i max_j (gain[i, j] - prices[j]) + sum(prices)` bounds every
    assignment's value, which certifies the gap. Integers with `n * epsilon * spread < 1` are solved exactly.

    Works under `jit` and `vmap`. Many equal rows and columns (dead units) cost most: the price of each of them has to
    rise step by step.

    Args:
        cost: one square cost; float64 stays float64 where JAX has it on, all else is float32.
        maximize: whether the cost is a gain.
        prices: to start from, as from a similar cost.
        epsilon: what a row may lack, as a share of the spread: the largest cost after the best of every row and column
            has been subtracted (if all is equal, the cost itself), rounded up to a power of two. By default `2**-40`,
            and for float32 `2**-20`.
        max_rounds: limit of the rounds of bidding, by default `20_000 + 200 n`.
        block: rows that bid at once, by default 16 on a CPU and 256 elsewhere.

    Raises:
        ValueError: the cost is not square or not finite. Under a trace a cost that is not finite gives
            `converged=False` and some assignment.

    Example:
        >>> found = auction(np.array([[1.0, 3.0], [2.0, 5.0]]))
        >>> found.columns.tolist(), float(found.gap)
        ([0, 1], 0.0)

    Source:
        Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem", Annals of
        Operations Research 14 (1988), with epsilon-scaling; here with blocks of bidders, and rows that stay within the
        next epsilon keep their column.
    """
    check_cost(cost, "the cost")
    gain = jnp.asarray(cost)
    n, dtype = len(gain), np.dtype(np.float64 if gain.dtype == np.float64 else np.float32)
    gain = gain.astype(dtype)
    first = jnp.zeros(n, dtype) if prices is None else jnp.asarray(prices).astype(dtype)
    found = _auction(
        gain if maximize else -gain,
        first,
        jnp.asarray(max(FINEST, 8 * jnp.finfo(dtype).eps) if epsilon is None else epsilon, dtype),
        jnp.asarray(COLD if prices is None else WARM, dtype),
        jnp.asarray(20_000 + 200 * n if max_rounds is None else max_rounds, jnp.int32),
        block or (16 if jax.default_backend() == "cpu" else 256),
    )
    return found if is_traced(*found) else found._replace(gap=_gap(cost, found, maximize))


def _gap(cost: Any, found: Auction, maximize: bool) -> np.float64:
    """Distance from the assignment to the bound by the prices, in float64."""
    with jax.enable_x64(True):
        gain = jnp.asarray(cost).astype(np.float64) * (1.0 if maximize else -1.0)
        value = gain - found.prices.astype(np.float64)[None]
        own = jnp.take_along_axis(value, found.columns[:, None], 1)[:, 0]
        return np.float64((value.max(1, initial=-np.inf) - own).sum())


class _Market(NamedTuple):
    """Prices, the column of every row (-1: none), the row of every column (n: none), and the rounds so far."""

    prices: Array
    columns: Array
    rows: Array
    rounds: Array


class _Phase(NamedTuple):
    """A market, what every row lacks to its best column, and the next epsilon."""

    market: _Market
    lack: Array
    epsilon: Array


@partial(jax.jit, static_argnames="block")
def _auction(gain: Array, prices: Array, epsilon: Array, start: Array, budget: Array, block: int) -> Auction:
    n, dtype = gain.shape[0], gain.dtype
    if n == 0:
        return Auction(jnp.zeros(0, jnp.int32), prices, jnp.zeros((), dtype), jnp.zeros((), jnp.int32), jnp.array(True))
    gain, offset, exponent = _normalised(gain, prices)
    budget = jnp.where(jnp.isfinite(gain).all(), budget, 0)

    def step(now: _Phase) -> _Phase:
        market = _phase(gain, now, budget, min(block, n))
        return _Phase(market, _lack(gain, market), jnp.maximum(now.epsilon / SHRINK, epsilon))

    nobody = jnp.full(n, -1, jnp.int32), jnp.full(n, n, jnp.int32)
    empty = _Market(jnp.zeros(n, dtype), *nobody, jnp.zeros((), jnp.int32))
    begin = _Phase(empty, jnp.full(n, jnp.inf, dtype), jnp.maximum(start, epsilon))
    end = lax.while_loop(lambda now: ~(now.lack.max() <= epsilon) & (now.market.rounds < budget), step, begin)
    market = _filled(end.market)
    gap = jnp.ldexp(_lack(gain, market).sum(), exponent)
    raised = offset + jnp.ldexp(market.prices, exponent)
    return Auction(market.columns, raised, gap, market.rounds, end.lack.max() <= epsilon)


def _normalised(gain: Array, prices: Array) -> tuple[Array, Array, Array]:
    """Return the gain with best entry 0 in every row and column and spread about 1, the prices, and the exponent.

    Scaling by a power of two keeps integers exact.
    """
    size = jnp.frexp(jnp.maximum(abs(gain).max(), abs(prices).max()))[1] + 1
    gain, prices = jnp.ldexp(gain, -size), jnp.ldexp(prices, -size)
    gain = gain - prices[None]
    gain = gain - gain.max(1, keepdims=True)
    best = gain.max(0)
    gain = gain - best[None]
    spread = jnp.frexp(-gain.min())[1]
    return jnp.ldexp(gain, -spread), jnp.ldexp(prices + best, size), size + spread


def _phase(gain: Array, now: _Phase, budget: Array, block: int) -> _Market:
    """Bid until every row has a column; rows that lack no more than epsilon keep theirs."""
    n = len(gain)
    columns = jnp.where(now.lack <= now.epsilon, now.market.columns, -1)
    rows = (
        jnp.full(n, n, jnp.int32)
        .at[jnp.where(columns >= 0, columns, n)]
        .set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    )
    prices = now.market.prices - now.market.prices.min()
    return lax.while_loop(
        lambda market: (market.columns < 0).any() & (market.rounds < budget),
        lambda market: _round(gain, market, now.epsilon, block),
        _Market(prices, columns, rows, now.market.rounds),
    )


def _round(gain: Array, market: _Market, epsilon: Array, block: int) -> _Market:
    """Some rows without a column bid; every column goes to its highest bidder."""
    prices, columns, rows, rounds = market
    n = len(gain)
    units = jnp.arange(n, dtype=jnp.int32)
    bidders = jnp.nonzero(columns < 0, size=block, fill_value=n)[0].astype(jnp.int32)
    wanted, offer = _bids(gain.at[bidders].get(mode="clip") - prices[None], bidders, prices, epsilon)
    offer = jnp.where(bidders < n, offer, -jnp.inf)
    top = jnp.full(n, -jnp.inf, gain.dtype).at[wanted].max(offer)
    wins = (offer == top[wanted]) & (bidders < n)
    buyer = jnp.full(n, n, jnp.int32).at[jnp.where(wins, wanted, n)].min(bidders, mode="drop")
    sold = buyer < n
    columns = columns.at[jnp.where(sold, rows, n)].set(-1, mode="drop")
    columns = columns.at[jnp.where(sold, buyer, n)].set(units, mode="drop")
    return _Market(jnp.where(sold, top, prices), columns, jnp.where(sold, buyer, rows), rounds + 1)


def _bids(value: Array, bidders: Array, prices: Array, epsilon: Array) -> tuple[Array, Array]:
    """The best column of every bidder, and what it offers; of equal ones the first from its own place on.

    A bid leaves the bidder three quarters of epsilon below its second best, so that rounding stays within epsilon.
    """
    n = value.shape[1]
    best = value.max(1)
    turn = jnp.arange(n, dtype=jnp.int32)[None] - bidders[:, None]
    turn = jnp.where(value == best[:, None], jnp.where(turn < 0, turn + n, turn), n)
    first = turn.min(1)
    second = jnp.where(turn == first[:, None], -jnp.inf, value).max(1)
    margin = jnp.where(second > -jnp.inf, best - second, 0)
    wanted = (first + bidders) % n
    return wanted, prices[wanted] + margin + epsilon * jnp.asarray(0.75, epsilon.dtype)


def _lack(gain: Array, market: _Market) -> Array:
    """What every row lacks to its best column at these prices."""
    value = gain - market.prices[None]
    own = jnp.take_along_axis(value, jnp.maximum(market.columns, 0)[:, None], 1)[:, 0]
    return jnp.where(market.columns < 0, jnp.inf, value.max(1) - own)


def _filled(market: _Market) -> _Market:
    """Give the rows without a column those that are left."""
    n = len(market.rows)
    row = jnp.nonzero(market.columns < 0, size=n, fill_value=n)[0]
    column = jnp.nonzero(market.rows == n, size=n, fill_value=n)[0].astype(jnp.int32)
    return market._replace(columns=market.columns.at[row].set(column, mode="drop"))
