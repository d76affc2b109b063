"""Inner products between the rank-one pieces of a pool, and the gauge in which they are compared."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.lora.core import matmul, ratio
from permjax.lora.pool import Pool

FEATURES = ("raw", "normalized", "outer_product")


def gram(pool: Pool, features: str) -> Float[Array, "pieces pieces"]:
    """Return the inner products of the pieces as `features` see them.

    Args:
        pool: the pieces.
        features: `"raw"`: of the vectors `[a_j; b_j]`; `"normalized"`: of the same with each half of length one;
            `"outer_product"`: of the matrices `b_j a_j^T`, which signs and scales moved between a and b do not change.
    """
    a, b = matmul(pool.a, pool.a.T), matmul(pool.b.T, pool.b)
    if features == "outer_product":
        return a * b
    if features == "normalized":
        a, b = _cosines(a), _cosines(b)
    return a + b


def evened(pool: Pool) -> Pool:
    """Return the pool with `|a_j| = |b_j|` for every piece; the pieces as matrices stay what they are."""
    a, b = jnp.linalg.norm(pool.a, axis=1), jnp.linalg.norm(pool.b, axis=0)
    root = jnp.sqrt(a * b)
    return Pool(pool.a * ratio(root, a)[:, None], pool.b * ratio(root, b)[None], pool.ranks)


def in_phase(pool: Pool) -> Pool:
    """Return the pool with signs moved between a and b so that similar pieces look similar.

    The pieces are linked one by one, the most similar first (a maximum spanning tree of the absolute cosines of
    `[a_j; b_j]`), and each takes the sign in which it agrees with the piece that it is linked to.
    """
    cosines = _cosines(gram(pool, "raw"))

    def link(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        signs, best = state  # 0 for pieces not yet linked; cosine to the most similar linked piece, in its sign
        piece = jnp.argmax(jnp.where(signs == 0, jnp.abs(best), -1.0))
        sign = jnp.where(best[piece] < 0, -1.0, 1.0).astype(best.dtype)
        closer = jnp.abs(cosines[piece]) > jnp.abs(best)
        return signs.at[piece].set(sign), jnp.where(closer, sign * cosines[piece], best)

    first = jnp.zeros(len(cosines), cosines.dtype).at[0].set(1.0)
    signs, _ = jax.lax.fori_loop(1, len(cosines), link, (first, cosines[0]))
    return Pool(pool.a * signs[:, None], pool.b * signs[None], pool.ranks)


def directed(pool: Pool, weights: Any) -> Pool:
    """Return the pool with the pieces of adapters of negative weight negated, so that their absolute weights count."""
    signs = jnp.where(pool.spread(weights) < 0, -1.0, 1.0).astype(pool.b.dtype)
    return Pool(pool.a, pool.b * signs[None], pool.ranks)


def _cosines(products: Float[Array, "n n"]) -> Float[Array, "n n"]:
    root = jnp.sqrt(jnp.diagonal(products))
    return ratio(products, root[:, None] * root[None])
