"""Linear assignment behind one signature, with several solvers."""

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Int, Real

from permjax.match.solvers import SOLVERS, lookup
from permjax.match.square import check_columns, check_cost

__all__ = ["SOLVERS", "Solver", "solve"]

Solver: TypeAlias = str | Callable[[Any], Any]
"""Name of a solver in `SOLVERS`, or a function from one cost `[n, n]`, to be minimised, to the columns `[n]`."""


def solve(
    cost: Real[Array | np.ndarray, "*batch n n"],
    solver: Solver = "auto",
    maximize: bool = True,
    what: str = "the cost",
) -> Int[Array | np.ndarray, "*batch n"]:
    """Assign every row its own column so that `sum_i cost[i, assignment[i]]` is largest (or smallest).

    Args:
        cost: one square cost `[n, n]` or a batch `[..., n, n]`: rows are the anchor's units, columns the other's.
        solver: the name of one, or a function `cost [n, n] -> columns [n]` that minimises.

            - `"auto"`: the quickest of the others for the size, the batch and the place of the cost; see
              `permjax.match.solvers.choose`.
            - `"scipy"`: exact, float64, on the host; several costs in several threads.
            - `"lapx"`: the same with the package lapx (extra `fast`; its Jonker-Volgenant solver with float64 duals),
              three to six times as quick on hard costs. Among equal optima it may take another one.
            - `"optax"`: Hungarian, on the device, also under a trace, in the dtype of the cost.
            - `"auction"`: on the device, also under a trace. A concrete cost is solved in float64 to
              `n * 2**-40` of its spread, and finished by SciPy if the rounds run out; a traced one in its own dtype,
              and whether it converged is told by `permjax.match.auction.auction`.
        maximize: whether the cost is a gain.
        what: what to call the cost in a message.

    Returns:
        int32 `[..., n]`, a NumPy array unless the solver works on the device.

    Raises:
        ValueError: the cost is not square or not finite (not checked under a trace), the solver is unknown or not
            installed, or its answer is no assignment.

    Example:
        >>> solve(np.array([[1.0, 3.0], [2.0, 5.0]]))
        array([0, 1], dtype=int32)
    """
    check_cost(cost, what)
    run = _each(solver) if callable(solver) else lookup(solver)
    batch = cost.reshape(prod(cost.shape[:-2]), *cost.shape[-2:])
    return run(-batch if maximize else batch).reshape(cost.shape[:-1])


def _each(solver: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    def run(batch: Any) -> np.ndarray:
        rows = [check_columns(np.asarray(solver(cost)), cost.shape[0]) for cost in batch]
        return np.array(rows, np.int32).reshape(batch.shape[:-1])

    return run
