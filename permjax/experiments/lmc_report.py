"""What an experiment on linear mode connectivity tells: metrics, a table, and figures."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax import tree
from permjax.figures import Contour, Drawing, Mark, Matrix
from permjax.lmc.barrier import Barrier, mean_barrier
from permjax.lmc.landscape import Plane
from permjax.report import Curve, Figure, Outcome, Table, Text
from permjax.symmetry.spec import PermutationSpec

TITLES = {
    "none": "no permutation",
    "weight_matching": "weight matching",
    "activation_matching": "activation matching",
    "ste_permutation": "STE, matrices",
    "ste_weights": "STE, weights",
    "frank_wolfe": "Frank-Wolfe",
    "universe": "universe",
}
NETWORKS = "abc"
_CURVES = 6  # more cannot be told apart


class Alignment(NamedTuple):
    """What one method makes of three networks.

    Attributes:
        barriers: barriers of all pairs, of which those with 0 have the anchor.
        r: the R metric for every gamma, mean over the two networks that were aligned.
        l2_reduction: percent, mean over the two.
        mean3: loss and accuracy of the mean of all three.
        cycle_error: share of units that the orders of the pairs do not bring back around the triangle.
        seconds: time of the alignment, compilation included.
        converged: whether the method ended because it could not improve.
        plane: metrics on the plane through the three.
    """

    barriers: dict[tuple[int, int], Barrier]
    r: np.ndarray
    l2_reduction: float
    mean3: dict[str, float]
    cycle_error: float
    seconds: float
    converged: bool
    plane: Plane | None


class Triple(NamedTuple):
    """What was measured on three networks.

    Attributes:
        alignments: by method.
        pairwise: barriers of pairs that weight matching aligned one by one.
        cycle_error: share of units that such pairs do not bring back around the triangle.
        spectra: singular values of each network, by leaf.
        kept: models to save.
    """

    alignments: dict[str, Alignment]
    pairwise: dict[tuple[int, int], Barrier]
    cycle_error: float
    spectra: list[dict[str, np.ndarray]]
    kept: dict[str, Any]


def report(config: Any, data: str, spec: PermutationSpec, triples: Sequence[Triple]) -> Outcome:
    """Return the outcome of all triples."""
    methods = list(triples[0].alignments)
    metrics = dict(_metrics(config, triples, methods))
    kind = type(config.model).model_type
    headline = [f"{m}_barrier_mid_{pair}" for m in ("weight_matching", "ste_permutation") for pair in PAIRS]
    return Outcome(
        title=f"Linear mode connectivity of three networks: {kind} on {data}",
        summary=_summary(data, kind, triples, metrics),
        metrics=metrics,
        tables=_tables(config, triples, methods),
        figures=tuple(_figures(config, triples, methods)),
        texts=(Text("Permutation spec", spec.explain()),),
        models={stem: tree.flatten(params) for stem, params in triples[0].kept.items()},
        headline=tuple(key for key in headline if key in metrics),
    )


PAIRS: dict[str, Callable[[Alignment], float]] = {
    "anchor": lambda found: float(np.mean([found.barriers[0, i].barrier_mid for i in (1, 2)])),
    "nonanchor": lambda found: found.barriers[1, 2].barrier_mid,
}
"""Midpoint barriers with the anchor, and between the two networks that were aligned to it."""


def _scalars(config: Any, found: Alignment) -> dict[str, float]:
    gammas = list(config.gammas)
    return {
        **{f"barrier_mid_{pair}": pick(found) for pair, pick in PAIRS.items()},
        "barrier_max_anchor": float(np.mean([found.barriers[0, i].barrier_max for i in (1, 2)])),
        "barrier_mid_worst": _worst(found.barriers),
        "r_gamma0": found.r[gammas.index(0.0)],
        "r_gamma03": found.r[gammas.index(0.3)],
        "l2_reduction_percent": found.l2_reduction,
        "accuracy_mean3": found.mean3["accuracy"],
        "loss_mean3": found.mean3["loss"],
        "cycle_error": found.cycle_error,
        "seconds": found.seconds,
    }


def _worst(barriers: dict[tuple[int, int], Barrier]) -> float:
    return max(line.barrier_mid for line in barriers.values())


def _metrics(config: Any, triples: Sequence[Triple], methods: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield every metric as its mean over triples, with its standard deviation where there are several."""
    yield from _spread("accuracy_networks", [_parents(t) for t in triples])
    for method in methods:
        rows = [_scalars(config, t.alignments[method]) for t in triples]
        for name in rows[0]:
            yield from _spread(f"{method}_{name}", [row[name] for row in rows])
        yield f"{method}_converged", all(t.alignments[method].converged for t in triples)
    yield from _spread("pairwise_barrier_mid_worst", [_worst(t.pairwise) for t in triples])
    yield from _spread("pairwise_cycle_error", [t.cycle_error for t in triples])


def _spread(name: str, values: Sequence[float]) -> Iterator[tuple[str, float]]:
    yield name, float(np.mean(values))
    if len(values) > 1:
        yield f"{name}_std", float(np.std(values, ddof=1))


def _parents(triple: Triple) -> float:
    lines = next(iter(triple.alignments.values())).barriers
    return float(np.mean([lines[0, 1].accuracy[0], lines[0, 1].accuracy[-1], lines[1, 2].accuracy[-1]]))


def _summary(data: str, kind: str, triples: Sequence[Triple], metrics: dict[str, Any]) -> str:
    count = len(triples)
    text = (
        f"{3 * count} {kind} networks trained on {data}, in {count} {'triple' if count == 1 else 'triples'}; the "
        "second and third network of each are aligned to the first, the anchor. "
    )
    for method in (m for m in ("weight_matching", "ste_permutation") if f"{m}_r_gamma0" in metrics):
        anchor, other = (metrics[f"{method}_barrier_mid_{pair}"] for pair in PAIRS)
        text += (
            f"After {TITLES[method]} the midpoint barrier is {anchor:.3f} nats to the anchor and {other:.3f} between "
            f"the two others, and singular vectors agree by R = {metrics[f'{method}_r_gamma0']:.3f}. "
        )
    late = [TITLES[m] for m in triples[0].alignments if not metrics[f"{m}_converged"]]
    return text + (f"Stopped before they converged: {', '.join(late)}." if late else "")


_BARRIERS = {
    "to the anchor [nats]": ("barrier_mid_anchor", 3, 1),
    "between the others [nats]": ("barrier_mid_nonanchor", 3, 1),
    "largest, to the anchor": ("barrier_max_anchor", 3, 1),
    "accuracy of the mean [%]": ("accuracy_mean3", 1, 100),
}
_MECHANISM = {
    "R, γ 0": ("r_gamma0", 3, 1),
    "R, γ 0.3": ("r_gamma03", 3, 1),
    "L2 reduction [%]": ("l2_reduction_percent", 1, 1),
    "seconds": ("seconds", 1, 1),
}


def _tables(config: Any, triples: Sequence[Triple], methods: Sequence[str]) -> tuple[Table, Table]:
    spread = f" Mean and standard deviation over {len(triples)} triples." if len(triples) > 1 else ""
    alone = _cell([100 * _parents(t) for t in triples], 1)
    barriers = (
        f"Midpoint barriers on the test set, and the mean of all three networks; alone they reach {alone} %.{spread}"
    )
    rest = (
        "R is the agreement of singular vectors with the anchor's, over those with singular values of at least γ times "
        "the largest; the reduction is that of the distance to the anchor."
    )
    columns, rows = _BARRIERS | _MECHANISM, {}
    for method in methods:
        found = [_scalars(config, t.alignments[method]) for t in triples]
        cells = {head: _cell([unit * f[key] for f in found], digits) for head, (key, digits, unit) in columns.items()}
        done = "yes" if all(t.alignments[method].converged for t in triples) else "no"
        rows[TITLES[method]] = cells | {"converged": done}
    return (
        _cut("Barriers", rows, tuple(_BARRIERS), barriers),
        _cut("What the methods do", rows, (*_MECHANISM, "converged"), rest),
    )


def _cut(title: str, rows: dict[str, dict[str, str]], heads: tuple[str, ...], caption: str) -> Table:
    """Return a table of some of the columns."""
    lines = tuple((name, *(cells[head] for head in heads)) for name, cells in rows.items())
    return Table(title, ("alignment", *heads), lines, caption)


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


# -- figures -------------------------------------------------------------------------------------------------------


def _figures(config: Any, triples: Sequence[Triple], methods: Sequence[str]) -> Iterator[Drawing]:
    yield _pairs(triples, methods)
    shown = [m for m in methods if m != "frank_wolfe"][:_CURVES]
    yield _loss("loss_anchor", "Loss on the way to the anchor", triples, shown, ((0, 1), (0, 2)))
    yield _loss("loss_nonanchor", "Loss between the two aligned networks", triples, shown, ((1, 2),))
    yield _agreement(config, triples, shown)
    yield _spectra(triples[0])
    for method in methods:
        if (found := triples[0].alignments[method].plane) is not None:
            yield _contour(method, found)


def _pairs(triples: Sequence[Triple], methods: Sequence[str]) -> Matrix:
    pairs = list(triples[0].pairwise)
    rows = {TITLES[m]: [[t.alignments[m].barriers[p].barrier_mid for p in pairs] for t in triples] for m in methods}
    rows["pair by pair"] = [[t.pairwise[p].barrier_mid for p in pairs] for t in triples]
    names = [f"{NETWORKS[i]}–{NETWORKS[j]}" for i, j in pairs]
    caption = (
        "Midpoint barrier of every pair; a is the anchor. The last row aligns every pair by itself, by weight matching."
    )
    values = np.array([np.mean(values, axis=0) for values in rows.values()])
    return Matrix(
        "pairs", "Barriers of all pairs", caption, "pair", "alignment", "barrier [nats]", [*rows], names, values
    )


def _loss(
    name: str, title: str, triples: Sequence[Triple], methods: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Figure:
    curves = []
    for method in methods:
        lines = [t.alignments[method].barriers[pair] for t in triples for pair in pairs]
        values = np.stack([line.loss for line in lines])
        low, high = (values.min(0), values.max(0)) if len(lines) > 1 else (None, None)
        curves.append(Curve(TITLES[method], mean_barrier(lines).t, values.mean(0), low, high))
    caption = "Along the straight line, on the test set. Bands span the lines of all triples."
    return Figure(name, title, caption, "position on the line", "test loss [nats]", tuple(curves))


def _agreement(config: Any, triples: Sequence[Triple], methods: Sequence[str]) -> Figure:
    curves = []
    for method in methods:
        values = np.stack([t.alignments[method].r for t in triples])
        low, high = (values.min(0), values.max(0)) if len(triples) > 1 else (None, None)
        curves.append(Curve(TITLES[method], config.gammas, values.mean(0), low, high))
    caption = "1 if all singular vectors that count agree with the anchor's, 0 if they have nothing in common."
    return Figure("r_gamma", "Agreement of singular vectors", caption, "threshold γ", "R", tuple(curves))


def _spectra(triple: Triple) -> Figure:
    names = [name for name, values in triple.spectra[0].items() if len(values) > 1]
    chosen = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
    curves = [
        Curve(f"{NETWORKS[m]}: {name}", np.linspace(0, 1, len(values := triple.spectra[m][name])), values)
        for name in chosen
        for m in (0, 1)
    ]
    caption = "No permutation changes them; those of networks from different seeds nearly coincide."
    return Figure("spectra", "Singular values", caption, "rank, as a share", "singular value", tuple(curves))


def _contour(method: str, found: Plane) -> Contour:
    marks = tuple(Mark(name, float(x), float(y)) for name, (x, y) in zip(NETWORKS, found.models, strict=True))
    caption = (
        f"Loss on the plane through the three networks of the first triple, {TITLES[method]}; distances of weights."
    )
    title = f"Loss around three networks: {TITLES[method]}"
    return Contour(
        f"plane_{method}",
        title,
        caption,
        "distance",
        "distance",
        "loss [nats]",
        found.x,
        found.y,
        found.loss,
        marks,
        "log",
    )
