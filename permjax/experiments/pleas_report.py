"""What a PLeaS run tells: accuracies by method and budget, paired differences, costs, and residuals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from permjax import tree
from permjax.experiments.pleas_figures import figures
from permjax.experiments.pleas_rows import (
    BASELINES,
    FIELDS,
    OWNERS,
    REFERENCES,
    TAUGHT,
    TITLES,
    Row,
    Rows,
    Trials,
    check,
)
from permjax.experiments.pleas_scores import PROTOCOLS, paired_difference
from permjax.experiments.pleas_tasks import SCENARIOS, Task
from permjax.report import Outcome, Table, Text
from permjax.symmetry.spec import PermutationSpec


class About(NamedTuple):
    """What was merged and how it was measured.

    Attributes:
        task: what the parents learned.
        spec: the symmetry of their body.
        calibration: what the methods were calibrated on, in words.
        protocol: a key of `PROTOCOLS`.
        free: what PLeaS-free was calibrated on, in words, where there are such rows.
        models: to save, by file stem.
    """

    task: Task
    spec: PermutationSpec
    calibration: str
    protocol: str
    free: str = ""
    models: Mapping[str, Any] = {}


def report(config: Any, about: About, trials: Trials) -> Outcome:
    """The outcome of all seeds.

    Args:
        config: of the run; its `model` names the networks.
        about: what was merged.
        trials: what was measured, by seed, method and budget; the parents are among the rows, with their cost.

    Raises:
        ValueError: a seed lacks a row that others have, a method has no title, or the parents are not among the rows.
    """
    check(trials)
    rows = Rows(trials)
    kind, task = type(config.model).model_type, about.task
    shown = (f"{m}_{b}_joint" for b in rows.budgets[:2] for m in ("pleas_owner", "permutation_correlation"))
    metrics = dict(_metrics(rows))
    return Outcome(
        title=f"PLeaS: two {kind} networks on {task.data} merged, {SCENARIOS[task.scenario].split(':')[0]}",
        summary=_summary(kind, about, rows),
        metrics=metrics,
        tables=tuple(_tables(about, rows)),
        figures=tuple(figures(rows)),
        texts=(Text("Protocols", "\n\n".join(PROTOCOLS.values())), Text("Permutation spec", about.spec.explain())),
        models={stem: tree.flatten(params) for stem, params in about.models.items()},
        network=replace(config.model, classes=len(task.classes[0])),
        headline=tuple(key for key in ("parents_task", *shown, "ensemble_joint") if key in metrics),
    )


# -- metrics -------------------------------------------------------------------------------------------------------


def _metrics(rows: Rows) -> Iterator[tuple[str, float]]:
    """Yield every number as its mean over seeds; of accuracies and gains also how sure they are."""
    for method, budget in rows.all:
        name = method if budget is None else f"{method}_{budget}"
        for field in (*FIELDS, "flops", "dense_params"):
            if values := rows.values((method, budget), field):
                yield f"{name}_{field}", float(np.mean(values))
                if field in FIELDS and len(values) > 1:
                    yield f"{name}_{field}_std", float(np.std(values, ddof=1))
        if budget is not None:
            yield from _gain(rows, method, budget, f"{name}_joint_gain")
    for method in TITLES:
        if seconds := rows.seconds(method):
            yield f"seconds_{method}", float(np.mean(seconds))


def _gain(rows: Rows, method: str, budget: int, name: str) -> Iterator[tuple[str, float]]:
    """Yield by how much the better activation permutation is surpassed, and the ends of the paired interval."""
    baseline, values = rows.baseline(budget, "joint"), rows.values((method, budget), "joint")
    if baseline is None or not values or method in BASELINES:
        return
    found = paired_difference(values, rows.values((baseline, budget), "joint"))
    yield name, found.mean
    if found.seeds > 1:
        yield from ((f"{name}_low", found.low), (f"{name}_high", found.high))


# -- words ---------------------------------------------------------------------------------------------------------


def _summary(kind: str, about: About, rows: Rows) -> str:
    count = len(rows.trials)
    field = "joint" if "joint" in rows.fields else "task"
    references = "; ".join(
        f"{REFERENCES[name]} {_cell(values, 1)} %" + (", each on its own task" if name == "parents" else "")
        for name in REFERENCES
        if (values := rows.values((name, None), field) or rows.values((name, None), "task"))
    )
    best = "; ".join(_best(rows, budget, field) for budget in rows.budgets)
    warning = f" {_free_warning(about)}" if "pleas_free" in rows.methods else ""
    return (
        f"{count} {'pair' if count == 1 else 'pairs'} of {kind} networks of different initialisation, merged with "
        f"{about.calibration}. {_sentence(SCENARIOS[about.task.scenario])}. {FIELDS[field]} by cost in "
        f"percent of one parent's: {best}. For comparison: {references}.{warning}"
    )


def _best(rows: Rows, budget: int, field: str) -> str:
    """Say which method is the best at a budget, whichever it is, and what the better permutation gives."""
    means = {m: float(np.mean(v)) for m in rows.methods if (v := rows.values((m, budget), field))}
    first = max(means, key=lambda method: means[method])
    text = f"at {budget} % the best is ‘{TITLES[first]}’ with {means[first]:.1f} %"
    others = [m for m in ("pleas_owner", rows.baseline(budget, field)) if m in means and m != first]
    return text + "".join(f", ‘{TITLES[m]}’ has {means[m]:.1f} %" for m in others if m is not None)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _free_warning(about: About) -> str:
    return (
        f"PLeaS-free was calibrated on {about.free}, not on the task's data: its accuracy depends on how alike they "
        "are, and says nothing about other calibration data."
    )


# -- tables --------------------------------------------------------------------------------------------------------


def _tables(about: About, rows: Rows) -> Iterator[Table]:
    for field in rows.fields:
        yield _accuracy_table(about, rows, field)
    yield _reference_table(rows)
    field = "joint" if "joint" in rows.fields else "task"
    if any(rows.baseline(budget, field) for budget in rows.budgets):
        yield _gain_table(about, rows, field)
    yield _parents_table(about, rows)
    yield _cost_table(rows)


def _by_budget(
    title: str, rows: Rows, cell: Callable[[str, int], str], caption: str, extra: Mapping[str, list[str]] | None = None
) -> Table:
    """Return a table of methods and budgets, of the methods for which anything is to be said."""
    more = extra or {}
    lines = [(TITLES[m], *(cell(m, b) for b in rows.budgets)) for m in rows.methods]
    lines = [(*line, *rest) for line, *rest in zip(lines, *more.values(), strict=True) if any(line[1:])]
    return Table(title, ("method", *(f"{b} %" for b in rows.budgets), *more), tuple(lines), caption)


def _accuracy_table(about: About, rows: Rows, field: str) -> Table:
    caption = [PROTOCOLS["probe" if field == "probe" else about.protocol]]
    if "joint" not in rows.fields:
        caption.append("Here both accuracies agree, so one is shown.")
    caption += [f"By cost in percent of one parent's; calibrated on {about.calibration}.", _owner_note(about, rows)]
    caption += [_free_warning(about)] if "pleas_free" in rows.methods else []
    caption += [_over(rows)] if len(rows.trials) > 1 else []

    def cell(method: str, budget: int) -> str:
        return _cell(rows.values((method, budget), field), 1)

    return _by_budget(f"{FIELDS[field]} [%]", rows, cell, " ".join(caption))


def _owner_note(about: About, rows: Rows) -> str:
    """Name the methods that are told more than the others."""
    owners = (*OWNERS, *TAUGHT) if about.task.heads == "shared" else OWNERS
    told = " and ".join(f"‘{TITLES[method]}’" for method in rows.methods if method in owners)
    return f"{told} know from which parent's domain each unlabelled calibration sample comes." if told else ""


def _over(rows: Rows) -> str:
    return f"Mean and standard deviation over {len(rows.trials)} pairs."


def _reference_table(rows: Rows) -> Table:
    lines = []
    for name, title in REFERENCES.items():
        if (row := (name, None)) in rows.all:
            cells = (_cell(rows.values(row, field), 1) for field in rows.fields)
            lines.append((title, *cells, _multiple(rows.cost(row)), _cell(rows.values(row, "seconds"), 1)))
    columns = ("network", *(f"{FIELDS[f].lower()} [%]" for f in rows.fields), "cost", "seconds")
    caption = (
        "The parents each on their own task, both of them as an ensemble (logits of own heads, or the mean of those of "
        "shared ones; or with probabilities in place of logits), and one network of a parent's width trained with "
        "labels on what both know: the real ceiling. Cost as a multiple of one parent's."
    )
    return Table("For comparison", columns, tuple(lines), caption)


def _gain_table(about: About, rows: Rows, field: str) -> Table:
    def cell(method: str, budget: int) -> str:
        baseline = rows.baseline(budget, field)
        if baseline is None or method == baseline:
            return "" if baseline is None else "baseline"
        return _difference(rows, field, (method, budget), (baseline, budget))

    caption = (
        f"{FIELDS[field]} less that of the better activation permutation at the same budget, in points{_paired(rows)}."
    )
    return _by_budget("Gain over permutation alone", rows, cell, f"{caption} {_owner_note(about, rows)}")


def _parents_table(about: About, rows: Rows) -> Table:
    def cell(method: str, budget: int) -> str:
        return _difference(rows, "task", (method, budget), ("parents", None))

    caption = f"Task accuracy less that of the parents, in points{_paired(rows)}. {_owner_note(about, rows)}"
    return _by_budget("Distance to the parents", rows, cell, caption)


def _cost_table(rows: Rows) -> Table:
    def cell(method: str, budget: int) -> str:
        row = (method, budget)
        stored = rows.cost(row, "dense_params")
        return _multiple(rows.cost(row)) + ("" if np.isnan(stored) else f" ({_multiple(stored)})")

    caption = (
        "Operations for one input with the block structure, as a multiple of one parent's; in brackets the numbers to "
        "store where blocks are kept as dense arrays. Seconds are means over budgets, compilation included."
    )
    seconds = [f"{np.mean(s):.1f}" if (s := rows.seconds(method)) else "" for method in rows.methods]
    return _by_budget("Cost", rows, cell, caption, {"seconds": seconds})


def _difference(rows: Rows, field: str, row: Row, reference: Row) -> str:
    values = rows.values(row, field)
    if not values:
        return ""
    found = paired_difference(values, rows.values(reference, field))
    return f"{found.mean:+.1f}" + (f" [{found.low:+.1f}, {found.high:+.1f}]" if found.seeds > 1 else "")


def _paired(rows: Rows) -> str:
    count = len(rows.trials)
    return f", with the 95 % interval of Student's t for {count} pairs" if count > 1 else "; one pair, so no interval"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _multiple(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"
