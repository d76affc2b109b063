"""What an evaluation asks, and which answers are already known: laid out in batches of one shape."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from permjax.kge.triples import SPLITS, Graph

_SCORES_PER_BATCH = 1 << 24


class Batch(NamedTuple):
    """Queries (head, relation, ?) with their answers, and the other answers that are known, in coordinate form; int32.

    Attributes:
        heads: `[b]`; in `Queries`, all are NumPy arrays with a first axis over batches.
        relations: `[b]`; r + R stands for the inverse of r.
        answers: `[b]`.
        rows: `[m]`, the query of each known answer; `b` where there is none.
        known: `[m]`, a known answer of that query, never the answer itself.
    """

    heads: Int[Array, " b"]
    relations: Int[Array, " b"]
    answers: Int[Array, " b"]
    rows: Int[Array, " m"]
    known: Int[Array, " m"]


class Queries(NamedTuple):
    """Everything that the evaluation of one split needs beside the model.

    Attributes:
        graph: the graph.
        triples: int32 `[q, 3]`: (h, r, t) asks for t, and (t, r + R, h), which follows it, for h.
        candidates: `[q]`: how many entities an answer is ranked among, itself included.
        batches: the queries in batches of one size; the last one is filled up with its last query.
    """

    graph: Graph
    triples: Int[np.ndarray, "q 3"]
    candidates: Int[np.ndarray, " q"]
    batches: Batch


def queries(
    graph: Graph, split: str = "test", *, filtered: Sequence[str] | None = None, batch: int | None = None
) -> Queries:
    """Lay out the queries of a split, two per triple.

    Args:
        graph: the graph.
        split: `train`, `valid` or `test`; a triple that stands in it twice is asked twice.
        filtered: the splits whose answers are not ranked. By default those up to the split itself, so that validation
            and with it the choice of a model know nothing of the test triples; `()` gives raw ranks.
        batch: queries per batch; by default as many as make 16 million scores.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split of a graph; choose one of {', '.join(SPLITS)}.")
    filtered = SPLITS[: SPLITS.index(split) + 1] if filtered is None else filtered
    triples = graph.both_ways(split)
    rows, known = _known(graph, triples, filtered)
    candidates = graph.size - np.bincount(rows, minlength=len(triples))
    return Queries(graph, triples, candidates, _batches(triples, rows, known, _size(graph, len(triples), batch)))


def _size(graph: Graph, count: int, batch: int | None) -> int:
    """The size of a batch: as given, or the largest within bounds, made equal for all batches."""
    if batch is not None:
        return min(batch, count)
    largest = max(_SCORES_PER_BATCH // graph.size, 1)
    return -(-count // -(-count // largest))


def _known(
    graph: Graph, asked: Int[np.ndarray, "q 3"], filtered: Sequence[str]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The query and the entity of every known answer of a query, once each, without the answer asked for."""
    head, relation, tail = np.concatenate([np.zeros((0, 3), np.int32), *map(graph.both_ways, filtered)]).T
    relations = 2 * len(graph.relations)
    question = head.astype(np.int64) * relations + relation
    order = np.lexsort((tail, question))
    question, tail = question[order], tail[order]
    new = np.diff(question, prepend=-1).astype(bool) | np.diff(tail, prepend=-1).astype(bool)
    question, tail = question[new], tail[new]
    own = asked[:, 0].astype(np.int64) * relations + asked[:, 1]
    start, stop = (np.searchsorted(question, own, side) for side in ("left", "right"))
    counts = stop - start
    rows = np.repeat(np.arange(len(asked)), counts)
    answers = tail[np.arange(len(rows)) + np.repeat(start - np.cumsum(counts) + counts, counts)]
    others = answers != asked[rows, 2]
    return rows[others], answers[others]


def _batches(
    triples: Int[np.ndarray, "q 3"], rows: Int[np.ndarray, " m"], known: Int[np.ndarray, " m"], size: int
) -> Batch:
    """All batches, with a first axis that counts them."""
    count = -(-len(triples) // size)
    asked = triples[np.minimum(np.arange(count * size), len(triples) - 1)].reshape(count, size, 3)
    home = rows // size
    place = np.arange(len(rows)) - np.searchsorted(home, home)
    width = int(place.max(initial=0)) + 1
    owners, entities = np.full((count, width), size, np.int32), np.zeros((count, width), np.int32)
    owners[home, place], entities[home, place] = rows % size, known
    parts: tuple[Any, ...] = (*np.moveaxis(asked, -1, 0), owners, entities)
    return Batch(*parts)
