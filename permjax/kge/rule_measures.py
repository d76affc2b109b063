"""How alike the maps of relations are, and how a model answers what a rule concludes."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax.kge.base import Family, Linear, Params, Point
from permjax.kge.groups import Element
from permjax.kge.models import product


@dataclass(frozen=True, eq=False)
class Relations:
    """The relations of a model as bijections, with their reverses.

    Attributes:
        family: the family of embeddings.
        entities: all points or laws, part -> [E, ...].
        elements: relation r and, at r + R, its reverse: part -> [2 R, ...].
    """

    family: Family
    entities: Point
    elements: Element

    @classmethod
    def of(cls, family: Family, params: Params, relations: int) -> "Relations":
        """The relations of a table of R rows, or of 2 R rows of which those from R on are reciprocal.

        Reciprocal rows are the reverses; without them these are the inverses in the group.

        Raises:
            ValueError: the table has another number of rows, or an element without reciprocal row has no inverse.
        """
        element = family.relation(params["relation"])
        count = len(jax.tree.leaves(element)[0])
        if count not in (relations, 2 * relations):
            message = f"The relation table has {count} rows, but {relations} relations have {relations} rows, or "
            raise ValueError(f"{message}{2 * relations} with reciprocal ones; give the graph that it was trained on.")
        if count == relations:
            element = jax.tree.map(lambda *both: jnp.concatenate(both), element, family.inverse(element))
        return cls(family, family.entity(params["entity"]), element)

    @property
    def count(self) -> int:
        """Number of relations R."""
        return len(jax.tree.leaves(self.elements)[0]) // 2

    @property
    def size(self) -> int:
        """Number of entities E."""
        return len(jax.tree.leaves(self.entities)[0])

    @functools.cached_property
    def _keys(self) -> Linear:
        return self.family.key(self.entities)

    def scores(self, relation: int, heads: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n entities"]:
        """The similarity of some heads, moved by a relation or a reverse, with every entity."""
        padded = np.resize(heads, max(64, 1 << (len(heads) - 1).bit_length()))  # few shapes are compiled
        moved = _scores_of(self.family)(_at(self.elements, relation), _at(self.entities, padded), self._keys)
        return np.asarray(moved)[: len(heads)]

    def agreements(self, sample: Int[np.ndarray, " some"]) -> Float[np.ndarray, "elements elements"]:
        """How alike relations and reverses are, [2 R, 2 R]: the correlation of their scores, mean over heads.

        The scores of a head, moved by either of two elements, are compared over tails; 1 means that no tail can tell
        the elements apart.

        Args:
            sample: ids of the entities that serve as heads and tails.
        """
        direct = self._profiles(self.elements, sample)
        return np.asarray(_alike(direct, direct))

    def compositions(self, sample: Int[np.ndarray, " some"]) -> Float[np.ndarray, "relations relations relations"]:
        """How alike compositions and relations are, [R, R, R], as `agreements` says it.

        Entry (p, q, r) is for `compose(q, p)` and r, mean over it and over that of its reverse with the reverse of r.

        Args:
            sample: ids of the entities that serve as heads and tails.
        """
        direct, count = self._profiles(self.elements, sample), self.count
        forth, back = _at(self.elements, slice(None, count)), _at(self.elements, slice(count, None))
        composed = np.empty((count, count, count), np.float32)
        for p in range(count):
            first, last = (jax.tree.map(lambda x, p=p: jnp.broadcast_to(x[p], x.shape), some) for some in (forth, back))
            there = self._profiles(self.family.compose(forth, first), sample)
            reverse = self._profiles(self.family.compose(last, back), sample)
            composed[p] = (_alike(there, direct[:count]) + _alike(reverse, direct[count:])) / 2
        return composed

    def _profiles(self, elements: Element, sample: Int[np.ndarray, " some"]) -> Float[Array, "elements heads tails"]:
        return _profiles_of(self.family)(elements, _at(self.entities, sample))

    def answers(
        self, relation: int, pairs: Int[np.ndarray, "n 2"], known: Int[np.ndarray, "k 2"], chosen: Int[np.ndarray, " m"]
    ) -> float:
        """The mean of 1 / rank of tails y for (x, relation, ?) over some pairs (x, y).

        The rivals of y are no other pairs of x, no known answers of x, and not x itself.

        Args:
            relation: a relation or a reverse.
            pairs: all pairs (x, y) that the relation should have.
            known: pairs that it has besides.
            chosen: which of the pairs to ask for.
        """
        heads, tails = pairs[chosen].T
        found = self.scores(relation, heads)
        own = np.take_along_axis(found, tails[:, None], axis=1)
        rivals = ~_related(np.concatenate([pairs, known]), heads, self.size)
        rivals[np.arange(len(heads)), heads] = False
        rank = 1 + ((found > own) & rivals).sum(axis=1) + ((found == own) & rivals).sum(axis=1) / 2
        return float((1 / rank).mean())


def _at(part_of: Mapping[str, Array], index: Any) -> dict[str, Any]:
    """Some rows, or one without its axis."""
    return {part: values[index] for part, values in part_of.items()}


def _related(pairs: np.ndarray, heads: np.ndarray, size: int) -> Bool[np.ndarray, "n entities"]:
    """Which entities stand in a pair with each of some heads."""
    distinct, places = np.unique(heads, return_inverse=True)
    table = np.zeros((len(distinct), size), bool)
    places_of_pairs = np.searchsorted(distinct, pairs[:, 0]).clip(max=len(distinct) - 1)
    met = distinct[places_of_pairs] == pairs[:, 0]
    table[places_of_pairs[met], pairs[met, 1]] = True
    return table[places]


@functools.cache
def _scores_of(family: Family) -> Callable[..., Array]:
    def scores(element: Element, heads: Point, keys: Linear) -> Array:
        return product(family.query(_moved(family, element, heads)), keys)

    return jax.jit(scores)


@functools.cache
def _profiles_of(family: Family) -> Callable[..., Array]:
    """Scores of each head over all tails, centred and of length one, for many elements: [elements, heads, tails]."""

    def profile(element: Element, points: Point) -> Array:
        found = product(family.query(_moved(family, element, points)), family.key(points))
        centred = found - found.mean(axis=1, keepdims=True)
        return centred / jnp.maximum(jnp.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    return jax.jit(lambda elements, points: jax.lax.map(lambda element: profile(element, points), elements))


@jax.jit
def _alike(a: Float[Array, "m heads tails"], b: Float[Array, "n heads tails"]) -> Float[Array, "m n"]:
    """The mean over heads of the correlation of profiles."""
    flat = (x.reshape(len(x), -1) for x in (a, b))
    return jnp.matmul(next(flat), next(flat).T, precision=jax.lax.Precision.HIGHEST) / a.shape[1]


def _moved(family: Family, element: Element, points: Point) -> Point:
    """Many points, moved by one element."""
    return jax.vmap(lambda point: family.act(element, point))(points)
