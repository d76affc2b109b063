"""What a knowledge graph is: named entities and relations, and triples (head, relation, tail) in three splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from permjax.tree import nearest

SPLITS = ("train", "valid", "test")
INVERSE = "^-1"
"""What the name of a reciprocal relation ends with."""

_SENTENCES = {
    "symmetry": "{0}(x, y) implies {0}(y, x)",
    "antisymmetry": "{0}(x, y) excludes {0}(y, x)",
    "inverse": "{0}(x, y) is {1}(y, x)",
    "hierarchy": "{0}(x, y) implies {1}(x, y)",
    "exclusion": "{0}(x, y) excludes {1}(x, y)",
    "composition": "{0}(x, y) and {1}(y, z) imply {2}(x, z)",
    "intersection": "{0}(x, y) and {1}(x, y) imply {2}(x, y)",
}
KINDS = tuple(_SENTENCES)
"""Kinds of rules; symmetry and antisymmetry speak of one relation, composition and intersection of three."""


class GraphError(ValueError):
    """A graph that cannot be used; the message says which file, line, split or name, and what to do."""


class Rule(NamedTuple):
    """A rule of relations, such as `Rule("composition", ("parent_of", "parent_of", "grandparent_of"))`.

    Attributes:
        kind: one of `KINDS`.
        relations: their names, in the order of the sentence: premises first, in the order in which a path takes them.
    """

    kind: str
    relations: tuple[str, ...]

    def __str__(self) -> str:
        """The rule as a sentence."""
        return _SENTENCES[self.kind].format(*self.relations)


@dataclass(frozen=True, eq=False)
class Graph:
    """A knowledge graph.

    Attributes:
        name: what to call it in a report.
        entities: names of the E entities, by id.
        relations: names of the R relations, by id.
        train: triples (head, relation, tail) of ids, int32 [n, 3]; other integers are converted.
        valid: the same, to choose a model by.
        test: the same, to judge it by.
        rules: rules that are known to hold.
        notes: what a reader changed or found, in sentences.
    """

    name: str
    entities: tuple[str, ...]
    relations: tuple[str, ...]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    rules: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse repeated names, empty splits, ids out of range and relations that are never trained."""
        for what, names in (("entity", self.entities), ("relation", self.relations)):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise GraphError(f"The graph {self.name} has two {what} ids for {twice!r}; a name has one id.")
        for split, triples in self.splits.items():
            self._check(split, triples)
            object.__setattr__(self, split, triples.astype(np.int32))
        for split in SPLITS[1:]:
            self._check_relations(split)

    @property
    def size(self) -> int:
        """Number of entities."""
        return len(self.entities)

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """The triples by the name of their split."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @cached_property
    def unseen(self) -> Int[np.ndarray, " entities"]:
        """Ids of the entities that no triple of train has."""
        return np.setdiff1d(np.arange(self.size, dtype=np.int32), self.train[:, [0, 2]])

    def both_ways(self, split: str) -> Int[np.ndarray, "m 3"]:
        """Every triple (h, r, t) of a split, followed by the reciprocal one (t, r + R, h): `[2 n, 3]`."""
        return both_ways(self.splits[split], len(self.relations))

    def entity(self, name: str) -> int:
        """The id of an entity.

        Raises:
            GraphError: no entity has this name; suggests the nearest.
        """
        return self._find("entity", name, self._entity_ids)

    def relation(self, name: str) -> int:
        """The id r of a relation `name`, or the id r + R of the reciprocal relation `name^-1`.

        Raises:
            GraphError: no relation has this name; suggests the nearest.
        """
        plain = name.removesuffix(INVERSE)
        if name in self._relation_ids or plain == name:
            return self._find("relation", name, self._relation_ids)
        return self._find("relation", plain, self._relation_ids) + len(self.relations)

    def relation_name(self, relation: int) -> str:
        """The name of relation r < R, or that of the reciprocal of r - R: the inverse of `relation`."""
        direction, plain = divmod(relation, len(self.relations))
        return self.relations[plain] + INVERSE * direction

    @cached_property
    def _entity_ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.entities)}

    @cached_property
    def _relation_ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.relations)}

    def _find(self, what: str, name: str, ids: Mapping[str, int]) -> int:
        if name not in ids:
            known = f"it knows {len(ids)}, such as {next(iter(ids))!r}."
            raise GraphError(f"The graph {self.name} has no {what} {name!r}{nearest(name, ids)}; {known}")
        return ids[name]

    def _check(self, split: str, triples: np.ndarray) -> None:
        if triples.ndim != 2 or triples.shape[1] != 3 or not np.issubdtype(triples.dtype, np.integer):
            seen = f"{triples.dtype} of shape {triples.shape}"
            raise GraphError(f"The {split} triples of {self.name} must be integers of shape [n, 3], not {seen}.")
        if not len(triples):
            message = f"The split {split} of the graph {self.name} is empty; give every split at least one triple."
            raise GraphError(message)
        limits = (self.size, len(self.relations), self.size)
        for column, (what, limit) in enumerate(zip(("head", "relation", "tail"), limits, strict=True)):
            wrong = np.flatnonzero((triples[:, column] < 0) | (triples[:, column] >= limit))
            if len(wrong):
                message = f"Triple {wrong[0]} of the {split} triples of {self.name} has the {what} id "
                raise GraphError(f"{message}{triples[wrong[0], column]}, but ids there are 0..{limit - 1}.")

    def _check_relations(self, split: str) -> None:
        missing = np.setdiff1d(self.splits[split][:, 1], self.train[:, 1])
        if len(missing):
            count = int((self.splits[split][:, 1] == missing[0]).sum())
            message = (
                f"The relation {self.relations[missing[0]]!r} has {count} {split} triples in {self.name} but none in "
                "train, so that nothing can be learnt of it; move some of them to train, or leave the relation out."
            )
            raise GraphError(message)


def both_ways(triples: Int[np.ndarray, "n 3"], relations: int) -> Int[np.ndarray, "m 3"]:
    """Every triple (h, r, t), followed by the reciprocal one (t, r + R, h)."""
    reverse = triples[:, ::-1] + np.array([0, relations, 0], triples.dtype)
    return np.stack([triples, reverse], axis=1).reshape(-1, 3)
