"""Assignments of costs that change little from call to call, started from the duals of an earlier one."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int, Real

from permjax.match.assignment import Solver, solve
from permjax.match.duals import potentials
from permjax.match.solvers import is_local, lookup, on_host
from permjax.match.square import check_cost

SMALLEST = 1024  # below, a solve is as quick as its preparation
CONTESTED = 0.25  # share of rows whose favourite column is another row's too, from which a cost is hard
STEADY, STALE = 0.5, 0.25  # share of rows that change column: at most from call to call, and until duals are renewed
ROUNDS = 100


class _Duals(NamedTuple):
    """Column duals, and the assignment that they belong to."""

    values: np.ndarray
    columns: np.ndarray


class _Kept(NamedTuple):
    """The last assignment, and duals if they promise to help."""

    columns: np.ndarray
    duals: _Duals | None


@dataclass(frozen=True)
class Warm:
    """Solve costs that come again with small changes, as in straight-through matching, from the duals of earlier ones.

    `cost[i, j] - u[i] - v[j]` has the same optimum as `cost`; with the duals of a similar cost nearly every row's
    favourite is its own. The value found is that of a cold start; among equal optima the assignment may differ.

    Duals cost several passes over the matrix, so they are used only where they pay: for costs on the host of at least
    1024 rows, a quarter of which want a column that another one wants too, and after a call in which fewer than half of
    the rows changed column; they are renewed when a quarter of the rows have changed since. Everything else goes
    straight to `solve`.

    Args:
        solver: as in `permjax.match.assignment.solve`; the host solvers start warm, all others cold.
        what: what to call the cost in a message.

    Example:
        >>> assign = Warm()
        >>> for step in range(steps):
        ...     columns = assign(cost(step), key="layer 0")
    """

    solver: Solver = "auto"
    what: str = "the cost"
    _kept: dict[Hashable, _Kept] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, cost: Real[Array | np.ndarray, "*batch n n"], key: Hashable = None) -> Int[Any, "*batch n"]:
        """Return the columns of largest total cost, int32 `[..., n]`.

        Args:
            cost: one gain or a batch of them.
            key: which sequence of costs it belongs to.

        Raises:
            ValueError: as `solve` does.
        """
        if cost.shape[-1] < SMALLEST or self.solver not in ("auto", "scipy", "lapx") or not is_local(cost):
            return solve(cost, self.solver, what=self.what)
        check_cost(cost, self.what)
        gains = np.asarray(cost).reshape(prod(cost.shape[:-2]), *cost.shape[-2:])
        found = on_host(self._one, gains, [(key, place) for place in range(len(gains))])
        return found.reshape(cost.shape[:-1])

    def _one(self, gain: np.ndarray, key: Hashable) -> np.ndarray:
        old = self._kept.get(key)
        if old is None or len(old.columns) != len(gain):
            old = _Kept(np.full(len(gain), -1, np.int32), None)
        columns = self._found(gain, old)
        steady = _moved(columns, old.columns) < STEADY
        self._kept[key] = _Kept(columns, _renewed(gain, columns, old.duals) if steady else None)
        return columns

    def _found(self, gain: np.ndarray, old: _Kept) -> np.ndarray:
        if old.duals is None:
            return self._cold(gain)
        reduced = gain - old.duals.values.astype(np.float64)
        reduced -= reduced.max(1, keepdims=True)
        if not reduced[np.arange(len(gain)), old.columns].any():  # every row still has a favourite of its own
            return old.columns
        return self._cold(reduced)

    def _cold(self, gain: np.ndarray) -> np.ndarray:
        return np.asarray(lookup(str(self.solver))(-gain[None])[0])


def _renewed(gain: np.ndarray, columns: np.ndarray, old: _Duals | None) -> _Duals | None:
    if old is not None and _moved(columns, old.columns) < STALE:
        return old
    if len(np.unique(gain.argmax(1))) > (1 - CONTESTED) * len(gain):
        return None
    return _Duals(-potentials(-gain, columns, None if old is None else -old.values, ROUNDS), columns)


def _moved(columns: np.ndarray, before: np.ndarray) -> float:
    return float(np.mean(columns != before))
