"""What was measured in a PLeaS run, by seed, method and budget, and questions to it."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from permjax.experiments.pleas_scores import Scores

Row = tuple[str, int | None]
"""A method and its budget in percent; those of `REFERENCES` have none."""

Trials = Mapping[int, Mapping[Row, Scores]]
"""By seed and row; every seed has the same rows."""

METHODS = {
    "average": "average",
    "permutation_weights": "permutation, weights",
    "permutation_distance": "permutation, distance",
    "permutation_correlation": "permutation, correlation",
    "repair": "REPAIR",
    "regmean": "RegMean",
    "zip": "zip",
    "pleas_parallel": "PLeaS, parallel",
    "pleas_sequential": "PLeaS, sequential",
    "pleas_owner": "PLeaS, owner",
    "pleas_free": "PLeaS-free",
    "lstsq_identity_parallel": "unpermuted fit, parallel",
    "lstsq_identity_owner": "unpermuted fit, owner",
    "distill_merged": "distilled from the merge",
    "distill_scratch": "distilled from scratch",
}
OWNERS = ("pleas_owner", "lstsq_identity_owner")
"""Methods that are told from which parent's domain a sample comes."""
TAUGHT = ("distill_merged", "distill_scratch")
"""Methods that are told so where the head is shared: it learns the logits of each sample's owner."""

REFERENCES = {
    "parents": "parents",
    "ensemble": "ensemble",
    "ensemble_softmax": "ensemble of probabilities",
    "joint_trained": "trained jointly",
}
"""What has one cost only."""

TITLES = METHODS | REFERENCES

BASELINES = ("permutation_distance", "permutation_correlation")
"""The activation permutations, of which the better one is to be surpassed."""

FIELDS = {"task": "Task accuracy", "joint": "Joint accuracy", "probe": "Accuracy of linear probes"}
"""Accuracies, in the order of the report."""


class Rows(NamedTuple):
    """The trials, asked by row."""

    trials: Trials

    @property
    def all(self) -> list[Row]:
        """Rows in the order of the titles, then of budgets."""
        order = list(TITLES)
        rows = next(iter(self.trials.values()))
        return sorted(rows, key=lambda row: (order.index(row[0]), row[1] or 0))

    @property
    def budgets(self) -> list[int]:
        """All budgets, the smallest first."""
        return sorted({budget for _, budget in self.all if budget is not None})

    @property
    def methods(self) -> list[str]:
        """The methods that have budgets."""
        return list(dict.fromkeys(method for method, budget in self.all if budget is not None))

    @property
    def fields(self) -> list[str]:
        """Accuracies that were measured; joint ones are left out where they are all those of the tasks."""
        known = [field for field in FIELDS if any(self.values(row, field) for row in self.all)]
        pairs = [(self.values(row, "task"), self.values(row, "joint")) for row in self.all]
        same = all(np.allclose(task, joint) for task, joint in pairs if joint)
        return [field for field in known if not (field == "joint" and same)]

    def values(self, row: Row, field: str) -> list[float]:
        """One value for every seed, or none."""
        found = [getattr(rows[row], field) for rows in self.trials.values() if row in rows]
        return [] if None in found else [float(value) for value in found]

    def seconds(self, method: str) -> list[float]:
        """The time of a method for every budget and seed."""
        return [s for row in self.all if row[0] == method for s in self.values(row, "seconds")]

    def residuals(self, row: Row) -> dict[str, tuple[float, float]]:
        """Of every layer that was fitted, before and after the fit; means over seeds."""
        found = [rows[row].residuals for rows in self.trials.values() if row in rows]
        return {layer: tuple(np.mean([one[layer] for one in found], axis=0)) for layer in (found[0] if found else ())}

    def cost(self, row: Row, field: str = "flops") -> float:
        """Mean over seeds, as a multiple of one parent's; NaN where it was not measured."""
        values, one = self.values(row, field), self.values(("parents", None), field)
        return float(np.mean(values) / np.mean(one)) if values and one else np.nan

    def baseline(self, budget: int, field: str) -> str | None:
        """The better of the activation permutations."""
        known = [m for m in BASELINES if self.values((m, budget), field)]
        return max(known, key=lambda m: np.mean(self.values((m, budget), field)), default=None)


def check(trials: Trials) -> None:
    """Refuse trials that cannot be reported.

    Raises:
        ValueError: a seed lacks a row that another one has, a method has no title, or the parents' cost is missing.
    """
    first, *others = trials
    for seed in others:
        if wrong := trials[first].keys() ^ trials[seed].keys():
            method, budget = min(wrong, key=str)
            message = f"The row ({method!r}, {budget}) was measured for only one of the seeds {first} and {seed}; "
            raise ValueError(message + "measure the same rows for every seed.")
    if wrong := sorted({method for method, _ in trials[first]} - TITLES.keys()):
        raise ValueError(f"The method {wrong[0]!r} has no title; known are {', '.join(TITLES)}.")
    if ("parents", None) not in trials[first] or trials[first]["parents", None].flops is None:
        raise ValueError("The row ('parents', None) must be there with its flops: costs are relative to one parent's.")
