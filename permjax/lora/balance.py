"""Balanced clusters: every adapter gives each cluster at most one piece, a permutation of its ranks where they fit.

This is weighted k-means on the rank-one matrices `b_j a_j^T` under that constraint. One adapter after the other is
placed anew by linear assignment while the others stay, until nothing improves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax.lora.core import matmul, ratio
from permjax.lora.kernels import directed, gram
from permjax.lora.pool import Pool
from permjax.match.assignment import solve

_SWEEPS = 50
_LEAST_GAIN = 1e-6  # of the whole, for another sweep


class _State(NamedTuple):
    places: Any  # [hands, k]: the cluster of every piece of every hand
    value: Any
    gain: Any
    sweep: Any


def balanced_labels(pool: Pool, weights: Any, rank: int) -> Int[Array, " pieces"]:
    """Assign the pieces of every adapter to clusters: `max sum_c |sum_{j in c} w_j b_j a_j^T|^2 / sum_{j in c} w_j`.

    With as many clusters as every adapter has ranks this is the alignment of the rank permutations of all adapters to
    each other. An adapter with more pieces than clusters takes part as several, its largest pieces first. Signs and
    scales moved between a and b change nothing. Where a weight is negative, the adapter is negated. The search starts
    with each of the adapters in turn as the first and keeps the best end.

    Args:
        pool: the pieces.
        weights: of the adapters; absolute values count.
        rank: number of clusters.

    Returns:
        The cluster of every piece.
    """
    kernel, mass = gram(directed(pool, weights), "outer_product"), jnp.abs(pool.spread(weights))
    hands = _hands(pool, jnp.diagonal(kernel), rank)
    count = len(hands)
    orders = jnp.asarray([[(first + i) % count for i in range(count)] for first in range(count)])
    places, values = jax.vmap(lambda order: _settle(kernel, mass, hands[order], order, rank))(orders)
    best = places[jnp.argmax(values)]
    return jnp.zeros(len(kernel), jnp.int32).at[hands.reshape(-1)].set(best.reshape(-1), mode="drop")


def _hands(pool: Pool, norms: Any, rank: int) -> Int[Array, "hands rank"]:
    """Return the pieces of every adapter by size, at most `rank` to a hand; one past the last where there is none."""
    rows, start, none = [], 0, len(norms)
    for size in pool.ranks:
        order = start + jnp.argsort(-norms[start : start + size])
        filled = jnp.concatenate([order, jnp.full(-size % rank, none, order.dtype)])
        rows.append(filled.reshape(-1, rank))
        start += size
    return jnp.concatenate(rows).astype(jnp.int32)


def _settle(kernel: Any, mass: Any, hands: Any, order: Any, rank: int) -> tuple[Any, Any]:
    """Place the hands one after the other, then each anew until nothing improves; return places in the given order."""
    kernel, mass = jnp.pad(kernel, ((0, 1), (0, 1))), jnp.pad(mass, (0, 1))  # the piece that is none

    def place(number: Any, places: Any) -> Any:
        shown = jnp.where(jnp.arange(len(hands))[:, None] == number, -1, places)
        members = _members(mass, hands, shown, rank)
        gain = _gains(kernel, mass, members, hands[number])
        return places.at[number].set(solve(gain, "optax").astype(places.dtype))

    def sweep(state: _State) -> _State:
        places = jax.lax.fori_loop(0, len(hands), place, state.places)
        value = _value(kernel, _members(mass, hands, places, rank))
        better = value > state.value
        kept = jnp.where(better, places, state.places)
        return _State(kept, jnp.maximum(value, state.value), value - state.value, state.sweep + 1)

    def going(state: _State) -> Any:
        return (state.sweep < _SWEEPS) & (state.gain > _LEAST_GAIN * state.value)

    nowhere = jnp.full(hands.shape, -1, jnp.int32)
    first = jax.lax.fori_loop(0, len(hands), place, nowhere)
    value = _value(kernel, _members(mass, hands, first, rank))
    end = jax.lax.while_loop(going, sweep, _State(first, value, value, jnp.int32(0)))
    return jnp.zeros_like(end.places).at[order].set(end.places), end.value


def _members(mass: Any, hands: Any, places: Any, rank: int) -> Float[Array, "pieces rank"]:
    """Return the weight of every piece in every cluster; no place, no weight."""
    chosen = jax.nn.one_hot(places.reshape(-1), rank, dtype=mass.dtype)
    return jnp.zeros((len(mass), rank), mass.dtype).at[hands.reshape(-1)].add(chosen) * mass[:, None]


def _gains(kernel: Any, mass: Any, members: Any, hand: Any) -> Float[Array, "rank rank"]:
    """Return what each piece of a hand would add to each cluster."""
    total, cross = jnp.sum(members, 0), matmul(kernel[hand], members)
    inner = jnp.sum(members * matmul(kernel, members), 0)
    own, weight = jnp.diagonal(kernel)[hand], mass[hand]
    after = inner[None] + 2 * weight[:, None] * cross + (weight**2 * own)[:, None]
    return ratio(after, total[None] + weight[:, None]) - ratio(inner, total)[None]


def _value(kernel: Any, members: Any) -> Any:
    return jnp.sum(ratio(jnp.sum(members * matmul(kernel, members), 0), jnp.sum(members, 0)))


def numbered(labels: Int[np.ndarray, " pieces"], ranks: tuple[int, ...]) -> list[Int[np.ndarray, " rank"]]:
    """The labels of every adapter's pieces."""
    return np.split(np.asarray(labels), np.cumsum(ranks)[:-1])
