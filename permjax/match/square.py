"""What every assignment solver asks of a cost and of an answer."""

from typing import Any

import numpy as np

from permjax.permutation import is_traced, namespace


def check_cost(cost: Any, what: str) -> None:
    """Check that a cost is square, `[..., n, n]`, and finite; under a trace only its shape is known.

    Raises:
        ValueError: says how many values are not finite, and where the first one is.
    """
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


def check_columns(columns: np.ndarray, n: int) -> np.ndarray:
    """Return `columns` if it holds each of `0..n - 1` once.

    Raises:
        ValueError: it does not.
    """
    if columns.shape != (n,) or not np.array_equal(np.sort(columns), np.arange(n)):
        raise ValueError(f"an assignment of {n} rows must hold each of the columns 0..{n - 1} once: {columns}.")
    return columns
