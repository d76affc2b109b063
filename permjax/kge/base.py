"""What every family of embeddings is: a set, a group that acts on it, and a similarity that is one matrix product."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.kge.groups import Element

Params: TypeAlias = dict[str, dict[str, Array]]
"""Trainable rows: `entity` and `relation`, each part -> `[rows, d]`, or `[rows, k, d]`."""
Row: TypeAlias = Mapping[str, Array]
"""Some rows of a table: part -> `[..., d]`, or `[..., k, d]`."""
Point: TypeAlias = Mapping[str, Array]
"""What the group acts on, a point or a law: part -> `[..., d]`, or `[..., k, d]`."""


class Linear(NamedTuple):
    """One side of a similarity that is `x.vector . y.vector + x.bias + y.bias`.

    Attributes:
        vector: `[..., width]`.
        bias: `[...]`.
    """

    vector: Float[Array, "*batch width"]
    bias: Float[Array, "*batch"]


@dataclass(frozen=True)
class Family(ABC):
    """A family of embeddings: entities are points or laws of a set, relations are bijections of it.

    The relations generate a group of bijections of the set, a subgroup of its symmetric group. A triple (h, r, t) has
    the score `gamma + similarity(act(r, h), t)`. Methods are pure functions over any leading axes; arrays that meet
    have the same number of axes.

    Attributes:
        dimension: number of coordinates d of every part.
    """

    entity_parts: ClassVar[tuple[str, ...]] = ()
    relation_parts: ClassVar[tuple[str, ...]] = ()
    dimension: int = 128

    def __post_init__(self) -> None:
        """Refuse what has no coordinates."""
        if self.dimension < 1:
            raise ValueError(f"an embedding has at least one coordinate; dimension is {self.dimension}.")

    def init(self, key: Any, entities: int, relations: int, bound: float = 0.1) -> Params:
        """Draw all rows from U(-bound, bound), as published.

        Args:
            key: random key.
            entities: number of entities.
            relations: number of relation rows; twice the relations of the graph with reciprocal ones.
            bound: of the uniform law.
        """
        counts = {"entity": (entities, self.entity_shapes()), "relation": (relations, self.relation_shapes())}
        keys = iter(jax.random.split(key, sum(len(shapes) for _, shapes in counts.values())))
        return {
            table: {
                part: jax.random.uniform(next(keys), (rows, *shape), minval=-bound, maxval=bound)
                for part, shape in shapes.items()
            }
            for table, (rows, shapes) in counts.items()
        }

    def entity_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every part of a row of the entity table."""
        return dict.fromkeys(self.entity_parts, (self.dimension,))

    def relation_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every part of a row of the relation table."""
        return dict.fromkeys(self.relation_parts, (self.dimension,))

    def entity(self, row: Row) -> dict[str, Any]:
        """The point, or law, that a row of the entity table stands for."""
        return dict(row)

    def relation(self, row: Row) -> dict[str, Any]:
        """The element of the group that a row of the relation table stands for."""
        return dict(row)

    # the group

    @abstractmethod
    def compose(self, second: Element, first: Element) -> dict[str, Any]:
        """The element that acts like `first`, then `second`."""

    @abstractmethod
    def inverse(self, element: Element) -> dict[str, Any]:
        """The element that undoes this one."""

    @abstractmethod
    def identity(self, like: Element) -> dict[str, Any]:
        """The element that moves nothing, of the shapes of `like`."""

    # the set

    @abstractmethod
    def act(self, element: Element, point: Point) -> dict[str, Any]:
        """Move points, or push laws forward."""

    def lift(self, point: Point) -> dict[str, Any]:  # noqa: ARG002
        """The element that moves the reference to this point: entities as elements of the same group as relations.

        Raises:
            ValueError: entities of this family are more than that.
        """
        raise ValueError(f"entities of {type(self).__name__} are not elements of the group of its relations.")

    def reference(self, like: Point) -> dict[str, Any]:
        """The point x0 that `lift` starts from, of the shapes of `like`, so that act(lift(x), x0) is x.

        Raises:
            ValueError: as `lift` does.
        """
        return self.lift(like)

    def deviation(self, point: Point) -> Any:  # noqa: ARG002
        """The standard deviation of every coordinate of laws, `[..., d]`; None where entities are points."""
        return None

    # the similarity

    @abstractmethod
    def similarity(self, x: Point, y: Point) -> Float[Array, "*batch"]:
        """The similarity of moved heads and tails, by its definition."""

    @abstractmethod
    def query(self, x: Point) -> Linear:
        """A moved head as one side of the similarity."""

    @abstractmethod
    def key(self, y: Point) -> Linear:
        """A tail as the other side of the similarity."""


class OnItself(Family):
    """The set is the group: elements act by composition, and the reference point is the identity."""

    def act(self, element: Element, point: Point) -> dict[str, Any]:
        """Compose the element with the point."""
        return self.compose(element, point)

    def lift(self, point: Point) -> dict[str, Any]:
        """The point itself, which brings the identity to it."""
        return dict(point)

    def reference(self, like: Point) -> dict[str, Any]:
        """The identity."""
        return self.identity(like)


class Euclidean(Family):
    """The similarity is a negative squared distance of coordinates: -|x - y|^2 = 2 x.y - |x|^2 - |y|^2."""

    @abstractmethod
    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """Points as vectors, whose squared distance counts."""

    def similarity(self, x: Point, y: Point) -> Float[Array, "*batch"]:
        """The negative squared distance."""
        return -jnp.sum((self.coordinates(x) - self.coordinates(y)) ** 2, axis=-1)

    def query(self, x: Point) -> Linear:
        """A moved head as one side of the similarity."""
        vector = self.coordinates(x)
        return Linear(2 * vector, -jnp.sum(vector**2, axis=-1))

    def key(self, y: Point) -> Linear:
        """A tail as the other side of the similarity."""
        vector = self.coordinates(y)
        return Linear(vector, -jnp.sum(vector**2, axis=-1))


class Inner(Family):
    """The similarity is the inner product of coordinates."""

    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """All parts side by side."""
        return jnp.concatenate([point[part] for part in self.entity_parts], axis=-1)

    def similarity(self, x: Point, y: Point) -> Float[Array, "*batch"]:
        """The inner product."""
        return jnp.sum(self.coordinates(x) * self.coordinates(y), axis=-1)

    def query(self, x: Point) -> Linear:
        """A moved head as one side of the similarity."""
        vector = self.coordinates(x)
        return Linear(vector, jnp.zeros_like(vector[..., 0]))

    def key(self, y: Point) -> Linear:
        """A tail as the other side of the similarity."""
        return self.query(y)
