"""Filtered ranks from integer counts, with every way of breaking ties side by side."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax.kge.base import Family, Params
from permjax.kge.models import score_all
from permjax.kge.queries import Batch, Queries, queries
from permjax.kge.triples import Graph

Scorer: TypeAlias = Callable[[Array, Array], Array]
"""`scorer(heads [b], relations [b]) -> [b, E]`."""
Policy: TypeAlias = Literal["optimistic", "realistic", "pessimistic", "libkge"]
"""What becomes of ties; see `Ranks`."""

_ATOL, _RTOL = 1e-5, 1e-4


class Counts(NamedTuple):
    """How the candidates of each query stand to its answer, itself left out; int32 `[q]`, bool `[q]`.

    Attributes:
        greater: candidates with a greater score.
        ties: candidates with an equal score.
        clearly_greater: with a greater score that is not near, by the tolerance of LibKGE: |x - answer| <=
            1e-5 + 1e-4 |answer|.
        near: with a near score.
        undefined: whether any score of the query is NaN.
    """

    greater: Int[Array, " q"]
    ties: Int[Array, " q"]
    clearly_greater: Int[Array, " q"]
    near: Int[Array, " q"]
    undefined: Bool[Array, " q"]


class Ranks(NamedTuple):
    """Where the answers of queries stand among the candidates; NumPy arrays of one entry per query.

    Attributes:
        triples: int32 `[q, 3]`: (h, r, t) asked for t, (t, r + R, h) for h.
        relations: R, the number of relations of the graph.
        greater: candidates with a greater score than the answer.
        ties: candidates with an equal score, without the answer itself.
        clearly_greater: as `greater`, without near scores.
        near: candidates with a near score, without the answer itself.
        candidates: how many entities the answer was ranked among, itself included.
    """

    triples: Int[np.ndarray, "q 3"]
    relations: int
    greater: Int[np.ndarray, " q"]
    ties: Int[np.ndarray, " q"]
    clearly_greater: Int[np.ndarray, " q"]
    near: Int[np.ndarray, " q"]
    candidates: Int[np.ndarray, " q"]

    @property
    def optimistic(self) -> Int[np.ndarray, " q"]:
        """1 + #greater: the answer before its ties."""
        return 1 + self.greater

    @property
    def realistic(self) -> Float[np.ndarray, " q"]:
        """1 + #greater + #ties / 2: the mean over all orders of the ties, as in PyKEEN."""
        return 1 + self.greater + self.ties / 2

    @property
    def pessimistic(self) -> Int[np.ndarray, " q"]:
        """1 + #greater + #ties: the answer behind its ties, as in the released code of NFE."""
        return 1 + self.greater + self.ties

    @property
    def libkge(self) -> Int[np.ndarray, " q"]:
        """1 + #clearly greater + floor((1 + #near) / 2): the rounded mean of LibKGE."""
        return 1 + self.clearly_greater + (1 + self.near) // 2

    @property
    def of_heads(self) -> Bool[np.ndarray, " q"]:
        """Which queries ask for a head."""
        return self.triples[:, 1] >= self.relations

    def where(self, chosen: Bool[np.ndarray, " q"]) -> "Ranks":
        """Some of the queries."""
        counts = (part[chosen] for part in self[2:])
        return Ranks(self.triples[chosen], self.relations, *counts)


# counting


def ranks(
    scorer: Scorer,
    graph: Graph,
    split: str = "test",
    *,
    filtered: Sequence[str] | None = None,
    batch: int | None = None,
) -> Ranks:
    """Rank the tail and the head of every triple of a split among all entities that are no known answers.

    Every count is an integer: the candidates above and beside the answer over all entities, less those of the known
    answers. The score of the answer is read from the matrix of its candidates. So ranks depend neither on the size of
    a batch nor on the labels, where the scores do not.

    Args:
        scorer: `scorer(heads [b], relations [b]) -> scores [b, E]`, pure; it is compiled. Relation r + R is the inverse
            of r: heads are asked for as (t, r + R, ?). A `jax.tree_util.Partial` is compiled once for all its
            arguments, any other function once for itself.
        graph: the graph.
        split: `train`, `valid` or `test`.
        filtered: the splits whose answers are not ranked: by default train, and valid for valid, and all for test.
        batch: queries per batch; by default as many as make 16 million scores.

    Raises:
        ValueError: a score is NaN, or there is no such split.

    Example:
        >>> found = ranks(lambda h, r: jnp.zeros((len(h), graph.size)), graph)
        >>> rank_metrics(found)["amr"]
        1.0

    Source: Bordes et al., Translating embeddings for modeling multi-relational data (2013), for the filtered protocol;
    Sun et al., A re-evaluation of knowledge graph completion methods (2020), for ties.
    """
    return rank_queries(scorer, queries(graph, split, filtered=filtered, batch=batch))


def rank_model(
    family: Family,
    params: Params,
    graph: Graph,
    split: str = "test",
    *,
    filtered: Sequence[str] | None = None,
    batch: int | None = None,
) -> Ranks:
    """The ranks of a model with reciprocal relations; see `ranks`.

    Raises:
        ValueError: the model has not two relation rows for each relation; or as `ranks`.
    """
    return ranks(model_scorer(family, params, graph), graph, split, filtered=filtered, batch=batch)


def model_scorer(family: Family, params: Params, graph: Graph) -> Scorer:
    """The scores of a model, for `ranks` and `rank_queries`; compiled once per family and shape.

    Raises:
        ValueError: the tables have other sizes than the graph.
    """
    seen = tuple(len(jax.tree.leaves(params[table])[0]) for table in ("entity", "relation"))
    if seen != (graph.size, 2 * len(graph.relations)):
        raise ValueError(
            f"the model has {seen[0]} entities and {seen[1]} relation rows, but {graph.name} needs {graph.size} and "
            f"{2 * len(graph.relations)}, two per relation: r + R is the inverse of r."
        )
    return jax.tree_util.Partial(_scores_of(family), params)


def rank_queries(scorer: Scorer, asked: Queries) -> Ranks:
    """As `ranks`, for queries that were laid out before.

    Raises:
        ValueError: a score is NaN.
    """
    scorer = scorer if isinstance(scorer, jax.tree_util.Partial) else jax.tree_util.Partial(scorer)
    return ranks_of(_count_all(scorer, asked.batches), asked)


def ranks_of(counts: Counts, asked: Queries) -> Ranks:
    """The ranks that counts of all batches, `[batches, b]`, stand for.

    Raises:
        ValueError: a score was NaN.
    """
    found = jax.device_get(counts)
    greater, ties, clearly, near, undefined = (np.reshape(part, -1)[: len(asked.triples)] for part in found)
    if undefined.any():
        raise ValueError(_undefined(asked, int(undefined.argmax())))
    return Ranks(asked.triples, len(asked.graph.relations), greater, ties, clearly, near, asked.candidates)


def count(scorer: Scorer, batch: Batch) -> Counts:
    """The counts of one batch of queries; pure."""
    scores = scorer(batch.heads, batch.relations)
    answers = jnp.take_along_axis(scores, batch.answers[:, None], axis=1)
    return without_answer(tally(scores, answers[:, 0], batch))


def tally(scores: Float[Array, "q some"], answers: Float[Array, " q"], batch: Batch, first: Any = 0) -> Counts:
    """The counts of some consecutive entities, less known answers; the answer itself is counted.

    Args:
        scores: of these entities.
        answers: the scores of the answers.
        batch: the queries.
        first: the id of the first of these entities.
    """
    size = scores.shape[1]
    place = batch.known - first
    there = (place >= 0) & (place < size) & (batch.rows < len(answers))
    known = scores.at[batch.rows, place].get(mode="clip")
    owners = answers.at[batch.rows].get(mode="clip")
    everyone = (jnp.sum(of, axis=1, dtype=jnp.int32) for of in _standings(scores, answers[:, None]))
    minus = (
        jax.ops.segment_sum((of & there).astype(jnp.int32), batch.rows, len(answers), mode="drop")
        for of in _standings(known, owners)
    )
    numbers = (a - b for a, b in zip(everyone, minus, strict=True))
    return Counts(*numbers, undefined=jnp.isnan(scores).any(axis=1))


def without_answer(counts: Counts) -> Counts:
    """The counts of all entities without the answer, which is equal and near to itself."""
    return counts._replace(ties=counts.ties - 1, near=counts.near - 1)


def _standings(scores: Float[Array, "..."], answers: Float[Array, "..."]) -> tuple[Array, Array, Array, Array]:
    """Which scores are greater than those of the answers, equal, clearly greater, and near."""
    near = jnp.isclose(scores, answers, rtol=_RTOL, atol=_ATOL)
    greater = scores > answers
    return greater, scores == answers, greater & ~near, near


@jax.jit
def _count_all(scorer: Scorer, batches: Batch) -> Counts:
    """The counts of all batches, `[batches, b]`."""
    return jax.lax.map(functools.partial(count, scorer), batches)


@functools.cache
def _scores_of(family: Family) -> Callable[..., Array]:
    """The same function for the same family, so that it is compiled once."""
    return functools.partial(score_all, family)


def _undefined(asked: Queries, query: int) -> str:
    graph, (head, relation, _) = asked.graph, asked.triples[query]
    entity, name = graph.entities[head], graph.relations[relation % len(graph.relations)]
    question = f"({entity}, {name}, ?)" if relation < len(graph.relations) else f"(?, {name}, {entity})"
    return (
        f"a score of the query {question} is NaN, so its answer has no rank; the model has diverged, or its parameters "
        "were not read as they were written."
    )


# metrics


def rank_metrics(found: Ranks, policy: Policy = "realistic") -> dict[str, float]:
    """Means over queries: of 1/rank, of the rank, of rank <= k, and of the rank next to what chance would give.

    AMR is the mean rank over its expectation under random scores, mean((candidates + 1) / 2): 1 at chance, less is
    better. AMRI is 1 - (MR - 1) / mean((candidates - 1) / 2): 0 at chance, 1 if every answer comes first.

    Args:
        found: ranks.
        policy: `optimistic`, `realistic`, `pessimistic` or `libkge`; see `Ranks`.

    Raises:
        ValueError: there are no ranks.

    Source: Berrendorf et al., On the ambiguity of rank-based evaluation of entity alignment or link prediction
    methods (2020), for AMR and AMRI.
    """
    if not len(found.triples):
        raise ValueError("there are no ranks to take means of; choose queries that occur.")
    rank = np.asarray(getattr(found, policy), np.float64)
    hits = {f"hits_at_{k}": float((rank <= k).mean()) for k in (1, 3, 10)}
    mean, chance = rank.mean(), (found.candidates.mean() + 1) / 2
    index = 1 - (mean - 1) / (chance - 1) if chance > 1 else 1.0
    return {
        "mrr": float((1 / rank).mean()),
        "mr": float(mean),
        **hits,
        "amr": float(mean / chance),
        "amri": float(index),
    }
