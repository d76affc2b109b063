"""K-means from inner products alone: the points are never needed, only their Gram matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from permjax.lora.core import matmul, ratio


class _State(NamedTuple):
    labels: Any
    previous: Any
    loss: Any  # of the previous labels
    step: Any


def kernel_kmeans(
    gram: Float[Array, "n n"],
    weights: Float[Array, " n"],
    k: int,
    key: Any,
    *,
    restarts: int = 10,
    iterations: int = 100,
) -> Int[Array, " n"]:
    """Cluster points by weighted k-means: `min sum_i w_i |x_i - mean of its cluster|^2`.

    Lloyd's iterations from k-means++ starts; of several runs the best counts. An empty cluster takes the point that is
    farthest from its own mean; it stays empty where no points differ any more. The result does not depend on the order
    of the points (but for points that are equal).

    Args:
        gram: inner products of the points.
        weights: of the points, not negative.
        k: number of clusters; it may exceed n.
        key: draws the starts.
        restarts: number of runs.
        iterations: upper limit for each.

    Returns:
        The cluster of every point.

    Source:
        Lloyd 1982; Arthur, Vassilvitskii, "k-means++", SODA 2007; the kernel form is Dhillon, Guan, Kulis, KDD 2004.
    """
    order = jnp.argsort(jnp.sum(gram**2, 1))  # by content, so that draws hit the same points in any order
    sorted_gram, sorted_weights = gram[order][:, order], weights[order]

    def one(draws: Any) -> tuple[Any, Any]:
        return _lloyd(sorted_gram, sorted_weights, _start(sorted_gram, sorted_weights, draws), k, iterations)

    labels, loss = jax.vmap(one)(jax.random.uniform(key, (restarts, k), gram.dtype))
    return jnp.zeros(len(gram), jnp.int32).at[order].set(labels[jnp.argmin(loss)])


def _start(gram: Any, weights: Any, draws: Float[Array, " k"]) -> Any:
    """Return the labels by the nearest of k points, each drawn with a chance that grows with its distance to them."""
    norms = jnp.diagonal(gram)

    def draw(carry: tuple[Any, Any], now: tuple[Any, Any]) -> tuple[tuple[Any, Any], None]:
        (nearest, labels), (step, u) = carry, now
        below = jnp.cumsum(weights * jnp.where(jnp.isinf(nearest), 1.0, nearest))
        chosen = jnp.minimum(jnp.sum(below <= u * below[-1]), len(gram) - 1)
        distance = jnp.maximum(norms - 2 * gram[chosen] + norms[chosen], 0.0)
        closer = distance < nearest
        return (jnp.where(closer, distance, nearest), jnp.where(closer, step, labels)), None

    begin = (jnp.full(len(gram), jnp.inf, gram.dtype), jnp.zeros(len(gram), jnp.int32))
    return jax.lax.scan(draw, begin, (jnp.arange(len(draws), dtype=jnp.int32), draws))[0][1]


def _lloyd(gram: Any, weights: Any, labels: Any, k: int, iterations: int) -> tuple[Any, Any]:
    """Return labels that no longer change, and the loss."""

    def going(state: _State) -> Any:
        return (state.step < iterations) & jnp.any(state.labels != state.previous)

    def move(state: _State) -> _State:
        distances = _distances(gram, weights, state.labels, k)
        own = _own(distances, state.labels)
        found = jnp.argmin(distances, 1).astype(jnp.int32)
        return _State(_filled(distances, found, gram), state.labels, jnp.sum(weights * own), state.step + 1)

    begin = _State(labels, jnp.full_like(labels, -1), jnp.array(jnp.inf, gram.dtype), jnp.int32(0))
    end = jax.lax.while_loop(going, move, begin)
    return end.labels, end.loss


def _distances(gram: Any, weights: Any, labels: Any, k: int) -> Float[Array, "n k"]:
    """Return the squared distance of every point to every mean; infinite for empty clusters."""
    member = jax.nn.one_hot(labels, k, dtype=gram.dtype) * weights[:, None]
    mass = jnp.sum(member, 0)
    share = ratio(member, mass[None])
    cross = matmul(gram, share)
    found = jnp.diagonal(gram)[:, None] - 2 * cross + jnp.sum(share * cross, 0)[None]
    return jnp.where(mass[None] > 0, jnp.maximum(found, 0.0), jnp.inf)


def _own(distances: Any, labels: Any) -> Float[Array, " n"]:
    """Return the distance of every point to the mean of its cluster; zero where that has no weight."""
    own = jnp.take_along_axis(distances, labels[:, None], 1)[:, 0]
    return jnp.where(jnp.isinf(own), 0.0, own)


def _filled(distances: Any, labels: Any, gram: Any) -> Any:
    """Return the labels with the points that are farthest from their means in the clusters that are empty."""
    n, k = distances.shape
    own, clusters = _own(distances, labels), jnp.arange(k, dtype=labels.dtype)
    member = labels[:, None] == clusters[None]
    nearest = jnp.argmin(jnp.where(member, own[:, None], jnp.inf), 0)  # that point stays with its mean
    free = jnp.where(nearest[labels] == jnp.arange(n), -1.0, own)
    ahead = (free[None] > free[:, None]) | (
        (free[None] == free[:, None]) & (jnp.arange(n)[None] < jnp.arange(n)[:, None])
    )
    place = jnp.sum(ahead, 1)  # of every point among all, the farthest first
    empty = ~jnp.any(member, 0)
    fits = empty[None] & (jnp.cumsum(empty)[None] == place[:, None] + 1)
    target = jnp.max(jnp.where(fits, clusters[None], -1), 1)
    enough = jnp.finfo(gram.dtype).eps * jnp.max(jnp.diagonal(gram)) * 10
    return jnp.where((target >= 0) & (free > enough), target, labels)
