"""The figures of a run on knowledge graphs: learning curves, relations by MRR, and relations as maps."""

from collections.abc import Iterator, Mapping

import numpy as np

from permjax.experiments.nfe_rows import Trials, title
from permjax.experiments.pleas_scores import Difference
from permjax.kge.graph import Graph
from permjax.kge.model_files import KgeModel
from permjax.report import Curve, Figure, Matrix

_MOST_RELATIONS, _MOST_MAPS, _MOST_BARS = 20, 5, 3
_LONGEST = 32  # characters of a label


def figures(
    trials: Trials,
    graphs: Mapping[str, Graph],
    differences: Mapping[tuple[str, str, str], Difference],
    first: KgeModel,
) -> Iterator[Figure | Matrix]:
    """All figures that the models have."""
    if differences:
        yield _differences(differences, graphs)
    for key, graph in graphs.items():
        yield from _learning(trials, key, graph)
    yield _relations(trials, next(iter(graphs.values())))
    yield from _maps(first)


def _learning(trials: Trials, key: str, graph: Graph) -> Iterator[Figure]:
    curves = []
    for name in trials.models:
        history = trials.found[key, name].result.history["valid_mrr"]
        epochs = np.flatnonzero(np.isfinite(history).any(axis=1))
        if len(epochs):
            curves.append(_curve(title(name), epochs + 1, history[epochs]))
    if curves:
        caption = "Filtered MRR, realistic ranks; bands reach from the lowest to the highest seed."
        what = f"Validation triples of {graph.name}"
        yield Figure(f"learning_{key}", what, caption, "epoch", "MRR", tuple(curves))


def _curve(label: str, x: np.ndarray, values: np.ndarray) -> Curve:
    """The mean over the seeds that are still trained."""
    if values.shape[1] == 1:
        return Curve(label, x, values[:, 0])
    return Curve(label, x, np.nanmean(values, axis=1), np.nanmin(values, axis=1), np.nanmax(values, axis=1))


def _relations(trials: Trials, graph: Graph) -> Figure | Matrix:
    """The MRR of frequent relations: as bars for a few models, as a table of colours for many."""
    asked = np.bincount(graph.test[:, 1], minlength=len(graph.relations))
    shown = [graph.relations[r] for r in np.argsort(-asked, kind="stable")[:_MOST_RELATIONS] if asked[r]]
    found = {title(name): trials.found[trials.graphs[0], name].relations(graph) for name in trials.models}
    what, caption = f"MRR by relation, {graph.name}", f"The {len(shown)} most frequent relations of the test triples."
    if len(found) > _MOST_BARS:
        values = np.array([[one[relation] for one in found.values()] for relation in shown])
        return Matrix("relations", what, caption, "model", "relation", "MRR", shown, [*found], values)
    curves = (Curve(name, shown, [one[relation] for relation in shown]) for name, one in found.items())
    return Figure("relations", what, caption, "relation", "MRR", tuple(curves), "bars")


def _differences(differences: Mapping[tuple[str, str, str], Difference], graphs: Mapping[str, Graph]) -> Figure:
    curves = []
    for pair in dict.fromkeys((name, other) for _, name, other in differences):
        found = [differences[key, *pair] for key in graphs]
        mean, low, high = ([one[i] for one in found] for i in range(3))
        ends = (low, high) if found[0].seeds > 1 else (None, None)
        label = " minus ".join(map(title, pair))
        curves.append(Curve(label, [graph.name for graph in graphs.values()], mean, *ends))
    caption = "Mean over paired seeds, with the 95 % interval of Student's t where there are several."
    xlabel, ylabel = "graph", "difference in MRR"
    return Figure("differences", "Differences between models", caption, xlabel, ylabel, tuple(curves), "bars")


def _maps(model: KgeModel) -> Iterator[Figure]:
    """Yield the maps y = s x + m of relations in the coordinate in which they move entities most differently."""
    family, graph = model.family, model.graph
    points, elements = family.entity(model.params["entity"]), family.relation(model.params["relation"])
    if "mean" not in points or not {"scale", "shift"} <= {*elements}:
        return
    frequent = np.argsort(-np.bincount(graph.train[:, 1], minlength=len(graph.relations)), kind="stable")[:_MOST_MAPS]
    means = np.asarray(points["mean"])
    scale, shift = (np.asarray(elements[part])[frequent] for part in ("scale", "shift"))
    centres = scale * means.mean(0) + shift
    coordinate = int(np.argmax(scale.var(axis=0) * means.var(axis=0) + centres.var(axis=0)))
    ends = np.array([means[:, coordinate].min(), means[:, coordinate].max()])
    curves = [
        Curve(_shortened(graph.relations[r]), ends, scale[i, coordinate] * ends + shift[i, coordinate])
        for i, r in enumerate(frequent)
    ]
    caption = (
        f"Coordinate {coordinate} of {family.dimension}, in which the most frequent relations differ most, over the "
        "means of all entities: a relation moves x to s x + m. A falling line turns a law around."
    )
    xlabel, ylabel = "mean of the head", "mean of the tail that is predicted"
    lines = (*curves, Curve("(no move)", ends, ends))
    yield Figure("maps", f"Relations as maps, {graph.name}", caption, xlabel, ylabel, lines)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
