"""Sums over rows of the products of columns, in float64: half of a symmetric product, a chunk of samples at a time."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

_WHOLE = 256  # columns up to which a symmetric product is computed as a whole
_LEVELS = 3  # so often one is cut in halves at most: more saves little work and takes longer to compile
_CHUNK = 2**19  # numbers of a chunk of rows, which then stay in the cache
_THIN = 2**10  # a chunk has its numbers over this as rows or more, or adding up would outweigh multiplying


class Sums(NamedTuple):
    """Sums over the rows of X and Y.

    Attributes:
        inputs: X^T X as nested (upper left, upper right, lower right), see `whole`.
        cross: X^T Y, `[k, n]`.
        targets: squares of Y, `[n]`.
        x: X, `[k]`.
        y: Y, `[n]`.
    """

    inputs: Any
    cross: Any
    targets: Any
    x: Any
    y: Any


def sums(x: Float[Array, "samples rows k"], y: Float[Array, "samples rows n"]) -> Sums:
    """Return the sums over all rows, X^T X in halves, a block of the rows of every sample at a time."""
    samples, rows, width = x.shape[0], x.shape[1], x.shape[2] + y.shape[2]
    blocks = -(-rows // max(1, _fitting(width) // samples))
    part = rows // blocks
    first = rows - (blocks - 1) * part

    def block(start: Any, size: int) -> Sums:
        cut = (jax.lax.dynamic_slice_in_dim(v, start, size, axis=1) for v in (x, y))
        return _block(*(v.reshape(-1, v.shape[-1]) for v in cut))

    total = block(0, first)
    if blocks == 1:
        return total
    starts = jnp.arange(first, rows, part)
    return jax.lax.scan(lambda total, start: (jax.tree.map(jnp.add, total, block(start, part)), None), total, starts)[0]


def product(columns: Float[Array, "k rows"], b: Float[Array, "rows n"]) -> Float[Array, "k n"]:
    """Return the product of a matrix by its columns, see `columns_of`, and another one at the highest precision."""
    return jnp.matmul(columns, b, precision=jax.lax.Precision.HIGHEST)


def columns_of(x: Float[Array, "rows k"]) -> Float[Array, "k rows"]:
    """Return the transpose in float64, laid out so: products of it are half as fast again as with a transposed view."""
    return jax.lax.optimization_barrier(x.T).astype(jnp.float64)


def half(columns: Float[Array, "k rows"], levels: int = _LEVELS) -> Any:
    """Return X^T X as nested (upper left, upper right, lower right): about half of the work for many columns."""
    middle = columns.shape[0] // 2
    if columns.shape[0] <= _WHOLE or levels == 0:
        return product(columns, columns.T)
    a, b = columns[:middle], columns[middle:]
    return half(a, levels - 1), product(a, b.T), half(b, levels - 1)


def whole(halves: Any) -> Float[Array, "k k"]:
    """Return the symmetric matrix of nested (upper left, upper right, lower right)."""
    size = _size(halves)
    return _placed(halves, jnp.zeros((size, size), jnp.float64), 0)


def chunked(
    function: Callable[..., Any], arrays: Sequence[Shaped[Array, "samples ..."]], rows: int, numbers: int
) -> Any:
    """Return `function(*arrays)` for a function that adds over samples, summed over chunks of them.

    A chunk takes every c-th sample, so that samples that are spread over devices stay where they are; missing ones are
    filled up with zeros, which must add nothing.

    Args:
        function: from arrays with samples first to a tree of sums.
        arrays: with the same number of samples.
        rows: of one sample.
        numbers: of one row in memory.
    """
    samples = arrays[0].shape[0]
    wanted = -(-samples * rows // _fitting(numbers))
    chunks = min(samples, 1 << (wanted - 1).bit_length())
    if chunks == 1:
        return function(*arrays)
    stacks = [_stacked(a, chunks) for a in arrays]
    shapes = jax.eval_shape(function, *(s[0] for s in stacks))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, chunk: (jax.tree.map(jnp.add, total, function(*chunk)), None), start, stacks)[0]


def dot_sums(x: Float[Array, "samples *rows k"], y: Float[Array, "samples *rows n"]) -> Sums:
    """Return the sums of a dense layer with inputs x and outputs y."""
    flat = [v.reshape((v.shape[0], prod(v.shape[1:-1]), v.shape[-1])) for v in (x, y)]
    return chunked(sums, flat, flat[0].shape[1], x.shape[-1] + y.shape[-1])


def _block(x: Float[Array, "rows k"], y: Float[Array, "rows n"]) -> Sums:
    columns, y = columns_of(x), y.astype(jnp.float64)
    return Sums(half(columns), product(columns, y), (y * y).sum(0), columns.sum(1), y.sum(0))


def _size(halves: Any) -> int:
    return _size(halves[0]) + _size(halves[2]) if isinstance(halves, tuple) else len(halves)


def _placed(halves: Any, total: Float[Array, "k k"], start: int) -> Float[Array, "k k"]:
    """Return a matrix with nested parts written at (start, start), every part once."""
    if not isinstance(halves, tuple):
        return jax.lax.dynamic_update_slice(total, halves, (start, start))
    corner, side, rest = halves
    middle = start + _size(corner)
    total = _placed(rest, _placed(corner, total, start), middle)
    total = jax.lax.dynamic_update_slice(total, side, (start, middle))
    return jax.lax.dynamic_update_slice(total, side.T, (middle, start))


def _fitting(numbers: int) -> int:
    """Return how many rows of so many numbers a chunk holds."""
    return max(1, _CHUNK // numbers, _CHUNK // _THIN)


def _stacked(a: Shaped[Array, "samples ..."], chunks: int) -> Shaped[Array, "chunks part ..."]:
    part = -(-a.shape[0] // chunks)
    filled = jnp.pad(a, ((0, part * chunks - a.shape[0]), *((0, 0),) * (a.ndim - 1)))
    return filled.reshape((part, chunks, *a.shape[1:])).swapaxes(0, 1)
