"""What a run of character language models tells: metrics, tables and figures of every layout."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.lmc.barrier import Barrier, mean_barrier
from permjax.report import Curve, Figure, Outcome, Table, Text
from permjax.symmetry.spec import PermutationSpec


class Pair(NamedTuple):
    """What was measured on one pair: barriers by row, scalars by metric name."""

    barriers: dict[str, Barrier]
    scalars: dict[str, float]


ROWS = {
    "none": "no alignment",
    "weight_matching": "weight matching",
    "activation_matching": "activation matching",
    "none_folded": "no alignment, norms folded",
    "weight_matching_folded": "weight matching, norms folded",
    "residual": "orthogonal residual, norms folded",
}
LAYOUTS = {
    "gpt2": "learned positions (GPT-2 layout)",
    "llama": "rotary positions, grouped queries (Llama layout)",
}
_CAPTION = (
    "Loss barriers on the end of the text. Permutations act within heads, on heads, on the MLPs and on the residual "
    "stream; the orthogonal alignment turns the stream instead, which needs norms without gains. Models with folded "
    "norms are the same functions, but the straight line between two of them passes through other models than that "
    "between the models as trained, so each form has its own row without alignment."
)


def report(
    config: Any, text: str, specs: Mapping[str, PermutationSpec], found: Mapping[str, Sequence[Pair]]
) -> Outcome:
    """Return the outcome of all layouts."""
    metrics = {f"{layout}_{k}": v for layout, pairs in found.items() for k, v in _metrics_of(pairs)}
    count = 2 * config.pairs
    seeds = f"{config.seed}..{config.seed + count - 1}"
    summary = f"{count} models of each layout, trained on {text} from seeds {seeds} and aligned in pairs. "
    return Outcome(
        title=f"Linear mode connectivity of character models on {text}",
        summary=summary + " ".join(_verdict(layout, metrics) for layout in found),
        metrics=metrics,
        tables=tuple(_table(layout, pairs) for layout, pairs in found.items()),
        figures=tuple(_figure(layout, pairs) for layout, pairs in found.items()),
        texts=tuple(Text(f"Permutation spec, {layout}", spec.explain()) for layout, spec in specs.items()),
        headline=tuple(f"{layout}_{row}_barrier_mid" for layout in found for row in ("none", "residual")),
    )


def _verdict(layout: str, metrics: Mapping[str, float]) -> str:
    none, weights, residual = (
        metrics[f"{layout}_{row}_barrier_mid"] for row in ("none", "weight_matching", "residual")
    )
    return (
        f"With {LAYOUTS[layout]} the barrier in the middle is {none:.3f} nats without alignment, {weights:.3f} after "
        f"weight matching and {residual:.3f} after the orthogonal residual alignment; the models themselves have a "
        f"loss of {(metrics[f'{layout}_loss_a'] + metrics[f'{layout}_loss_b']) / 2:.3f}."
    )


def _metrics_of(pairs: Sequence[Pair]) -> Iterator[tuple[str, float]]:
    """Yield every metric as its mean over the pairs, and its standard deviation where there are several."""
    columns: dict[str, list[float]] = {}
    for pair in pairs:
        ends = pair.barriers["none"]
        values = {"loss_a": ends.loss[0], "loss_b": ends.loss[-1]}
        values |= {"accuracy_a": ends.accuracy[0], "accuracy_b": ends.accuracy[-1]}
        for row, line in pair.barriers.items():
            values |= {f"{row}_barrier_mid": line.barrier_mid, f"{row}_barrier_max": line.barrier_max}
            values |= {f"{row}_accuracy_merged": line.accuracy[len(line.t) // 2]}
        for name, value in (values | pair.scalars).items():
            columns.setdefault(name, []).append(float(value))
    for name, column in columns.items():
        yield name, max(column) if name.endswith("equivalence_error") else float(np.mean(column))
        if len(column) > 1:
            yield f"{name}_std", float(np.std(column, ddof=1))


def _table(layout: str, pairs: Sequence[Pair]) -> Table:
    lines = []
    for row in ROWS:
        found = [pair.barriers[row] for pair in pairs]
        reduction = [pair.scalars.get(f"{row}_l2_reduction_percent", 0.0) for pair in pairs]
        columns = [[line.barrier_mid for line in found], [line.barrier_max for line in found]]
        columns += [[100 * line.accuracy[len(line.t) // 2] for line in found], reduction]
        lines.append((ROWS[row], *(_spread(c, n) for c, n in zip(columns, (3, 3, 1, 1), strict=True))))
    head = ("alignment", "barrier, middle [nats]", "barrier, max [nats]", "accuracy, middle [%]", "L2 reduction [%]")
    spread = f" Mean and standard deviation over {len(pairs)} pairs." if len(pairs) > 1 else ""
    return Table(f"Barriers, {LAYOUTS[layout]}", head, tuple(lines), _CAPTION + spread)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _figure(layout: str, pairs: Sequence[Pair]) -> Figure:
    curves = []
    for row, label in ROWS.items():
        lines = [pair.barriers[row] for pair in pairs]
        losses = np.stack([line.loss for line in lines])
        low, high = (losses.min(0), losses.max(0)) if len(pairs) > 1 else (None, None)
        curves.append(Curve(label, mean_barrier(lines).t, losses.mean(0), low, high))
    caption = "Along the straight line from the first model (0) to the second one (1), on the end of the text."
    caption += " Bands span the pairs." if len(pairs) > 1 else ""
    title = f"Loss between two models, {layout}"
    return Figure(f"loss_{layout}", title, caption, "position on the line", "test loss [nats]", tuple(curves))
