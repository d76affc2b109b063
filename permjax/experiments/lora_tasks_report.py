"""What a run on adapters tells: accuracies by method, what ranks and gauges change, and what can be concluded."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from permjax.experiments.lora_tasks_figures import figures
from permjax.experiments.lora_tasks_rows import (
    ABLATION,
    METHOD_TITLES,
    PERMUTED,
    REFERENCES,
    Trials,
    swept_ranks,
)
from permjax.experiments.pleas_scores import Difference, paired_difference
from permjax.report import Outcome, Table, Text

TITLES = REFERENCES | METHOD_TITLES
_SINGLE = ("individual", "joint", "base")
_HEADLINE = ("individual", "base", "lora_lego", "lego_balanced", "linear", "random_control")
_COMPARED = {
    "lora_lego_over_linear": ("lora_lego", "linear"),
    "lora_lego_over_random_control": ("lora_lego", "random_control"),
    "lora_lego_parameter_gain": ("lora_lego", "lora_lego_no_parameter"),
    "lora_lego_output_gain": ("lora_lego", "lora_lego_no_output"),
}
"""Differences of accuracies by metric name, paired over seeds."""
_FACTOR = (
    "With equal weights the merged adapter stands for the mean of the updates, not for their sum, unless a method "
    "scales it by itself; 'as it is' takes it so. Methods differ much in the size of what they give, so 'best factor' "
    "multiplies the merged update by the factor that is best on other questions."
)


def report(config: Any, trials: Trials) -> Outcome:
    """The outcome of all seeds.

    Args:
        config: of the run, with `language`, `ranks` and `gauge`.
        trials: what was measured; every seed has the same rows.
    """
    tasks = config.language.tasks
    metrics = dict(_metrics(trials, tasks))
    tables = (_methods, _attacks, _sweep, _ablation, _interference)
    return Outcome(
        title=f"LoRA merging: {len(tasks)} tasks, adapters of ranks {', '.join(map(str, config.ranks))}",
        summary=" ".join((_setting(config, trials), *_verdicts(trials))),
        metrics=metrics,
        tables=tuple(table(config, trials) for table in tables),
        figures=tuple(figures(trials, tasks, config.swept, swept_ranks(config.ranks))),
        texts=(Text("Tasks", _tasks(config)),),
        headline=tuple(key for row in _HEADLINE if (key := f"{row}_accuracy_mean") in metrics),
    )


# metrics


def _metrics(trials: Trials, tasks: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield every number as its mean over seeds, and of mean accuracies the standard deviation."""
    shown = [row for row in TITLES if row in trials.rows]
    for row in [*shown, *(row for row in trials.rows if row not in TITLES)]:
        yield from _spread(f"{row}_accuracy", trials.means(row))
        if row not in _SINGLE:
            yield from _spread(f"{row}_scaled_accuracy", trials.means(row, scaled=True))
    for name, values in trials.changes.items():
        yield name, float(np.mean(values))
    for name, difference in _differences(trials).items():
        yield name, difference.mean
        yield (f"{name}_effect", _effect(difference)) if "gain" in name else (f"{name}_holds", difference.mean > 0)
        if difference.seeds > 1:
            yield from ((f"{name}_low", difference.low), (f"{name}_high", difference.high))
    for row in shown:
        yield from zip((f"{row}_{task}_accuracy" for task in tasks), trials.tasks(row).mean(0).tolist(), strict=True)
        for field in ("kept", "scaled_kept", "factor") if row not in _SINGLE else ("kept",):
            yield f"{row}_{field}", float(np.mean(trials.values(row, field)))


def _spread(name: str, values: Sequence[float]) -> Iterator[tuple[str, float]]:
    yield f"{name}_mean", float(np.mean(values))
    if len(values) > 1:
        yield f"{name}_std", float(np.std(values, ddof=1))


def _differences(trials: Trials) -> dict[str, Difference]:
    found = {}
    for name, (one, other) in _COMPARED.items():
        for kind, scaled in (("", False), ("_scaled", True))[: 1 if name.endswith("output_gain") else 2]:
            values = (trials.means(row, scaled=scaled) for row in (one, other))
            found[name + kind] = paired_difference(*values)
    return found


# words


def _setting(config: Any, trials: Trials) -> str:
    count, tasks = len(trials.seeds), len(config.language.tasks)
    each, joint, base = (f"{np.mean(trials.means(row)):.1f} %" for row in _SINGLE)
    return (
        f"{count} small GPT{'s' if count > 1 else ''}, trained to answer {len(config.language.known)} words about rows "
        f"of symbols; adapters of ranks {', '.join(map(str, config.ranks))} each give one of {tasks} words a new "
        f"meaning, and are merged without the base model. An adapter answers {each} of its own task, the base model "
        f"{base}, and one adapter that was trained on all tasks {joint}."
    )


def _verdicts(trials: Trials) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    found = _differences(trials)
    for other, words in (("linear", "averaging factors"), ("random_control", "LEGO of random adapters")):
        plain, scaled = (found[f"lora_lego_over_{other}{kind}"] for kind in ("", "_scaled"))
        state = "is above" if plain.mean > 0 else "is not above (not reproduced)"
        ends = f"{_points(plain)} as it is, {_points(scaled)} at the best factor"
        doubt = "; with so few seeds the first is not certain" if plain.low <= 0 < plain.mean else ""
        yield f"LEGO as in the paper {state} {words}: {ends}{doubt}."
    for kind in ("parameter", "output"):
        plain, scaled = found[f"lora_lego_{kind}_gain"], found.get(f"lora_lego_{kind}_gain_scaled")
        more = f", {_points(scaled)} at the best factor" if scaled else "; it is a factor of the whole update"
        yield f"Its {kind} reweighting {_effect(plain)}: {_points(plain)} as it is{more}."
    for label, scaled in (("As it is", False), ("At the best factor", True)):
        means = {
            name: float(np.mean(trials.means(name, scaled=scaled))) for name in METHOD_TITLES if name in trials.rows
        }
        best = max(means, key=lambda name: means[name])
        yield f"{label} the best method is ‘{METHOD_TITLES[best]}’ with {means[best]:.1f} %."


def _effect(found: Difference) -> str:
    """Say whether something helps; with several seeds, whether that is clear."""
    low, high = (found.mean, found.mean) if found.seeds == 1 else (found.low, found.high)
    return "helps" if low > 0 else "hurts" if high < 0 else "makes no clear difference"


def _points(found: Difference) -> str:
    ends = f" [{found.low:+.1f}, {found.high:+.1f}]" if found.seeds > 1 else ""
    return f"{found.mean:+.1f}{ends} points"


def _tasks(config: Any) -> str:
    lines = [
        f"the word for {config.language.known[number]}: now {task}, rank {rank}"
        for number, (task, rank) in enumerate(zip(config.language.tasks, config.ranks, strict=True))
    ]
    return "\n".join([*lines, f"untouched: {', '.join(config.language.untouched.values())}"])


# tables


def _methods(config: Any, trials: Trials) -> Table:
    rows = []
    for row in (row for row in TITLES if row in trials.rows):
        scaled = () if row in _SINGLE else (trials.means(row, scaled=True), trials.values(row, "factor"))
        cells = (_cell(scaled[0]), _cell(scaled[1])) if scaled else ("", "")
        kept = trials.values(row, "scaled_kept" if scaled else "kept")
        rows.append((TITLES[row], _cell(trials.means(row)), *cells, _cell(kept)))
    columns = ("method", "as it is [%]", "best factor [%]", "factor", "untouched words [%]")
    caption = (
        f"Accuracy, mean over {len(config.language.tasks)} tasks{_over(trials)}. {_FACTOR} The last column is "
        "accuracy on words that no adapter changes, at the best factor."
    )
    return Table("Merged adapters", columns, tuple(rows), caption)


def _attacks(config: Any, trials: Trials) -> Table:
    rows = tuple(
        (
            title,
            _cell(trials.changes[f"{name}_gauge_change"], 3),
            *(_cell(trials.means(name + kind, scaled=True)) for kind in ("", "_regauged", "_random")),
        )
        for name, title in METHOD_TITLES.items()
        if name in trials.rows
    )
    columns = ("method", "change", "accuracy [%]", "after the change of gauge [%]", "random adapters [%]")
    caption = (
        "Every adapter with its ranks in another order, and with signs and scales exp(N(0, s^2)), s = "
        f"{config.gauge}, moved between its factors: the same functions. The change is that of the merged update, "
        "relative to its norm. The last column merges random adapters of the same ranks and norms. Accuracies are at "
        "the best factor for the adapters as they are."
    )
    return Table("Change of gauge, and random adapters", columns, rows, caption)


def _sweep(config: Any, trials: Trials) -> Table:
    ranks = swept_ranks(config.ranks)
    rows = tuple(
        (METHOD_TITLES[name], label, *(_cell(trials.means(f"{name}_rank_{k}", scaled=scaled)) for k in ranks))
        for name in config.swept
        for label, scaled in (("as it is", False), ("best factor", True))
    )
    columns = ("method", "update", *(f"k = {k} [%]" for k in ranks))
    caption = f"Ranks k of the merged adapter: r / 2, r, 2 r and N; r = {np.mean(config.ranks):g} is the mean rank."
    return Table("Accuracy by rank", columns, rows, caption)


def _ablation(config: Any, trials: Trials) -> Table:
    rows = tuple(
        (
            "yes" if flag else "no",
            scale,
            *(_cell(trials.means(name, scaled=scaled)) for scaled in (False, True)),
        )
        for name, (flag, scale) in ({"lora_lego": (True, "sqrt_r_over_k")} | ABLATION).items()
    )
    columns = ("parameter reweighting", "output scale", "as it is [%]", "best factor [%]")
    caption = (
        f"LEGO at its natural rank k = {max(config.ranks)}, where the mean rank r is {np.mean(config.ranks):g} and the "
        f"sum of ranks N {sum(config.ranks)}. The output scale is a factor of the whole update, so at the best factor "
        "it matters only as far as the factors to choose from are coarse."
    )
    return Table("Reweightings of LEGO", columns, rows, caption)


def _interference(_: Any, trials: Trials) -> Table:
    rows = tuple(
        (
            METHOD_TITLES[name],
            what,
            _cell(trials.changes[f"{stem}_permuted_change"], 3),
            *(_cell(trials.means(row, scaled=True)) for row in (stem, f"{stem}_permuted")),
        )
        for name in PERMUTED
        if name in trials.rows
        for stem, what in ((f"{name}_self", "an adapter and itself"), (name, "all adapters"))
    )
    columns = ("method", "merged", "change", "before [%]", "after [%]")
    caption = (
        "Before and after ranks change places at random, in every adapter but the first of a pair, which changes no "
        "adapter's function. An adapter, that of the largest rank, merged with itself should be itself, up to a "
        "factor: its row shows the accuracy on its own task. Accuracies at the best factor."
    )
    return Table("Interference of ranks", columns, rows, caption)


def _over(trials: Trials) -> str:
    count = len(trials.seeds)
    return f", mean and standard deviation over {count} seeds" if count > 1 else ""


def _cell(values: Sequence[float], digits: int = 1) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
