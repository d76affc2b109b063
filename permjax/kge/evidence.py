"""What the triples of a graph say for a rule: in how many cases it holds, and in which part of those where it could.

A triple of an entity with itself is not counted, nor is a path that comes back to its start: few relations say
anything about an entity and itself, and a graph that leaves such triples out is not an exception to a rule.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy import sparse

from permjax.kge.triples import KINDS


class Evidence(NamedTuple):
    """A rule and how triples bear it out.

    Attributes:
        kind: one of `KINDS`.
        relations: ids, in the order of `Rule.relations`.
        support: pairs of entities for which premises and conclusion hold; for what excludes, those that could break it.
        confidence: the part of the pairs with the premises for which the conclusion holds; for an inverse the smaller
            part of both directions.
    """

    kind: str
    relations: tuple[int, ...]
    support: int
    confidence: float


def evidence(
    triples: Int[np.ndarray, "n 3"], entities: int, relations: int, *, kinds: Collection[str] = KINDS, support: int = 1
) -> tuple[Evidence, ...]:
    """The rules of some kinds that at least `support` pairs of entities bear out, in the order of `KINDS`.

    A composition costs a sparse product of two relations, an intersection one pass over a pair of them: with hundreds
    of relations leave these kinds out, or give the triples of a few relations.

    Args:
        triples: (head, relation, tail) of ids; repetitions do not count.
        entities: number of entities.
        relations: number of relations.
        kinds: which of `KINDS` to look for.
        support: the least number of pairs.
    """
    facts = Facts(triples, entities, relations)
    searches = {
        "symmetry": facts.symmetries,
        "antisymmetry": facts.antisymmetries,
        "inverse": facts.inverses,
        "hierarchy": facts.hierarchies,
        "exclusion": facts.exclusions,
        "composition": facts.compositions,
        "intersection": facts.intersections,
    }
    return tuple(row for kind in KINDS if kind in kinds for row in searches[kind]() if row.support >= support)


@dataclass(frozen=True, eq=False)
class Facts:
    """Relations as sets of pairs of entities.

    Attributes:
        triples: (head, relation, tail) of ids; repetitions do not count.
        entities: number of entities.
        relations: number of relations.
    """

    triples: Int[np.ndarray, "n 3"]
    entities: int
    relations: int

    @cached_property
    def _proper(self) -> np.ndarray:
        proper = self.triples[self.triples[:, 0] != self.triples[:, 2]]
        return np.unique(proper.astype(np.int64), axis=0)

    @cached_property
    def _codes(self) -> np.ndarray:
        """A number for every pair that is related in either direction."""
        heads, _, tails = self._proper.T
        return np.unique(np.concatenate([heads * self.entities + tails, tails * self.entities + heads]))

    def _sets(self, heads: np.ndarray, tails: np.ndarray) -> sparse.csr_array:
        columns = np.searchsorted(self._codes, heads * self.entities + tails)
        shape = (self.relations, len(self._codes))
        return sparse.csr_array((np.ones(len(columns), np.int32), (self._proper[:, 1], columns)), shape)

    @cached_property
    def pairs(self) -> sparse.csr_array:
        """Which pair (column) each relation (row) has."""
        return self._sets(self._proper[:, 0], self._proper[:, 2])

    @cached_property
    def counts(self) -> Int[np.ndarray, " relations"]:
        """Number of pairs of each relation."""
        return np.bincount(self._proper[:, 1], minlength=self.relations)

    @cached_property
    def shared(self) -> Int[np.ndarray, "relations relations"]:
        """Number of pairs (x, y) in both of two relations."""
        return (self.pairs @ self.pairs.T).toarray()

    @cached_property
    def reversed(self) -> Int[np.ndarray, "relations relations"]:
        """Number of pairs (x, y) in one relation with (y, x) in the other."""
        return (self.pairs @ self._sets(self._proper[:, 2], self._proper[:, 0]).T).toarray()

    def of(self, relation: int) -> Int[np.ndarray, "n 2"]:
        """The pairs (x, y) of a relation."""
        return self._proper[self._proper[:, 1] == relation][:, [0, 2]]

    def both(self, p: int, q: int) -> Int[np.ndarray, "n 2"]:
        """The pairs (x, y) with p(x, y) and q(x, y)."""
        columns = np.intersect1d(*(self.pairs[[r]].indices for r in (p, q)))
        return np.stack(np.divmod(self._codes[columns], self.entities), axis=1)

    def paths(self, p: int, q: int) -> Int[np.ndarray, "n 2"]:
        """The pairs (x, z) with p(x, y) and q(y, z) for some y."""
        starts, ends = (self._adjacencies[p] @ self._adjacencies[q]).nonzero()
        return np.stack([starts, ends], axis=1)[starts != ends].astype(np.int64)

    @cached_property
    def _adjacencies(self) -> list[sparse.csr_array]:
        shape = (self.entities, self.entities)
        pairs = (self.of(r).T for r in range(self.relations))
        return [sparse.csr_array((np.ones(len(heads), np.int32), (heads, tails)), shape) for heads, tails in pairs]

    def symmetries(self) -> Iterator[Evidence]:
        """r(x, y) implies r(y, x)."""
        for r, count in enumerate(self.counts):
            if both := int(self.reversed[r, r]):
                yield Evidence("symmetry", (r,), both, both / int(count))

    def antisymmetries(self) -> Iterator[Evidence]:
        """r(x, y) excludes r(y, x)."""
        for r, count in enumerate(self.counts):
            if count:
                yield Evidence("antisymmetry", (r,), int(count), 1 - int(self.reversed[r, r]) / int(count))

    def inverses(self) -> Iterator[Evidence]:
        """q(x, y) is r(y, x)."""
        for q, r in np.argwhere(np.triu(self.reversed, 1)).tolist():
            both = int(self.reversed[q, r])
            yield Evidence("inverse", (q, r), both, both / int(max(self.counts[q], self.counts[r])))

    def hierarchies(self) -> Iterator[Evidence]:
        """q(x, y) implies r(x, y)."""
        for q, r in np.argwhere(self.shared).tolist():
            if q != r:
                both = int(self.shared[q, r])
                yield Evidence("hierarchy", (q, r), both, both / int(self.counts[q]))

    def exclusions(self) -> Iterator[Evidence]:
        """q(x, y) excludes r(x, y), for relations that have a head or a tail in common, so that they could meet."""
        heads, tails = (
            sparse.csr_array((np.ones(len(self._proper), bool), (self._proper[:, 1], self._proper[:, column])))
            for column in (0, 2)
        )
        meet = (heads @ heads.T).toarray() + (tails @ tails.T).toarray()
        for q, r in np.argwhere(np.triu(meet, 1)).tolist():
            least = int(min(self.counts[q], self.counts[r]))
            yield Evidence("exclusion", (q, r), least, 1 - int(self.shared[q, r]) / least)

    def compositions(self) -> Iterator[Evidence]:
        """p(x, y) and q(y, z) imply r(x, z)."""
        for p, q in product(range(self.relations), repeat=2):
            yield from self._conclusions("composition", (p, q), self.paths(p, q))

    def intersections(self) -> Iterator[Evidence]:
        """p(x, y) and q(x, y) imply r(x, y), where they say more together than alone, and neither implies the other."""
        for p, q in np.argwhere(np.triu(self.shared, 1)).tolist():
            both = int(self.shared[p, q])
            if both == min(self.counts[p], self.counts[q]):
                continue
            for row in self._conclusions("intersection", (p, q), self.both(p, q)):
                r = row.relations[-1]
                alone = max(self.shared[s, r] / self.counts[s] for s in (p, q))
                if r not in (p, q) and row.confidence > alone:
                    yield row

    def _conclusions(self, kind: str, premises: tuple[int, int], pairs: np.ndarray) -> Iterator[Evidence]:
        codes = pairs[:, 0] * self.entities + pairs[:, 1]
        hits = self.pairs[:, np.searchsorted(self._codes, codes[np.isin(codes, self._codes)])].sum(axis=1)
        for r in np.flatnonzero(hits).tolist():
            yield Evidence(kind, (*premises, r), int(hits[r]), int(hits[r]) / len(pairs))
