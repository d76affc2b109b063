"""Rules of relations, measured on a trained model beside what the triples of the graph say."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from permjax.kge.base import Family, Params
from permjax.kge.evidence import Evidence, Facts, evidence
from permjax.kge.rule_measures import Relations
from permjax.kge.triples import KINDS, Graph, Rule

STRENGTH, CONFIDENCE = 0.7, 0.5
"""What a rule has to have at least to count as found: the model keeps it, and train does not speak against it.

A model alone cannot tell relations apart that the same pairs of entities answer, such as `mother_of` and `father_of`,
asked for a child. The train triples can, but they lack what is to be predicted, hence no more than one half.
"""


class MeasuredRule(NamedTuple):
    """A rule, what a model makes of it, and what the graph says.

    Attributes:
        rule: kind and names of relations.
        strength: how well the model keeps the rule, from 0 (or less) to 1; `measure_rules` says how.
        agreement: how alike both sides are as maps, 0 for two relations picked at random, 1 for equal maps; NaN for
            intersections, whose premises are no map.
        answered: mean of 1 / rank of what the rule concludes from train, among the answers of the model.
        support: pairs of train that bear the rule out.
        confidence: the part of the pairs of train with the premises for which the conclusion is in train too.
    """

    rule: Rule
    strength: float
    agreement: float
    answered: float
    support: int
    confidence: float


class RuleReport(NamedTuple):
    """The rules of a model, and its relations as maps.

    Attributes:
        rules: by kind in the order of `KINDS`, the strongest first.
        names: of the relations and, from R on, of their reverses.
        agreement: of each two of these, as in `MeasuredRule`, [2 R, 2 R].
        elements: what these are as elements of the group, part -> [2 R, ...].
        typical: correlation of the scores of two relations picked at random, which counts as agreement 0.
    """

    rules: tuple[MeasuredRule, ...]
    names: tuple[str, ...]
    agreement: Float[np.ndarray, "relations relations"]
    elements: dict[str, np.ndarray]
    typical: float

    def found(self, strength: float = STRENGTH, confidence: float = CONFIDENCE) -> tuple[MeasuredRule, ...]:
        """The rules of at least some strength and confidence; with confidence 0, those that the model alone says."""
        return tuple(row for row in self.rules if row.strength >= strength and row.confidence >= confidence)


class Recovery(NamedTuple):
    """How many rules of a kind were found.

    Attributes:
        kind: the kind.
        known: number of rules that hold.
        found: number of rules that were found.
        right: number of those that were found and hold.
    """

    kind: str
    known: int
    found: int
    right: int

    @property
    def precision(self) -> float:
        """The part of what was found that holds; NaN where nothing was found."""
        return self.right / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        """The part of what holds that was found; NaN where nothing holds."""
        return self.right / self.known if self.known else float("nan")


def recovery(found: Collection[MeasuredRule], known: Collection[Rule]) -> tuple[Recovery, ...]:
    """What was found of the rules that hold, for every kind that either has.

    Args:
        found: such as `RuleReport.found()`.
        known: such as `Graph.rules`.
    """
    rows = []
    for kind in KINDS:
        names = {row.rule for row in found if row.rule.kind == kind}
        holding = {rule for rule in known if rule.kind == kind}
        if names or holding:
            rows.append(Recovery(kind, len(holding), len(names), len(names & holding)))
    return tuple(rows)


def measure_rules(
    family: Family,
    params: Params,
    graph: Graph,
    *,
    kinds: Collection[str] = KINDS,
    support: int = 5,
    sample: int = 256,
    seed: int = 0,
) -> RuleReport:
    """Measure on a model every rule that at least a few pairs of train bear out.

    Two measures serve all families. The *agreement* of two elements g and g' is the correlation of
    `similarity(act(g, x), y)` and `similarity(act(g', x), y)` over tails y, mean over heads x of the trained entities,
    rescaled so that two relations picked at random have 0 and equal maps 1. The *answered* part of a rule is the mean
    of 1 / rank of what it concludes from train, asked for both ways (the lesser counts), where other conclusions and
    known answers are no rivals. The strength of a rule is:

        symmetry      the lesser of both: agreement of r with its reverse
        inverse       the lesser of both: agreement of q with the reverse of r
        composition   the lesser of both: agreement of q p with r
        hierarchy     the answered part, as there are no elements that would have to be equal
        intersection  the answered part
        antisymmetry  1 less the strength of the symmetry
        exclusion     1 less the greater strength of both hierarchies

    A model that answers nothing excludes everything, so look at what it excludes only after what it implies.

    Args:
        family: the family of embeddings.
        params: its rows; from R on, relation rows are reciprocal. Without these, inverses take their place.
        graph: the graph that they were trained on.
        kinds: which kinds to measure; `evidence` says what they cost.
        support: the least number of pairs of train.
        sample: how many entities, and how many pairs for each rule, to measure with.
        seed: of the sample.

    Raises:
        ValueError: the tables have other sizes than the graph.
    """
    relations = Relations.of(family, params, len(graph.relations))
    if relations.size != graph.size:
        raise ValueError(f"the model has {relations.size} entities, but {graph.name} has {graph.size}; give its own.")
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(graph.size)[:sample])
    direct = relations.agreements(some)
    composed = relations.compositions(some) if "composition" in kinds else np.empty((0, 0, 0), np.float32)
    count = relations.count
    typical = float(np.median(direct[:count, :count][~np.eye(count, dtype=bool)])) if count > 1 else 0.0
    direct, composed = ((part - typical) / max(1 - typical, 1e-6) for part in (direct, composed))
    measure = _Measure(relations, Facts(graph.train, graph.size, count), direct, composed, sample, rng)
    found = evidence(graph.train, graph.size, count, kinds=kinds, support=support)
    measured = [measure(row, graph.relations) for row in found]
    measured.sort(key=lambda row: (KINDS.index(row.rule.kind), -row.strength, -row.support))
    names = tuple(graph.relation_name(r) for r in range(2 * count))
    elements = {part: np.asarray(values) for part, values in relations.elements.items()}
    return RuleReport(tuple(measured), names, direct, elements, typical)


@dataclass(frozen=True, eq=False)
class _Measure:
    """What every rule is measured with."""

    relations: Relations
    facts: Facts
    direct: Float[np.ndarray, "both both"]
    composed: Float[np.ndarray, "relations relations relations"]
    sample: int
    rng: np.random.Generator
    paths: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def __call__(self, row: Evidence, names: tuple[str, ...]) -> MeasuredRule:
        """Measure one rule."""
        agreement, answered = self._agreement(row), self._answered(row)
        strength = answered if row.kind in ("hierarchy", "exclusion") else float(np.fmin(agreement, answered))
        if row.kind in ("antisymmetry", "exclusion"):
            strength = 1 - strength
        rule = Rule(row.kind, tuple(names[r] for r in row.relations))
        return MeasuredRule(rule, strength, agreement, answered, row.support, row.confidence)

    def _agreement(self, row: Evidence) -> float:
        back = self.relations.count
        if row.kind == "intersection":
            return float("nan")
        if row.kind == "composition":
            return float(self.composed[row.relations])
        q, r = (row.relations * 2)[:2]
        turn = back if row.kind in ("symmetry", "antisymmetry", "inverse") else 0
        return float(self.direct[q, r + turn] + self.direct[q + back, r + back - turn]) / 2

    def _answered(self, row: Evidence) -> float:
        if row.kind in ("composition", "intersection"):
            return self._both_ways(self._premises(row), row.relations[-1])
        q, r = (row.relations * 2)[:2]
        turned = slice(None, None, 1 if row.kind in ("hierarchy", "exclusion") else -1)
        forth = self._both_ways(self.facts.of(q)[:, turned], r)
        if row.kind in ("inverse", "exclusion"):
            back = self._both_ways(self.facts.of(r)[:, turned], q)
            return min(forth, back) if row.kind == "inverse" else max(forth, back)
        return forth

    def _premises(self, row: Evidence) -> Int[np.ndarray, "n 2"]:
        p, q, _ = row.relations
        if row.kind == "intersection":
            return self.facts.both(p, q)
        if (p, q) not in self.paths:
            self.paths.clear()
            self.paths[p, q] = self.facts.paths(p, q)
        return self.paths[p, q]

    def _both_ways(self, pairs: Int[np.ndarray, "n 2"], relation: int) -> float:
        """How the pairs are answered by the relation and its reverse, the lesser of both."""
        chosen = self.rng.permutation(len(pairs))[: self.sample]
        known = self.facts.of(relation)
        forth = self.relations.answers(relation, pairs, known, chosen)
        back = self.relations.answers(relation + self.relations.count, pairs[:, ::-1], known[:, ::-1], chosen)
        return min(forth, back)
