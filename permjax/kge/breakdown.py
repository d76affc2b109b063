"""Metrics by what was asked: by direction, by relation, and by how many answers relations have."""

from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int

from permjax.kge.rank import Policy, Ranks, rank_metrics
from permjax.kge.triples import Graph

Cardinality: TypeAlias = Literal["1-1", "1-N", "N-1", "N-N"]
"""The class of a relation: in 1-N, a tail has about one head, but a head has several tails."""

_MANY = 1.5


def by_direction(found: Ranks, policy: Policy = "realistic") -> dict[str, dict[str, float]]:
    """The metrics of queries for a `head` and of those for a `tail`."""
    return {side: rank_metrics(found.where(found.of_heads == (side == "head")), policy) for side in ("head", "tail")}


def by_relation(found: Ranks, graph: Graph, policy: Policy = "realistic") -> dict[str, dict[str, float]]:
    """The metrics of both directions of every relation that was asked about, by its label."""
    relation = found.triples[:, 1] % found.relations
    return {graph.relations[r]: rank_metrics(found.where(relation == r), policy) for r in np.unique(relation)}


def by_cardinality(found: Ranks, graph: Graph, policy: Policy = "realistic") -> dict[str, dict[str, float]]:
    """The metrics of every class of relations that was asked about; see `cardinalities`."""
    classes = np.array(cardinalities(graph))[found.triples[:, 1] % found.relations]
    return {str(name): rank_metrics(found.where(classes == name), policy) for name in np.unique(classes)}


def cardinalities(graph: Graph) -> tuple[Cardinality, ...]:
    """The class of every relation: a side counts as N if it has 1.5 or more entities for one of the other on average.

    The averages are over all splits, each triple once. A relation without triples is 1-1.

    Source: Bordes et al., Translating embeddings for modeling multi-relational data (2013), section 4.3.
    """
    triples = np.unique(np.concatenate([*graph.splits.values()]), axis=0)
    many_heads = _per_other(triples[:, [2, 1]], len(graph.relations)) >= _MANY
    many_tails = _per_other(triples[:, [0, 1]], len(graph.relations)) >= _MANY
    names: dict[tuple[bool, bool], Cardinality]
    names = {(False, False): "1-1", (False, True): "1-N", (True, False): "N-1", (True, True): "N-N"}
    return tuple(names[bool(heads), bool(tails)] for heads, tails in zip(many_heads, many_tails, strict=True))


def _per_other(pairs: Int[np.ndarray, "n 2"], relations: int) -> np.ndarray:
    """Triples per distinct (entity, relation), for each relation."""
    distinct = np.bincount(np.unique(pairs, axis=0)[:, 1], minlength=relations)
    return np.bincount(pairs[:, 1], minlength=relations) / np.maximum(distinct, 1)
