"""What was measured in a run on adapters, by seed and row, and questions to it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from permjax.experiments.lora_tasks_scores import Score

METHOD_TITLES = {
    "lora_lego": "LEGO, as in the paper",
    "lego_weighted": "LEGO, counted by size",
    "lego_gauged": "LEGO, balanced gauge",
    "lego_kernel": "LEGO, outer products",
    "lego_balanced": "LEGO, balanced clusters",
    "concat": "concatenation (the sum)",
    "truncate": "best rank-k of the sum",
    "task_arithmetic": "task arithmetic",
    "linear": "linear (factors averaged)",
    "aligned_linear": "linear, ranks aligned",
    "ties": "TIES on factors",
    "dare": "DARE on factors",
    "magnitude": "magnitude pruning of factors",
    "knots": "KnOTS",
    "core_space": "Core Space",
    "tsv": "TSV",
    "iso_c": "Iso-C",
    "ctm": "compress then merge",
    "regmean": "RegMean (with inputs)",
    "ties_svd": "TIES on updates",
    "magnitude_svd": "magnitude pruning of updates",
    "dare_svd": "DARE on updates",
}
REFERENCES = {
    "individual": "each adapter on its own task",
    "joint": "one adapter trained on all tasks",
    "base": "base model without adapter",
    "random_control": "LEGO of random adapters",
}
ABLATION = {
    "lora_lego_no_parameter": (False, "sqrt_r_over_k"),
    "lora_lego_no_output": (True, "none"),
    "lora_lego_sqrt_n": (True, "sqrt_n_over_k"),
    "lora_lego_no_parameter_no_output": (False, "none"),
    "lora_lego_no_parameter_sqrt_n": (False, "sqrt_n_over_k"),
}
"""Parameter reweighting and output scale of forms that are not the paper's, by the name of the row."""
PERMUTED = ("linear", "aligned_linear", "lora_lego")
"""Methods that are run before and after ranks change places."""


class Trial(NamedTuple):
    """What one seed gave.

    Attributes:
        scores: by row: references, methods, and methods with an ending that says what is different.
        changes: relative changes of the merged updates, by metric name.
    """

    scores: dict[str, Score]
    changes: dict[str, float]


class Trials(NamedTuple):
    """The trials of all seeds, which have the same rows."""

    seeds: Mapping[int, Trial]

    @property
    def rows(self) -> list[str]:
        """The names of the rows."""
        return list(next(iter(self.seeds.values())).scores)

    def tasks(self, row: str, *, scaled: bool = False) -> Float[np.ndarray, "seeds tasks"]:
        """Accuracies by seed and task, as they are or at the best factor."""
        scores = [trial.scores[row] for trial in self.seeds.values()]
        return np.stack([score.scaled if scaled else score.tasks for score in scores])

    def means(self, row: str, *, scaled: bool = False) -> list[float]:
        """Mean accuracies over the tasks by seed."""
        return self.tasks(row, scaled=scaled).mean(1).tolist()

    def values(self, row: str, field: str) -> list[float]:
        """Another field of the scores by seed."""
        return [getattr(trial.scores[row], field) for trial in self.seeds.values()]

    @property
    def changes(self) -> dict[str, list[float]]:
        """By metric name and seed."""
        names = next(iter(self.seeds.values())).changes
        return {name: [trial.changes[name] for trial in self.seeds.values()] for name in names}


def swept_ranks(ranks: Sequence[int]) -> list[int]:
    """Half the mean rank r of the adapters, r, 2 r, and the sum of their ranks."""
    mean = np.mean(ranks)
    return sorted({max(1, round(mean / 2)), round(mean), round(2 * mean), sum(ranks)})
