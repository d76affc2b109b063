"""How much of a test split can be read off from train: repeated triples, and relations that say the same."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from permjax.kge.evidence import evidence
from permjax.kge.triples import SPLITS, Graph, Rule


class Twins(NamedTuple):
    """Two relations that say nearly the same, or the same turned around.

    Attributes:
        rule: `inverse` or `hierarchy` (of two relations), or `symmetry` (of one), with names.
        share: the part of their pairs in all splits for which it holds, in the worse direction.
        answered: number of triples of the split with the first relation whose twin is in train.
    """

    rule: Rule
    share: float
    answered: int


class Leakage(NamedTuple):
    """What train gives away of another split.

    Attributes:
        split: name of the other split.
        triples: number of its triples.
        repeated: number of them that are in train as they are.
        answered: number of them that are in train as they are or as a twin.
        twins: the relations that do it.
    """

    split: str
    triples: int
    repeated: int
    answered: int
    twins: tuple[Twins, ...]

    def sentences(self) -> tuple[str, ...]:
        """The report in words."""
        part = f"{self.answered} of {self.triples} {self.split} triples ({self.answered / self.triples:.0%})"
        first = f"{part} can be read off from train, {self.repeated} of them because they are repeated there."
        return first, *(
            f"{twin.rule} in {twin.share:.0%} of all cases; this answers {twin.answered} {self.split} triples."
            for twin in self.twins
        )


def leakage(graph: Graph, split: str = "test", *, share: float = 0.8) -> Leakage:
    """Which triples of a split are answered by a triple of train between the same two entities.

    Args:
        graph: the graph.
        split: `valid` or `test`.
        share: relations are twins where this part of the pairs of either, over all splits, is also in the other.

    Raises:
        ValueError: `split` is another one.

    Source: Toutanova and Chen, Observed versus latent features for knowledge base completion (2015), section 4.1.
    """
    if split not in SPLITS[1:]:
        raise ValueError(f"leakage is from train to 'valid' or 'test', not to {split!r}.")
    triples = graph.splits[split]
    repeated = _within(graph, triples)
    answered, twins = repeated, []
    for rule, least, ids in _twins(graph, share):
        turned = rule.kind != "hierarchy"
        for own, other in dict.fromkeys((ids, ids[::-1])):
            mine = triples[:, 1] == own
            moved = triples[:, ::-1] if turned else triples
            found = mine & _within(graph, np.stack([moved[:, 0], np.full(len(triples), other), moved[:, 2]], axis=1))
            answered = answered | found
            names = (graph.relations[own], graph.relations[other])
            twins.append(Twins(Rule(rule.kind, names[: len(rule.relations)]), least, int(found.sum())))
    return Leakage(split, len(triples), int(repeated.sum()), int(answered.sum()), tuple(t for t in twins if t.answered))


def _twins(graph: Graph, share: float) -> list[tuple[Rule, float, tuple[int, int]]]:
    """Pairs of relations that agree in both directions, with the smaller part and their ids."""
    kinds = ("symmetry", "inverse", "hierarchy")
    everything = np.unique(np.concatenate([*graph.splits.values()]), axis=0)
    rows = evidence(everything, graph.size, len(graph.relations), kinds=kinds)
    back = {row.relations: row.confidence for row in rows if row.kind == "hierarchy"}
    found = []
    for row in rows:
        first, last = row.relations[0], row.relations[-1]
        least = min(row.confidence, back[last, first]) if row.kind == "hierarchy" else row.confidence
        if least >= share and (row.kind != "hierarchy" or first < last):
            found.append((Rule(row.kind, tuple(graph.relations[r] for r in row.relations)), least, (first, last)))
    return found


def _within(graph: Graph, triples: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Which triples are in train."""
    sizes = np.array([len(graph.relations) * graph.size, graph.size, 1], np.int64)
    codes, known = (part.astype(np.int64) @ sizes for part in (triples, graph.train))
    return np.isin(codes, known)
