"""Data cut into batches that compiled code can walk over, and means over them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def cut(data: Sequence[Any], batch_size: int) -> tuple[list[tuple], list[int]]:
    """Parts of equal batches, stacked on a new first axis, and the size of every batch in order.

    Args:
        data: arrays of equal length n, such as (x, y).
        batch_size: examples at a time; a shorter last batch makes a part of its own.

    Raises:
        ValueError: arrays of unequal length or of none, or a batch size below one.
    """
    arrays = [jnp.asarray(array) for array in data]
    lengths = [array.shape[0] if array.ndim else 0 for array in arrays]
    if len(set(lengths)) != 1 or lengths[0] == 0 or batch_size < 1:
        raise ValueError(
            f"data must be arrays of one length above zero, cut into batches of at least one; lengths are {lengths}, "
            f"batch_size is {batch_size}."
        )
    whole, rest = divmod(lengths[0], batch_size)
    counts = [(whole, batch_size), (int(rest > 0), rest)]
    starts = [0, whole * batch_size]
    parts = [
        tuple(x[start : start + n * size].reshape((n, size, *x.shape[1:])) for x in arrays)
        for start, (n, size) in zip(starts, counts, strict=True)
        if n
    ]
    return parts, [size for n, size in counts for _ in range(n)]


def each_batch(f: Callable[..., Any], parts: Sequence[tuple]) -> Any:
    """`f(*batch)` of every batch, stacked over all batches of all parts; traceable."""
    found = [jax.lax.map(lambda batch: f(*batch), part) for part in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def over_batches(sizes: Sequence[int], values: Any) -> Any:
    """The mean over batches, the last axis of `values`, each counted by its size; float64 on the host."""
    return np.average(np.asarray(values, np.float64), axis=-1, weights=sizes)
