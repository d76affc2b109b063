"""What a re-basin run tells: metrics, tables and figures over pairs of networks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax import tree
from permjax.lmc.barrier import Barrier, mean_barrier
from permjax.report import Curve, Figure, Outcome, Table, Text
from permjax.symmetry.spec import PermutationSpec


class Pair(NamedTuple):
    """What was measured on one pair: barriers by row, scalars by metric name, correlations by matching and group."""

    barriers: dict[str, Barrier]
    scalars: dict[str, float]
    correlations: dict[str, np.ndarray]


ROWS = {
    "naive": "no permutation",
    "random": "random permutation",
    "weights": "weight matching",
    "activations": "activation matching",
    "weights_repaired": "weight matching, REPAIR",
    "naive_calibrated": "no permutation, best temperature",
    "weights_calibrated": "weight matching, best temperature",
}


def report(config: Any, data: str, spec: PermutationSpec, pairs: Sequence[Pair], kept: dict[str, Any]) -> Outcome:
    """Return the outcome of all pairs; `kept` are the models to save."""
    rows = [name for name in ROWS if name in pairs[0].barriers]
    metrics: dict[str, Any] = dict(_metrics_of(pairs, rows))
    name = type(config.model).model_type
    networks = f"{2 * len(pairs)} {name} networks trained on {data} from seeds {config.seed}.."
    summary = (
        f"{networks}{config.seed + 2 * len(pairs) - 1}, aligned in {len(pairs)} "
        f"{'pair' if len(pairs) == 1 else 'pairs'} and averaged. {_verdict(metrics)}"
    )
    return Outcome(
        title=f"Re-basin: {name} on {data}",
        summary=summary,
        metrics=metrics,
        tables=(_table(pairs, rows), _group_table(spec, pairs)),
        figures=(*_curves(pairs, rows), _quality(spec, pairs)),
        texts=(Text("Permutation spec", spec.explain()),),
        models={stem: tree.flatten(params) for stem, params in kept.items()},
        headline=("barrier_mid_naive", "barrier_mid_weights", "accuracy_merged_naive", "accuracy_merged_weights"),
    )


def _verdict(metrics: dict[str, Any]) -> str:
    return (
        f"At the midpoint the loss barrier is {metrics['barrier_mid_naive']:.3f} nats without permutation and "
        f"{metrics['barrier_mid_weights']:.3f} after weight matching; the merged network classifies "
        f"{100 * metrics['accuracy_merged_weights']:.1f} % of the test set, its parents "
        f"{50 * (metrics['accuracy_a'] + metrics['accuracy_b']):.1f} %."
    )


def _metrics_of(pairs: Sequence[Pair], rows: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield every metric as its mean over the pairs, and its standard deviation where there are several."""
    columns: dict[str, list[float]] = {}
    for pair in pairs:
        values = {"accuracy_a": pair.barriers["naive"].accuracy[0], "accuracy_b": pair.barriers["naive"].accuracy[-1]}
        for row in rows:
            line = pair.barriers[row]
            values |= {f"accuracy_merged_{row}": line.accuracy[len(line.t) // 2]}
            values |= {f"barrier_mid_{row}": line.barrier_mid, f"barrier_max_{row}": line.barrier_max}
        for name, value in (values | pair.scalars).items():
            columns.setdefault(name, []).append(float(value))
    for name, column in columns.items():
        yield name, max(column) if name == "equivalence_error" else float(np.mean(column))
        if len(column) > 1:
            yield f"{name}_std", float(np.std(column, ddof=1))


def _table(pairs: Sequence[Pair], rows: Sequence[str]) -> Table:
    parents = _spread([50 * (p.barriers["naive"].accuracy[0] + p.barriers["naive"].accuracy[-1]) for p in pairs], 1)
    lines: list[tuple] = [("parents", "", "", parents)]
    for row in rows:
        found = [p.barriers[row] for p in pairs]
        middle = [100 * b.accuracy[len(b.t) // 2] for b in found]
        heights = ([b.barrier_mid for b in found], [b.barrier_max for b in found])
        lines.append((ROWS[row], *(_spread(h, 3) for h in heights), _spread(middle, 1)))
    columns = ("alignment", "barrier, middle [nats]", "barrier, max [nats]", "accuracy of the merge [%]")
    spread = "" if len(pairs) == 1 else f" Mean and standard deviation over {len(pairs)} pairs."
    caption = (
        "Loss barriers on the test set, and the accuracy of the average of both networks." + spread
        + " Rows at the best temperature fit it on one half of the test set and measure on the other."
    )  # fmt: skip
    return Table("Barriers", columns, tuple(lines), caption)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _group_table(spec: PermutationSpec, pairs: Sequence[Pair]) -> Table:
    names = ("naive", "weights", "activations")
    means = {name: np.mean([p.correlations[name] for p in pairs], axis=0) for name in names}
    rows = tuple(
        (g.name, g.size, len(spec.members(g.name)), *(f"{means[name][i]:.3f}" for name in names))
        for i, g in enumerate(spec.groups)
    )
    columns = ("group", "units", "members", "before", "weight matching", "activation matching")
    return Table("Matching quality", columns, rows, "Mean correlation of the activations of units laid side by side.")


def _curves(pairs: Sequence[Pair], rows: Sequence[str]) -> tuple[Figure, Figure]:
    shown = [row for row in ("naive", "random", "weights", "activations", "weights_repaired") if row in rows]

    def figure(name: str, title: str, ylabel: str, pick: Callable[[Barrier], np.ndarray]) -> Figure:
        curves = []
        for row in shown:
            values = np.stack([pick(p.barriers[row]) for p in pairs])
            low, high = (values.min(0), values.max(0)) if len(pairs) > 1 else (None, None)
            curves.append(Curve(ROWS[row], mean_barrier([p.barriers[row] for p in pairs]).t, values.mean(0), low, high))
        caption = "Along the straight line from the first network (0) to the aligned second one (1), on the test set."
        caption += " Bands span the pairs." if len(pairs) > 1 else ""
        return Figure(name, title, caption, "position on the line", ylabel, tuple(curves))

    return (
        figure("loss", "Loss between two networks", "test loss [nats]", lambda b: b.loss),
        figure("accuracy", "Accuracy between two networks", "test accuracy [%]", lambda b: 100 * b.accuracy),
    )


def _quality(spec: PermutationSpec, pairs: Sequence[Pair]) -> Figure:
    labels = [g.name for g in spec.groups]
    curves = tuple(
        Curve(ROWS[name], labels, np.mean([p.correlations[name] for p in pairs], axis=0))
        for name in ("naive", "weights", "activations")
    )
    caption = "Mean correlation of the activations of units laid side by side, by group."
    return Figure("matching", "Matching quality", caption, "group", "mean correlation", curves, "bars")
