"""Losses of embeddings: binary and cross-entropy over all entities, all known tails at once, local negatives; N3.

Scores are similarities plus gamma. All losses are per query; training takes their mean over a batch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from permjax.kge.base import Row


def _in_one_pass(f: Callable[..., tuple[Array, Array]]) -> Callable[..., Array]:
    """A loss from `f(scores, *targets) -> (losses [b], slopes [b, e])` that goes over the scores only once."""

    @jax.custom_vjp
    def loss(scores: Array, *targets: Array) -> Array:
        return f(scores, *targets)[0]

    def forward(scores: Array, *targets: Array) -> tuple[Array, tuple[Array, int]]:
        losses, slopes = f(scores, *targets)
        return losses, (slopes, len(targets))

    def backward(kept: tuple[Array, int], cotangent: Array) -> tuple[Any, ...]:
        slopes, targets = kept
        return cotangent[:, None] * slopes, *[None] * targets

    loss.defvjp(forward, backward)
    return functools.wraps(f)(loss)


def bce_all(scores: Float[Array, "b entities"], tails: Int[Array, " b"]) -> Float[Array, " b"]:
    """Binary cross-entropy summed over all entities, the published loss: `sum_e softplus((1 - 2 y_e) s_e)`.

    y is 1 at the tail and 0 elsewhere, so that other true tails count as wrong ones.

    Args:
        scores: of every entity as the tail of each query.
        tails: the tail of each query; one outside the table is none of its entities.
    """
    return _bce_all(scores, tails)


@_in_one_pass
def _bce_all(scores: Array, tails: Array) -> tuple[Array, Array]:
    answer = _answers(scores, tails)
    rest, chances = _softplus_sigmoid(scores)
    return jnp.sum(rest - jnp.where(answer, scores, 0), axis=1), chances - answer


def ce_all(scores: Float[Array, "b entities"], tails: Int[Array, " b"]) -> Float[Array, " b"]:
    """Cross-entropy over all entities: `log sum_e exp(s_e) - s_tail`; gamma does not matter.

    Args:
        scores: of every entity as the tail of each query.
        tails: the tail of each query.
    """
    return _ce_all(scores, tails)


@_in_one_pass
def _ce_all(scores: Array, tails: Array) -> tuple[Array, Array]:
    answer = _answers(scores, tails)
    top = scores.max(axis=1, keepdims=True)
    powers = jnp.exp(scores - top)
    total = powers.sum(axis=1, keepdims=True)
    right = jnp.sum(jnp.where(answer, scores - top, 0), axis=1)
    return jnp.log(total[:, 0]) - right, powers / total - answer


def k_vs_all(
    scores: Float[Array, "b entities"],
    rows: Int[Array, " pairs"],
    tails: Int[Array, " pairs"],
    real: Bool[Array, " pairs"],
) -> Float[Array, " b"]:
    """Binary cross-entropy summed over all entities, with y = 1 at all known tails of each query.

    Args:
        scores: of every entity as the tail of each query.
        rows: the query of each known tail.
        tails: known tails, each once per query.
        real: which of these pairs there are; the others fill up.
    """
    known = jnp.where(real, scores[rows, tails], 0)
    return _softplus_sum(scores) - jax.ops.segment_sum(known, rows, len(scores))


@_in_one_pass
def _softplus_sum(scores: Array) -> tuple[Array, Array]:
    rest, chances = _softplus_sigmoid(scores)
    return rest.sum(axis=1), chances


def negatives(
    positive: Float[Array, " b"], scores: Float[Array, "b drawn"], same: Bool[Array, "b drawn"], entities: int
) -> Float[Array, " b"]:
    """`bce_all` from a few entities drawn uniformly: `softplus(-s_tail) + entities / drawn sum_k softplus(s_k)`.

    Its expectation is that of `bce_all`, so that gamma and bound keep their meaning.

    Args:
        positive: scores of the tails.
        scores: of the drawn entities.
        same: which of these are the tail, and do not count.
        entities: how many there are to draw from.
    """
    wrong = jnp.where(same, 0, jax.nn.softplus(scores))
    return jax.nn.softplus(-positive) + entities / scores.shape[1] * wrong.sum(axis=1)


def n3(*rows: Row) -> Float[Array, " b"]:
    """The nuclear 3-norm penalty (Lacroix et al. 2018): cubes of moduli, summed over the coordinates of all rows.

    Args:
        rows: part -> `[b, d]` of heads, relations and tails; the parts of a number are its components.
    """
    return jnp.asarray(sum(jnp.sum(sum(part**2 for part in row.values()) ** 1.5, axis=1) for row in rows))


def coupled_bound(gamma: float, entities: int, dimension: int) -> float:
    """A bound of the initial rows of NFE-1 that fits gamma: `b = sqrt((gamma + ln entities) / (0.98 dimension))`.

    Rows from U(-b, b) have a squared distance of about `0.98 dimension b^2`. With this b it equals
    `gamma + ln entities`, so that the first scores are near `-ln entities`: one of all tails is taken to be right.

    Example:
        >>> coupled_bound(4.0, 135, 128)  # UMLS: 0.27
    """
    return math.sqrt((gamma + math.log(entities)) / (0.98 * dimension))


def _answers(scores: Array, tails: Array) -> Array:
    return jnp.arange(scores.shape[1])[None] == tails[:, None]


def _softplus_sigmoid(scores: Array) -> tuple[Array, Array]:
    power = jnp.exp(-jnp.abs(scores))
    return jnp.maximum(scores, 0) + jnp.log1p(power), jnp.where(scores >= 0, 1, power) / (1 + power)
