"""How well the units of aligned models fit each other: what decides which of them are merged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from permjax.match.activations import observer, stream
from permjax.match.ascent import kernels_of
from permjax.match.models import are_local, check_models, counted_names, entries
from permjax.match.moments import Moments, Tap, kernel
from permjax.match.nested import Named, Nest, settle, total
from permjax.match.problem import DEVICE, HOST, pose, start
from permjax.merge.partial import widenable
from permjax.permutation import identity
from permjax.symmetry.spec import PermutationSpec

Kernels = dict[str, Float[np.ndarray, "others n n"]]
METRICS = ("correlation", "distance", "weights")


def unit_scores(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    metric: str = "correlation",
    apply: Callable | None = None,
    data: Iterable | None = None,
) -> Kernels:
    """Return, per group, the score of every unit of the anchor with every unit of the other aligned models.

    Scores add up over all places where a group stands, in the frame of the models as they are given, so that matched
    pairs lie on the diagonal. A head's score with another head is that of their inner units as they lie.

    Args:
        spec: the symmetry.
        models: two or more aligned pytrees; the first is the anchor.
        metric: `"correlation"` of activations, `"distance"` (minus their mean squared distance
            `E a^2 + E b^2 - 2 E a b`), or `"weights"` (inner product of all weights of the two units, without data).
            Activations are taken before any bias is added.
        apply: `apply(params, *inputs) -> outputs`, for activations.
        data: batches, read once; a tuple holds several inputs.

    Returns:
        Group -> `[models - 1, d, d]` in float64 for the groups that are per no other; zeros where nothing is known.

    Raises:
        ValueError: fewer than two models, models that do not fit the spec or are not finite, an unknown metric, or
            activations asked for without `apply` or data.

    Example:
        >>> kernels = unit_scores(spec, aligned, apply=apply, data=batches)
        >>> plan = partial_plan(spec, ratios={"w1:1": 0.25}, scores=matched_scores(kernels))

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS", CVPR 2025, section 3.1, where the metric is the distance.
    """
    models = tuple(models)
    check_models(spec, models)
    if metric not in METRICS:
        raise ValueError(f"there is no metric '{metric}'; choose from {list(METRICS)}.")
    if metric == "weights":
        found = _of_weights(spec, models)
    elif apply is None or data is None:
        raise ValueError(f"the metric '{metric}' needs `apply` and `data`; without data use 'weights'.")
    else:
        measure = _distances if metric == "distance" else partial(kernel, statistic=metric)
        found = _of_activations(spec, models, measure, apply, data)
    return {group: np.stack([_scores(spec, group, other[group]) for other in found]) for group in widenable(spec)}


def matched_scores(kernels: Mapping[str, Float[np.ndarray, "others n n"]]) -> dict[str, Float[np.ndarray, " n"]]:
    """Return the scores of matched units, `[d]` per group: the diagonals, averaged over the models."""
    return {group: values.diagonal(axis1=-2, axis2=-1).mean(0) for group, values in kernels.items()}


def _of_activations(
    spec: PermutationSpec, models: tuple, measure: Callable, apply: Callable, data: Iterable
) -> list[dict[str, list[Named]]]:
    """Return the kernels that decide on each group, for every model but the anchor."""
    return [
        {g: [measure(spec, tap, m) for tap, m in moments.items() if g in tap.free] for g in widenable(spec)}
        for moments in stream(observer(spec, apply), models, data)
    ]


def _distances(spec: PermutationSpec, tap: Tap, moments: Moments) -> Named:
    """Return minus the mean squared distance of all pairs of units."""
    apart = moments.mean_a[..., :, None] - moments.mean_b[..., None, :]
    spread = moments.square_a[..., :, None] + moments.square_b[..., None, :] - 2 * moments.cross
    return kernel(spec, tap, moments._replace(cross=-spread - moments.count * apart**2), "covariance")


def _of_weights(spec: PermutationSpec, models: tuple) -> list[dict[str, list[Named]]]:
    local = are_local(models)
    found = [entries(model, f"model {index}", local) for index, model in enumerate(models)]
    problem = pose(spec, counted_names(spec, found[0]), found[0], HOST if local else DEVICE, "auto")
    terms = {g: problem.structure.terms.get(g, ()) for g in widenable(spec)}
    states = [start(problem, other) for other in found[1:]]
    return [{g: kernels_of(problem, state, g, terms[g]) if terms[g] else [] for g in terms} for state in states]


def _scores(spec: PermutationSpec, group: str, kernels: Sequence[Named]) -> Float[np.ndarray, "n n"]:
    """Add up kernels, in which the groups below this one are settled as they lie."""
    nest = Nest({g.name: g.per for g in spec.groups}, lambda *_: None)
    below = {
        name: Named(tuple((h, 0) for h in (*nest.per[name], name)), rows)
        for name, rows in identity(spec).items()
        if name != group
    }
    size = spec.group(group).size
    pairs = [total(settle(nest, found, below), ((group, 0), (group, 1))) for found in kernels]
    return sum((np.asarray(pair, np.float64) for pair in pairs), np.zeros((size, size)))
