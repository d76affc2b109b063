"""Linear assignment behind one signature, with several solvers and a certificate of optimality."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real
from optax.assignment import hungarian_algorithm
from scipy.optimize import linear_sum_assignment

from permjax.permutation import is_traced, namespace

Solver: TypeAlias = str | Callable[[Any], Any]
"""Name of a solver in `SOLVERS`, or a function from one cost `[n, n]`, to be minimised, to the columns `[n]`."""


def solve(
    cost: Real[Array | np.ndarray, "*batch n n"],
    solver: Solver = "scipy",
    maximize: bool = True,
    what: str = "the cost",
) -> Int[Array | np.ndarray, "*batch n"]:
    """Assign every row its own column so that `sum_i cost[i, assignment[i]]` is largest (or smallest).

    Args:
        cost: one square cost `[n, n]` or a batch `[..., n, n]`: rows are the anchor's units, columns the other's.
        solver: `"scipy"` (exact, float64, on the host), `"optax"` (exact, on the device, also under a trace), or a
            function `cost [n, n] -> columns [n]` that minimises.
        maximize: whether the cost is a gain.
        what: what to call the cost in a message.

    Returns:
        int32 `[..., n]`, a NumPy array unless the solver works on the device.

    Raises:
        ValueError: the cost is not square or not finite (not checked under a trace), the solver is unknown, or its
            answer is no assignment.

    Example:
        >>> solve(np.array([[1.0, 3.0], [2.0, 5.0]]))
        array([0, 1], dtype=int32)
    """
    _check_cost(cost, what)
    run = _each(solver) if callable(solver) else _lookup(solver)
    batch = cost.reshape(prod(cost.shape[:-2]), *cost.shape[-2:])
    return run(-batch if maximize else batch).reshape(cost.shape[:-1])


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

    The duals are shortest distances in the residual graph of an optimal assignment (Bellman-Ford); `u` is then set to
    the tightest feasible value, so that the bound holds whatever the rounding.

    Args:
        cost: one square cost.
        assignment: column of every row, as from `solve`; need not be optimal.
        maximize: whether the cost is a gain.

    Raises:
        ValueError: the cost is not square or not finite, or `assignment` is no assignment.
    """
    _check_cost(cost, "the cost")
    low = np.asarray(cost, np.float64) * (-1.0 if maximize else 1.0)
    given = _checked(np.asarray(assignment), len(low))
    v = _potentials(low, linear_sum_assignment(low)[1])
    u = (low - v).min(1, initial=np.inf)
    primal, dual = float(low[np.arange(len(low)), given].sum()), float(u.sum() + v.sum())
    sign = -1.0 if maximize else 1.0
    return Certificate(sign * primal, sign * dual, primal - dual, sign * u, sign * v)


def _potentials(low: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Column duals of a minimal assignment: `v[best[k]]` is the length of the shortest path that ends in row `k`.

    An edge from row `i` to row `k` hands `i` the column of `k`: `low[i, best[k]] - low[i, best[i]]`.
    """
    edges = low[:, best] - low[np.arange(len(low)), best][:, None]
    length = np.zeros(len(low))
    for _ in range(len(low)):
        shorter = np.minimum(length, (length[:, None] + edges).min(0, initial=np.inf))
        if np.array_equal(shorter, length):
            break
        length = shorter
    duals = np.empty(len(low))
    duals[best] = length
    return duals


def _scipy(batch: Any) -> np.ndarray:
    rows = [linear_sum_assignment(cost)[1] for cost in np.asarray(batch)]
    return np.array(rows, np.int32).reshape(batch.shape[:-1])


def _optax(batch: Any) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        return _hungarian(jnp.asarray(batch))


@jax.jit
@jax.vmap
def _hungarian(cost: jax.Array) -> jax.Array:
    rows, columns = hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))


SOLVERS: dict[str, Callable[[Any], Any]] = {"scipy": _scipy, "optax": _optax}
"""Solver name -> function from costs `[N, n, n]`, to be minimised, to columns `[N, n]`."""


def _lookup(solver: str) -> Callable[[Any], Any]:
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver '{solver}'; choose from {sorted(SOLVERS)} or give a function.")
    return SOLVERS[solver]


def _each(solver: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    def run(batch: Any) -> np.ndarray:
        rows = [_checked(np.asarray(solver(cost)), cost.shape[0]) for cost in batch]
        return np.array(rows, np.int32).reshape(batch.shape[:-1])

    return run


def _checked(assignment: np.ndarray, n: int) -> np.ndarray:
    if assignment.shape != (n,) or not np.array_equal(np.sort(assignment), np.arange(n)):
        raise ValueError(f"an assignment of {n} rows must hold each of the columns 0..{n - 1} once: {assignment}.")
    return assignment


def _check_cost(cost: Any, what: str) -> None:
    if cost.ndim < 2 or cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f"{what} must be square, [..., n, n], not of shape {cost.shape}.")
    if is_traced(cost):
        return
    xp = namespace(cost)
    if not bool(xp.isfinite(cost).all()):
        bad = ~np.isfinite(np.asarray(cost))
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} of shape {cost.shape} holds {int(bad.sum())} values that are not finite, the first at {first}; "
            "look for NaN, Inf or overflow in what it was made from."
        )
