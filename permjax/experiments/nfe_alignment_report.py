"""What a run on aligned tables tells."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.experiments.nfe_config import Setting
from permjax.experiments.pleas_scores import Difference, paired_difference
from permjax.kge.triples import Graph
from permjax.report import Curve, Figure, Outcome, Table

TITLES = {
    "parents": "the two models by themselves",
    "aligned": "average after alignment",
    "unsigned": "average after alignment without signs (control)",
    "unaligned": "average as they are",
    "random": "average after random order and signs (control)",
}


class Pair(NamedTuple):
    """What was measured on two models.

    Attributes:
        lines: way of bringing them together -> test MRR along the line between the two.
        correlation: of aligned coordinates, `[d]`.
        recovered: share of the coordinates of a planted copy that were brought back.
        error: largest difference of rows after that.
    """

    lines: dict[str, np.ndarray]
    correlation: np.ndarray
    recovered: float
    error: float

    def middle(self, name: str) -> float:
        """The MRR of the average."""
        line = self.lines[name]
        return float(line[len(line) // 2])

    @property
    def parents(self) -> float:
        """The mean MRR of both models."""
        return float(self.lines["aligned"][[0, -1]].mean())


def report(config: Any, graph: Graph, setting: Setting, pairs: Sequence[Pair], points: np.ndarray) -> Outcome:
    """The outcome of all pairs.

    Args:
        config: of the run.
        graph: what the models learned.
        setting: their family and training.
        pairs: what was measured.
        points: where lines were measured.
    """
    values = {"parents": [pair.parents for pair in pairs]}
    values |= {name: [pair.middle(name) for pair in pairs] for name in TITLES if name != "parents"}
    gain = paired_difference(values["aligned"], values["unaligned"])
    return Outcome(
        title=f"Aligned embeddings: {setting.model} on {graph.name}",
        summary=" ".join(_words(config, graph, setting, pairs, values, gain)),
        metrics=dict(_metrics(values, gain, pairs)),
        tables=(_table(values),),
        figures=(_figure(pairs, points),),
        headline=("parents_mrr_mean", "unaligned_mrr_mean", "aligned_mrr_mean", "aligned_over_unaligned"),
    )


def _metrics(values: dict[str, list[float]], gain: Difference, pairs: Sequence[Pair]) -> Iterator[tuple[str, float]]:
    for name, found in values.items():
        yield f"{name}_mrr_mean", float(np.mean(found))
        if len(found) > 1:
            yield f"{name}_mrr_std", float(np.std(found, ddof=1))
    yield "aligned_over_unaligned", gain.mean
    if gain.seeds > 1:
        yield from (("aligned_over_unaligned_low", gain.low), ("aligned_over_unaligned_high", gain.high))
    yield "planted_recovered", float(np.min([pair.recovered for pair in pairs]))
    yield "planted_error", float(np.max([pair.error for pair in pairs]))
    yield "correlation", float(np.mean([abs(pair.correlation).mean() for pair in pairs]))


def _words(
    config: Any, graph: Graph, setting: Setting, pairs: Sequence[Pair], values: dict[str, list[float]], gain: Difference
) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    mean = {name: f"{np.mean(found):.3f}" for name, found in values.items()}
    count = config.trials
    yield (
        f"{count} pair{'s' if count > 1 else ''} of {setting.model} models ({setting.family.dimension} coordinates) "
        f"learned {graph.name} from different seeds; their test MRR is {mean['parents']}."
    )
    interval = f" (95 % interval {gain.low:.3f} to {gain.high:.3f})" if gain.seeds > 1 else ""
    yield (
        f"Their average has {mean['unaligned']} as they are and {mean['aligned']} after their coordinates were "
        f"matched, turned and shifted: {gain.mean:+.3f}{interval}."
    )
    yield f"Controls: {mean['unsigned']} with an order but no signs, {mean['random']} with random order and signs."
    worst, error = min(pair.recovered for pair in pairs), max(pair.error for pair in pairs)
    exact = "Every coordinate" if worst == 1 else f"Only {100 * worst:.0f} % of the coordinates"
    yield f"{exact} of a planted permuted and turned copy came back, with a largest difference of {error:.1e}."


def _table(values: dict[str, list[float]]) -> Table:
    rows = tuple((TITLES[name], float(np.mean(values[name])), min(values[name]), max(values[name])) for name in TITLES)
    caption = "Filtered realistic ranks of heads and tails on the test triples; means over pairs, and the extremes."
    return Table("Averages of two tables", ("", "MRR", "worst pair", "best pair"), rows, caption)


def _figure(pairs: Sequence[Pair], points: np.ndarray) -> Figure:
    curves = []
    for name in ("aligned", "unsigned", "unaligned", "random"):
        lines = np.stack([pair.lines[name] for pair in pairs])
        label = TITLES[name].removeprefix("average ")
        curves.append(Curve(label, points, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0)))
    title = "Test MRR on the line between two models"
    caption = "Means over pairs; bands show all pairs. At both ends is one of the two models."
    return Figure("interpolation", title, caption, "weight of the second model", "test MRR", tuple(curves))
