"""The small core of a module's updates: everything that is linear in them happens in N x N matrices, N = sum of ranks.

With orthonormal bases `left` of the columns of all b and `right` of the rows of all a (one QR each), every update is
`left M right^T` with a small M. Norms, inner products and singular values of the updates are those of the M.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.lora.pool import Factors, Pool, padded
from permjax.permutation import namespace


class Core(NamedTuple):
    """The pieces of a pool in orthonormal bases; p = min(out, N), q = min(in, N).

    Attributes:
        left: `[out, p]`, orthonormal columns; piece j has `b[:, j] = left @ core.b[:, j]`.
        right: `[in, q]`, orthonormal columns; piece j has `a[j] = right @ core.a[:, j]`.
        b: `[p, pieces]`.
        a: `[q, pieces]`.
    """

    left: Float[Array, "out p"]
    right: Float[Array, "in q"]
    b: Float[Array, "p pieces"]
    a: Float[Array, "q pieces"]


def matmul(x: Any, y: Any) -> Any:
    """The matrix product at the highest precision of the device."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def ratio(above: Any, below: Any) -> Any:
    """The quotient, zero where there is nothing to divide by."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0)


def core_of(pool: Pool) -> Core:
    """Return the core of a pool by one QR for each side."""
    left, b = jnp.linalg.qr(pool.b)
    right, a = jnp.linalg.qr(pool.a.T)
    return Core(left, right, b, a)


def combined(core: Core, weights: Float[Array, " pieces"]) -> Float[Array, "p q"]:
    """Return the weighted sum of all pieces, `sum_j w_j b_j a_j^T`, in the core."""
    return matmul(core.b * weights[None], core.a.T)


def updates(core: Core, pool: Pool) -> Float[Array, "adapters p q"]:
    """Return the update of every adapter in the core."""
    member = jnp.asarray(pool.owners[None] == jnp.arange(len(pool.ranks))[:, None], core.b.dtype)
    return jnp.stack([combined(core, one) for one in member])


def truncated(x: Float[Array, "p q"], rank: int) -> Factors:
    """Return the best approximation of a matrix of some rank, singular values shared evenly (Eckart, Young 1936)."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return from_svd(u, s, vt, rank)


def from_svd(u: Any, s: Any, vt: Any, rank: int) -> Factors:
    """Return the first singular vectors as factors, singular values shared evenly; NumPy arrays stay NumPy.

    Args:
        u: `[p, n]`.
        s: `[n]`, the largest first.
        vt: `[n, q]`.
        rank: of the factors, filled up with zeros beyond n.
    """
    root = namespace(s).sqrt(s[:rank])
    return padded(root[:, None] * vt[:rank], u[:, :rank] * root[None], rank)


def lifted(core: Core, factors: Factors) -> Factors:
    """Return factors `a [rank, q]`, `b [p, rank]` of the core as factors of the module."""
    return Factors(matmul(factors.a, core.right.T), matmul(core.left, factors.b))
