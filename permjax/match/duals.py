"""Duals of an assignment: the proof that it is optimal, and what makes the next similar cost easy."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Real
from scipy.optimize import linear_sum_assignment

from permjax.match.square import check_columns, check_cost

_ROWS = 32  # relaxed at once, so that they stay in the cache


class Certificate(NamedTuple):
    """Value of an assignment and a bound that no assignment can pass, with the duals that prove it.

    Attributes:
        primal: value of the assignment, float64.
        dual: `sum(u) + sum(v)`: an upper bound on every assignment's value if maximising, a lower bound otherwise.
        gap: distance between the two, zero up to rounding if and only if the assignment is optimal.
        u: one dual for each row, `[n]`.
        v: one dual for each column, `[n]`; `u[i] + v[j] >= cost[i, j]` if maximising, `<=` otherwise.
    """

    primal: float
    dual: float
    gap: float
    u: Float[np.ndarray, " n"]
    v: Float[np.ndarray, " n"]


def certificate(
    cost: Real[Array | np.ndarray, "n n"], assignment: Int[Array | np.ndarray, " n"], maximize: bool = True
) -> Certificate:
    """Measure how far an assignment is from the optimum, with a proof.

    The duals are shortest distances in the residual graph of an optimal assignment; `u` is then set to the tightest
    feasible value, so that the bound holds whatever the rounding.

    Args:
        cost: one square cost.
        assignment: column of every row, as from `solve`; need not be optimal.
        maximize: whether the cost is a gain.

    Raises:
        ValueError: the cost is not square or not finite, or `assignment` is no assignment.
    """
    check_cost(cost, "the cost")
    low = np.asarray(cost, np.float64) * (-1.0 if maximize else 1.0)
    given = check_columns(np.asarray(assignment), len(low))
    v = potentials(low, linear_sum_assignment(low)[1])
    u = (low - v).min(1, initial=np.inf)
    primal, dual = float(low[np.arange(len(low)), given].sum()), float(u.sum() + v.sum())
    sign = -1.0 if maximize else 1.0
    return Certificate(sign * primal, sign * dual, primal - dual, sign * u, sign * v)


def potentials(
    low: Float[np.ndarray, "n n"],
    best: Int[np.ndarray, " n"],
    start: Float[np.ndarray, " n"] | None = None,
    rounds: int | None = None,
) -> Float[np.ndarray, " n"]:
    """Return column duals `v` of a minimal assignment: `low - v` is smallest in every row at its column.

    Shortest distances by Bellman and Ford, where only rows that came nearer are looked at again: an edge from row `i`
    to row `k` hands `i` the column of `k` and has the length `low[i, best[k]] - low[i, best[i]]`.

    Args:
        low: the cost, to be minimised.
        best: its assignment.
        start: duals to start from, as of a similar cost; zero by default. Fewer rows change then.
        rounds: limit of the rounds, by default as many as the proof needs; with fewer, `v` is nearly dual.
    """
    n = len(low)
    own = low[np.arange(n), best]
    length = np.zeros(n, low.dtype) if start is None else start[best].astype(low.dtype)
    active = np.arange(n)
    for _ in range(n if rounds is None else rounds):
        reached = _nearest(low, active, (length - own)[active])[best]
        active = np.flatnonzero(reached < length)
        if not len(active):
            break
        length = np.minimum(length, reached)
    duals = np.empty_like(length)
    duals[best] = length
    return duals


def _nearest(low: np.ndarray, rows: np.ndarray, add: np.ndarray) -> np.ndarray:
    """`min_i low[rows[i]] + add[i]`, a few rows at a time."""
    nearest = np.full(low.shape[1], np.inf, low.dtype)
    for begin in range(0, len(rows), _ROWS):
        some = slice(begin, begin + _ROWS)
        np.minimum(nearest, (low[rows[some]] + add[some, None]).min(0), out=nearest)
    return nearest
