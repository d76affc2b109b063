"""Assignment solvers by name: functions from costs `[N, n, n]`, to be minimised, to columns `[N, n]`."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.assignment import hungarian_algorithm
from scipy.optimize import linear_sum_assignment

from permjax.match.auction import auction
from permjax.permutation import is_traced

PARALLEL = 128  # smallest n for which a batch is worth several threads


def choose(n: int, batch: int, on_device: bool) -> str:
    """Return the name of the solver that is quickest for `batch` costs of size `n`.

    Args:
        n: rows and columns.
        batch: how many costs are solved at once.
        on_device: whether the cost is traced or on an accelerator; otherwise the host solves it.
    """
    if on_device:
        return "optax" if n < (64 if batch > 1 else 256) else "auction"
    return "lapx" if n >= 32 and lapx() else "scipy"


def lookup(solver: str) -> Callable[[Any], Any]:
    """Return a solver by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if solver not in SOLVERS:
        near = get_close_matches(solver, SOLVERS, 1)
        hint = f"did you mean '{near[0]}'? Otherwise " if near else ""
        raise ValueError(f"there is no solver '{solver}'; {hint}choose from {sorted(SOLVERS)} or give a function.")
    return SOLVERS[solver]


def on_host(function: Callable[..., np.ndarray], batch: Any, *more: Sequence[Any]) -> np.ndarray:
    """Apply `function(cost, ...) -> columns` to each cost of a batch `[N, n, n]`; large ones in a thread for each core.

    Args:
        function: its first argument is one cost `[n, n]`.
        batch: the costs.
        more: further arguments, one for each cost.
    """
    costs = np.asarray(batch)
    workers = min(len(costs), _cores()) if costs.shape[-1] >= PARALLEL else 1
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(function, costs, *more))
    else:
        found = list(map(function, costs, *more))
    return np.array(found, np.int32).reshape(costs.shape[:-1])


def is_local(cost: Any) -> bool:
    """Tell whether a cost is concrete and in the memory of the host."""
    if is_traced(cost):
        return False
    return not isinstance(cost, jax.Array) or all(device.platform == "cpu" for device in cost.devices())


@cache
def lapx() -> ModuleType | None:
    """Return lapx, which installs the module `lap`, or None if it, or its exact float64 solver, is missing."""
    try:
        import lap
    except ImportError:
        return None
    return lap if hasattr(lap, "lapjvh") else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _auto(batch: Any) -> Any:
    return lookup(choose(batch.shape[-1], len(batch), not is_local(batch)))(batch)


def _scipy(batch: Any) -> np.ndarray:
    return on_host(lambda cost: linear_sum_assignment(cost)[1], batch)


def _lapx(batch: Any) -> np.ndarray:
    lap = lapx()
    if lap is None:
        raise ValueError(
            "the solver 'lapx' needs the package lapx 0.11 or later: `pip install 'permjax[fast]'`; "
            "'scipy' gives the same optimum."
        )
    return on_host(lambda cost: lap.lapjvh(cost, return_cost=False)[1], batch)


def _optax(batch: Any) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        return _hungarian(jnp.asarray(batch))


@jax.jit
@jax.vmap
def _hungarian(cost: jax.Array) -> jax.Array:
    rows, columns = hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))


def _auction(batch: Any) -> Any:
    if is_traced(batch):
        return jax.vmap(lambda cost: auction(cost, maximize=False).columns)(batch)
    with jax.enable_x64(True):
        return np.array([_bought(cost) for cost in batch], np.int32).reshape(batch.shape[:-1])


def _bought(cost: Any) -> np.ndarray:
    """The columns of an auction in float64; should its rounds run out, SciPy finishes from its prices."""
    found = auction(jnp.asarray(cost).astype(np.float64), maximize=False)
    if found.converged:
        return np.asarray(found.columns)
    return linear_sum_assignment(np.asarray(cost, np.float64) + np.asarray(found.prices))[1]


SOLVERS: dict[str, Callable[[Any], Any]] = {
    "auto": _auto,
    "scipy": _scipy,
    "lapx": _lapx,
    "optax": _optax,
    "auction": _auction,
}
"""Solver name -> function from costs `[N, n, n]`, to be minimised, to columns `[N, n]`."""
