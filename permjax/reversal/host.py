"""Permuting units of single documents on the host, in NumPy: for collators, data pipelines and text files."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from permjax.reversal.reorder import ORIGINAL, RANDOM, REVERSED, THIRDS, order_edges


class PermutedDocument(NamedTuple):
    """A document in which units have moved.

    Attributes:
        document: like the one given.
        index: the place from which each token came.
        order: its number in `ORDERS`.
    """

    document: dict[str, Any]
    index: Int[np.ndarray, " t"]
    order: int


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """A generator for one document: of the seed, an epoch or copy and the example, and of nothing else."""
    return np.random.default_rng([seed, *numbers])


def draw_order(rng: np.random.Generator, probs: Sequence[float | int] = THIRDS) -> int:
    """The number in `ORDERS` of an order drawn with these probabilities."""
    return int(np.searchsorted(order_edges(probs), rng.random(), side="right"))


def unit_order(rng: np.random.Generator, units: int, order: int) -> Int[np.ndarray, " units"]:
    """The units in the given order: `result[i]` is the one that comes `i`-th."""
    ways = {ORIGINAL: np.arange, REVERSED: lambda n: np.arange(n)[::-1], RANDOM: rng.permutation}
    return ways[order](units)


def permute_document(
    rng: np.random.Generator, document: Mapping[str, Any], probs: Sequence[float | int] = THIRDS
) -> PermutedDocument:
    """`permjax.reversal.reorder.permute_units` of one document in NumPy, with the same laws but other random numbers.

    Args:
        rng: as `generator` makes it.
        document: `tokens` [t], `unit_ids` [t], `pinned` [t] where wanted, and any other array by token.
        probs: of the original, the reversed and a random order.

    Raises:
        ValueError: probabilities that are none.
    """
    order = draw_order(rng, probs)
    unit_ids = np.asarray(document["unit_ids"])
    pinned = np.asarray(document.get("pinned", np.zeros(len(unit_ids), bool)), bool)
    index = np.arange(len(unit_ids))
    for first, last in _blocks(pinned):
        cuts = np.flatnonzero(np.diff(unit_ids[first:last])) + first + 1
        units = np.split(index[first:last].copy(), cuts - first)
        index[first:last] = np.concatenate([units[u] for u in unit_order(rng, len(units), order)])
    moved = {name: _moved(values, index) for name, values in document.items()}
    return PermutedDocument(moved, index, order)


def _blocks(pinned: Bool[np.ndarray, " t"]) -> list[tuple[int, int]]:
    """Begin and end of each stretch without pinned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], pinned, [True]])))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def _moved(values: Any, index: Int[np.ndarray, " t"]) -> Any:
    by_token = np.ndim(values) > 0 and len(values) == len(index) and not isinstance(values, str)
    return np.asarray(values)[index] if by_token else values
