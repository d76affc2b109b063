"""What was measured in a run on knowledge graphs, by graph, model and seed, and questions to it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from permjax.kge.breakdown import by_cardinality, by_direction, by_relation
from permjax.kge.graph import Graph
from permjax.kge.rank import Policy, Ranks, rank_metrics
from permjax.kge.train import KgeResult

TITLES = {
    "nfe_1": "NFE-1",
    "nfe_2": "NFE-2",
    "nfe_3": "NFE-3",
    "nfe_k": "NFE-K",
    "affine": "affine",
    "nfe_1_mu": "NFE-1, means only",
    "nfe_1_sigma": "NFE-1, deviations only",
    "transe": "TransE",
    "distmult": "DistMult",
    "complex": "ComplEx",
    "rotate": "RotatE",
    "quate": "QuatE",
}
CLASSES = ("1-1", "1-N", "N-1", "N-N")
MEASURES = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10", "mr")


def title(model: str) -> str:
    """What to call a model in a table: the title of the family that its name begins with, and the rest of it."""
    known = max((name for name in TITLES if f"{model}_".startswith(f"{name}_")), key=len, default="")
    rest = model.removeprefix(known).replace("_", " ").strip()
    return ", ".join(filter(None, (TITLES.get(known, ""), rest)))


class Trial(NamedTuple):
    """What one model on one graph gave.

    Attributes:
        found: the ranks of the test triples, by seed.
        controls: the ranks of permuted test triples, by seed; empty where they were not asked for.
        result: of training.
        queries_per_second: of one evaluation.
    """

    found: tuple[Ranks, ...]
    controls: tuple[Ranks, ...]
    result: KgeResult
    queries_per_second: float

    def values(self, measure: str, policy: Policy = "realistic") -> list[float]:
        """A measure on all test triples, by seed."""
        return [rank_metrics(ranks, policy)[measure] for ranks in self.found]

    def directions(self) -> dict[str, float]:
        """The mean MRR of questions for heads and of those for tails."""
        return _means(self.found, by_direction)

    def classes(self, graph: Graph) -> dict[str, float]:
        """The mean MRR of every class of relations that was asked about."""
        return _means(self.found, lambda ranks: by_cardinality(ranks, graph))

    def relations(self, graph: Graph) -> dict[str, float]:
        """The mean MRR of every relation that was asked about."""
        return _means(self.found, lambda ranks: by_relation(ranks, graph))

    def control(self) -> dict[str, float]:
        """What permuted test triples give, and what chance would give."""
        if not self.controls:
            return {}
        found = [rank_metrics(ranks) for ranks in self.controls]
        means = {f"permuted_{name}": float(np.mean([one[name] for one in found])) for name in ("mrr", "amr")}
        return {**means, "chance_mrr": chance(self.controls[0].candidates)}


class Trials(NamedTuple):
    """All trials.

    Attributes:
        seeds: of the models of every trial.
        found: by graph and model.
    """

    seeds: Sequence[int]
    found: Mapping[tuple[str, str], Trial]

    @property
    def graphs(self) -> list[str]:
        """The names of the graphs."""
        return list(dict.fromkeys(graph for graph, _ in self.found))

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return list(dict.fromkeys(model for _, model in self.found))

    @property
    def first(self) -> Trial:
        """The first model on the first graph."""
        return next(iter(self.found.values()))


def chance(candidates: Sequence[int] | np.ndarray) -> float:
    """The MRR of ranks that are drawn uniformly from as many candidates: mean over questions of (1 + .. + 1/c) / c."""
    sums = np.cumsum(1 / np.arange(1, np.max(candidates) + 1))
    return float(np.mean(sums[np.asarray(candidates) - 1] / candidates))


def _means(found: Sequence[Ranks], parts: Callable[[Ranks], Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """The mean MRR over seeds of every part of the questions, which are the same for all seeds."""
    by_seed = [parts(ranks) for ranks in found]
    return {name: float(np.mean([one[name]["mrr"] for one in by_seed])) for name in by_seed[0]}
