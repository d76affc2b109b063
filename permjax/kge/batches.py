"""What training goes over: queries with their tails, and their order in each epoch."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from permjax.kge.graph import Graph


class Examples(NamedTuple):
    """Queries (head, relation, ?) and the tails that answer them.

    Attributes:
        heads: entity ids.
        relations: relation ids; those of the opposite direction come after all others.
        starts: the tails of query i are those from `starts[i]` up to `starts[i + 1]`.
        tails: entity ids.
    """

    heads: Int[Any, " n"]
    relations: Int[Any, " n"]
    starts: Int[Any, " n+1"]
    tails: Int[Any, " m"]


def examples(graph: Graph, *, grouped: bool) -> Examples:
    """The training triples of a graph in both directions as queries.

    Args:
        graph: the graph.
        grouped: one query for each different (head, relation), with all its tails; else one for each triple.
    """
    triples = graph.both_ways("train")
    if not grouped:
        heads, relations, tails = np.ascontiguousarray(triples.T)
        return Examples(heads, relations, np.arange(len(triples) + 1, dtype=np.int32), tails)
    triples = np.unique(triples, axis=0)
    pairs, starts = np.unique(triples[:, :2], axis=0, return_index=True)
    heads, relations = np.ascontiguousarray(pairs.T)
    return Examples(
        heads, relations, np.append(starts, len(triples)).astype(np.int32), np.ascontiguousarray(triples[:, 2])
    )


def most_tails(found: Examples, batch_size: int) -> int:
    """The largest number of tails that a batch may have."""
    return int(np.sort(np.diff(found.starts))[-batch_size:].sum())


def order(seed: int, epoch: int, count: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """The queries of each batch of an epoch in random order; -1 fills up the last batch."""
    steps = -(-count // batch_size)
    rows = np.full(steps * batch_size, -1, np.int32)
    rows[:count] = np.random.default_rng((seed, epoch)).permutation(count)
    return rows.reshape(steps, batch_size)


def known_tails(
    found: Examples, ids: Int[Array, " b"], real: Bool[Array, " b"], capacity: int
) -> tuple[Int[Array, " pairs"], Int[Array, " pairs"], Bool[Array, " pairs"]]:
    """All tails of the queries of a batch, as pairs.

    Args:
        found: the queries.
        ids: which of them are in the batch.
        real: which of these count; the others have no tails.
        capacity: the number of pairs to return, as from `most_tails`.

    Returns:
        The position in the batch, the tail, and whether there is such a pair.
    """
    firsts = found.starts[ids]
    counts = jnp.where(real, found.starts[ids + 1] - firsts, 0)
    before = jnp.cumsum(counts) - counts
    rows = jnp.repeat(jnp.arange(len(ids)), counts, total_repeat_length=capacity)
    place = jnp.arange(capacity)
    there = place < counts.sum()
    tails = found.tails[jnp.where(there, firsts[rows] + place - before[rows], 0)]
    return rows, tails, there
