"""The figures of a run on adapters: accuracy by method, by rank, and by method and task."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

from permjax.experiments.lora_tasks_rows import METHOD_TITLES, REFERENCES, Trials
from permjax.report import Curve, Figure, Matrix


def figures(
    trials: Trials, tasks: Sequence[str], swept: Sequence[str], ranks: Sequence[int]
) -> Iterator[Figure | Matrix]:
    """All figures; `swept` are the methods that were run at several ranks."""
    yield _bars(trials)
    yield _by_rank(trials, swept, ranks)
    yield _by_task(trials, tasks)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % interval of Student's t for the mean; the mean itself for one value."""
    count, mean = len(values), float(np.mean(values))
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count) if count > 1 else 0.0
    return mean - float(half), mean + float(half)


def _bars(trials: Trials) -> Figure:
    rows = {row: title for row, title in (REFERENCES | METHOD_TITLES).items() if row in trials.rows}
    curves = [
        _curve(label, list(rows.values()), [trials.means(row, scaled=scaled) for row in rows])
        for label, scaled in (("as it is", False), ("at the best factor", True))
    ]
    caption = "Mean accuracy over the tasks with 95 % intervals over the seeds." if len(trials.seeds) > 1 else ""
    return Figure("methods", "Accuracy of merged adapters", caption, "method", "accuracy [%]", (*curves,), "bars")


def _by_rank(trials: Trials, swept: Sequence[str], ranks: Sequence[int]) -> Figure:
    curves = []
    for name in swept:
        for label, scaled in (("as it is", False), ("best factor", True)):
            values = [trials.means(f"{name}_rank_{rank}", scaled=scaled) for rank in ranks]
            curves.append(_curve(f"{METHOD_TITLES[name]}, {label}", ranks, values))
    caption = f"Ranks {', '.join(map(str, ranks))}: half the mean rank r of the adapters, r, 2 r, and their sum."
    return Figure("ranks", "Accuracy against rank", caption, "rank of the merged adapter", "accuracy [%]", (*curves,))


def _curve(label: str, x: Sequence, values: Sequence[Sequence[float]]) -> Curve:
    mean = [float(np.mean(some)) for some in values]
    if len(values[0]) == 1:
        return Curve(label, x, mean)
    low, high = zip(*map(interval, values), strict=True)
    return Curve(label, x, mean, np.clip(low, 0, 100), np.clip(high, 0, 100))


def _by_task(trials: Trials, tasks: Sequence[str]) -> Matrix:
    rows = {row: title for row, title in (REFERENCES | METHOD_TITLES).items() if row in trials.rows}
    values = np.stack([trials.tasks(row, scaled=True).mean(0) for row in rows])
    columns = [task.replace("_", " ") for task in tasks]
    caption = "Each method at its best factor, chosen on other questions; means over the seeds."
    title = "Accuracy on every task"
    return Matrix("tasks", title, caption, "task", "method", "accuracy [%]", [*rows.values()], columns, values)
