"""How good a merged adapter is, module by module, before anything is run: all of it is computed in the small core."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Int

from permjax.lora.buckets import mapped
from permjax.lora.core import Core, core_of, matmul, updates
from permjax.lora.merge import checked_weights, factors_of, pool_of
from permjax.lora.pool import Adapter, Merged, Pool

DEAD = 1e-6
"""A piece is dead where its norm is less than this share of the largest."""


class Quality(NamedTuple):
    """One merged module G beside the T updates it was made of and their weighted sum `S = sum_t w_t b_t a_t`.

    All norms are Frobenius norms. A ratio whose denominator is zero, as that of an adapter without the module, is NaN.

    Attributes:
        rank: of the factors of G.
        norms: `[T]`, `|delta_t|`.
        norm_sum: `|S|`.
        norm_merged: `|G|`.
        errors: `[T]`, `|G - delta_t| / |delta_t|`.
        error: `|G - S| / |S|`.
        best: the smallest such error that any matrix of this rank has (Eckart, Young 1936).
        cosine: of the angle between G and S.
        kept: `[T]`, retained energy: `|P delta_t Q|^2 / |delta_t|^2`, P and Q the projections on G's columns and rows.
        cosines: `[T, T]`, of the angles between the updates.
        cross: what adding factors would add to the sum: `|(sum_t b_t)(sum_t a_t) - sum_t b_t a_t| / |sum_t b_t a_t|`,
            `sqrt|w_t|` in each factor.
        effective_sum: effective rank of S, the exponential of the entropy of its squared singular values.
        effective_merged: of G.
        scale: `|G|` over the mean of `|delta_t|`.
        spread: largest over smallest norm `|a_j| |b_j|` of the pieces, dead ones left out.
        sizes: `[rank]`, how many pieces each cluster has; None where a method makes no clusters.
        purity: the share of pieces that belong to the adapter from which their cluster has the most. It is 1 where no
            cluster mixes adapters, and 1 / T where all take as much from each.
    """

    rank: int
    norms: Float[np.ndarray, " adapters"]
    norm_sum: float
    norm_merged: float
    errors: Float[np.ndarray, " adapters"]
    error: float
    best: float
    cosine: float
    kept: Float[np.ndarray, " adapters"]
    cosines: Float[np.ndarray, "adapters adapters"]
    cross: float
    effective_sum: float
    effective_merged: float
    scale: float
    spread: float
    sizes: Int[np.ndarray, " rank"] | None = None
    purity: float | None = None


def lora_quality(adapters: Sequence[Adapter], merged: Mapping[str, Merged], weights: Any = None) -> dict[str, Quality]:
    """Compare a merged adapter with what it was made of.

    One QR of the pieces of all adapters and of the result together gives a core in which all is computed; the updates
    themselves are never formed.

    Args:
        adapters: the inputs of `merge_loras`.
        merged: its result.
        weights: those it was given; 1 / T by default.

    Returns:
        Module name -> `Quality`.

    Raises:
        ValueError: no adapter, or weights or sizes that do not fit; names the module.

    Example:
        >>> merged = merge_loras(adapters, Truncate(), rank=8)
        >>> max(module.error for module in lora_quality(adapters, merged).values())
    """
    shares = checked_weights(weights, len(adapters))
    together = [*adapters, factors_of(merged)]
    pools = {name: pool_of(name, together) for name in merged}
    found = mapped(_measured, {name: (pool, shares) for name, pool in pools.items()})
    return {name: _with_clusters(found[name], pools[name], merged[name].labels) for name in merged}


def _measured(given: tuple[Pool, Float[Array, " adapters"]]) -> dict[str, Any]:
    """The numbers of one module; the last adapter of the pool is the result."""
    pool, weights = given
    core, rank = core_of(pool), pool.ranks[-1]
    *deltas, merged = updates(core, pool)
    delta = jnp.stack(deltas)
    total = jnp.einsum("t,tpq->pq", weights, delta)
    norms, norm_sum, norm_merged = _norm(delta), _norm(total), _norm(merged)
    values, (u, s, vt) = _singular(total), jnp.linalg.svd(merged, full_matrices=False)
    real = jnp.asarray(s > s[0] * max(merged.shape) * jnp.finfo(s.dtype).eps, s.dtype)
    inside = jnp.einsum("pi,tpq,jq->tij", u * real[None], delta, vt * real[:, None])
    present = jnp.sum(jnp.asarray(norms > 0, norms.dtype))
    return {
        "norms": norms,
        "norm_sum": norm_sum,
        "norm_merged": norm_merged,
        "errors": _over(_norm(merged[None] - delta), norms),
        "error": _over(_norm(merged - total), norm_sum),
        "best": _over(jnp.linalg.norm(values[rank:]), norm_sum),
        "cosine": _over(jnp.sum(merged * total), norm_merged * norm_sum),
        "kept": _over(_norm(inside), norms) ** 2,
        "cosines": _over(jnp.einsum("tpq,upq->tu", delta, delta), norms[:, None] * norms[None]),
        "cross": _over(_norm(_added(core, pool, weights) - total), norm_sum),
        "effective_sum": effective_rank(values),
        "effective_merged": effective_rank(s),
        "scale": _over(norm_merged * present, jnp.sum(norms)),
        "spread": piece_spread(core, sum(pool.ranks[:-1])),
    }


def _added(core: Core, pool: Pool, weights: Any) -> Float[Array, "p q"]:
    """The product of the sums of factors, rank j of one adapter with rank j of the others, as in PEFT's `linear`."""
    ranks = pool.ranks[:-1]
    place = np.concatenate([np.arange(rank) for rank in ranks])
    column = jnp.asarray(place[:, None] == np.arange(max(ranks))[None], core.b.dtype)
    root = jnp.sqrt(jnp.abs(weights))[pool.owners[: len(place)]]
    sign = jnp.sign(weights)[pool.owners[: len(place)]]
    b, a = core.b[:, : len(place)] * (root * sign)[None], core.a[:, : len(place)] * root[None]
    return matmul(matmul(b, column), matmul(a, column).T)


def piece_spread(core: Core, pieces: int) -> Any:
    """Largest over smallest norm of the first pieces of a core, dead ones left out; NaN if all are dead."""
    norms = piece_norms(core)[:pieces]
    largest = jnp.max(norms, initial=0.0)
    smallest = jnp.min(norms, initial=jnp.inf, where=norms > DEAD * largest)
    return _over(largest, jnp.where(largest > 0, smallest, 0.0))


def piece_norms(core: Core) -> Float[Array, " pieces"]:
    """The norms `|a_j| |b_j|` of the pieces."""
    return jnp.linalg.norm(core.a, axis=0) * jnp.linalg.norm(core.b, axis=0)


def effective_rank(values: Float[Array, " n"]) -> Any:
    """The exponential of the entropy of squared singular values: 1 for one value, n for n equal ones, 0 for none."""
    energy = values**2
    total = jnp.sum(energy)
    share = energy / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jnp.exp(jnp.sum(entr(share))), 0.0)


def _with_clusters(found: dict[str, Any], pool: Pool, labels: Any) -> Quality:
    """The numbers of a module with those of its clusters."""
    rank = pool.ranks[-1]
    plain: dict[str, Any] = {key: float(value) if np.ndim(value) == 0 else value for key, value in found.items()}
    if labels is None:
        return Quality(rank, **plain)
    labels, owners = np.asarray(labels), pool.owners[: sum(pool.ranks[:-1])]
    counts = np.zeros((rank, len(pool.ranks) - 1), int)
    np.add.at(counts, (labels[labels >= 0], owners[labels >= 0]), 1)
    purity = float(counts.max(1).sum() / max(counts.sum(), 1))
    return Quality(rank, **plain, sizes=counts.sum(1), purity=purity)


def _singular(x: Float[Array, "p q"]) -> Float[Array, " n"]:
    return jnp.linalg.svd(x, compute_uv=False)


def _norm(x: Float[Array, "... p q"]) -> Any:
    return jnp.sqrt(jnp.sum(x**2, (-2, -1)))


def _over(above: Any, below: Any) -> Any:
    """The quotient, NaN where the denominator is zero."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), jnp.nan)
