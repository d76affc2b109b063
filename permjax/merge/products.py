"""Sums over rows of the products of columns, in float64: half of a symmetric product, a chunk of samples at a time."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

_WHOLE = 256  # columns up to which a symmetric product is computed as a whole
_CHUNK = 2**22  # float64 numbers of a chunk of samples that are held at a time


class Sums(NamedTuple):
    """Sums over the rows of X and Y.

    Attributes:
        inputs: X^T X, `[k, k]`, or its halves.
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

    def whole(self) -> "Sums":
        """Return the sums with X^T X put together from its halves."""
        return self._replace(inputs=whole(self.inputs))


def sums(x: Float[Array, "rows k"], y: Float[Array, "rows n"]) -> Sums:
    """Return the sums of these rows, X^T X in halves."""
    x, y = x.astype(jnp.float64), y.astype(jnp.float64)
    return Sums(half(x), product(x, y), (y * y).sum(0), x.sum(0), y.sum(0))


def product(a: Float[Array, "rows k"], b: Float[Array, "rows n"]) -> Float[Array, "k n"]:
    """Return a^T b at the highest precision."""
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


def half(x: Float[Array, "rows k"]) -> Any:
    """Return X^T X as nested (upper left, upper right, lower right): about half of the work for many columns."""
    middle = x.shape[1] // 2
    if x.shape[1] <= _WHOLE:
        return product(x, x)
    a, b = x[:, :middle], x[:, middle:]
    return half(a), product(a, b), half(b)


def whole(halves: Any) -> Float[Array, "k k"]:
    """Return the symmetric matrix that `half` gave in parts."""
    if not isinstance(halves, tuple):
        return halves
    corner, side, rest = whole(halves[0]), halves[1], whole(halves[2])
    return jnp.block([[corner, side], [side.T, rest]])


def chunked(function: Callable[..., Any], arrays: Sequence[Shaped[Array, "samples ..."]], size: int) -> Any:
    """Return `function(*arrays)` for a function that adds over samples, summed over chunks of them.

    A chunk takes every c-th sample, so that samples that are spread over devices stay where they are; missing ones are
    filled up with zeros, which must add nothing.

    Args:
        function: from arrays with samples first to a tree of sums.
        arrays: with the same number of samples.
        size: numbers in memory for one sample.
    """
    samples = arrays[0].shape[0]
    wanted = -(-samples * size // _CHUNK)
    chunks = min(samples, 1 << (wanted - 1).bit_length())
    if chunks == 1:
        return function(*arrays)
    stacks = [_stacked(a, chunks) for a in arrays]
    shapes = jax.eval_shape(function, *(s[0] for s in stacks))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, chunk: (jax.tree.map(jnp.add, total, function(*chunk)), None), start, stacks)[0]


def dot_sums(x: Float[Array, "samples *rows k"], y: Float[Array, "samples *rows n"]) -> Sums:
    """Return the sums of a dense layer with inputs x and outputs y."""

    def rows(x: Array, y: Array) -> Sums:
        return sums(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    return chunked(rows, (x, y), prod(x.shape[1:]) + prod(y.shape[1:])).whole()


def _stacked(a: Shaped[Array, "samples ..."], chunks: int) -> Shaped[Array, "chunks part ..."]:
    part = -(-a.shape[0] // chunks)
    filled = jnp.pad(a, ((0, part * chunks - a.shape[0]), *((0, 0),) * (a.ndim - 1)))
    return filled.reshape((part, chunks, *a.shape[1:])).swapaxes(0, 1)
