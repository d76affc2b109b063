"""Partial plans: per group the best pairs of aligned units are merged, and all other units of every model are kept.

With k of d units merged, M models make `k + M (d - k)` wide units: the shared ones in the anchor's order, then what is
left of model 0 in its order, then of model 1, and so on. The kept-separate ratio is `r = 1 - k / d`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

from permjax.match.assignment import Solver, solve
from permjax.plan import Plan
from permjax.symmetry.blocks import leaf_blocks, move
from permjax.symmetry.spec import Group, Leaf, Of, PermutationSpec
from permjax.tree import nearest

Ratios: TypeAlias = Mapping[str, float | int]
"""Group -> share of its units that every model keeps for itself."""
Scores: TypeAlias = Mapping[str, Any]
"""Group -> how well its units fit each other; higher is better."""

_RTOL = 1e-6  # smallest relative gain for which units leave the partner that the matching gave them


def widenable(spec: PermutationSpec) -> tuple[str, ...]:
    """Return the groups that a plan may widen: those that are per no other group."""
    return tuple(g.name for g in spec.groups if not g.per)


def merged_units(spec: PermutationSpec, ratios: Ratios) -> dict[str, int]:
    """Return how many units of every group are merged: `k = round((1 - r) d)`, d for groups that are not named.

    Raises:
        ValueError: names a group that the spec lacks, that is per others, or whose ratio is outside [0, 1].
    """
    for name, ratio in ratios.items():
        size = _known(spec, name).size
        if not 0 <= ratio <= 1:
            raise ValueError(f"group '{name}': the kept-separate ratio is {ratio}, but must lie in [0, 1].")
        _check_whole(spec, name, round((1 - ratio) * size))
    return {g.name: round((1 - ratios.get(g.name, 0)) * g.size) for g in spec.groups}


def partial_plan(
    spec: PermutationSpec,
    merged: Mapping[str, int] | None = None,
    *,
    ratios: Ratios | None = None,
    scores: Scores | None = None,
    models: int = 2,
) -> Plan:
    """Return the plan that merges the best matched units of aligned models and keeps the others apart.

    Args:
        spec: the symmetry.
        merged: group -> number k of units that are merged; all of them in groups that are not named.
        ratios: the same as kept-separate ratios `1 - k / d`, 0 where not named; instead of `merged`.
        scores: group -> `[d]`, by which the k best are chosen; ties and groups without scores go by index.
        models: number M of aligned models.

    Returns:
        A plan over the aligned models, of widths `k + M (d - k)`.

    Raises:
        ValueError: not exactly one of `merged` and `ratios`, fewer than two models, a group that the spec lacks or that
            is per others, a number or ratio out of range, or scores of the wrong shape or not finite.

    Example:
        >>> plan = partial_plan(spec, ratios={"w1:1": 0.25}, scores=matched_scores(unit_scores(spec, models, ...)))

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS", CVPR 2025, section 3.1.
    """
    counts = _counts(spec, merged, ratios)
    if models < 2:
        raise ValueError(f"a partial plan is over two models or more, not {models}.")
    chosen = {}
    for group in widenable(spec):
        score = _checked((scores or {}).get(group), group, (spec.group(group).size,))
        chosen[group] = (_best(score, counts[group]),) * models
    return _plan(spec, chosen, models)


def constrained_plan(
    spec: PermutationSpec,
    merged: Mapping[str, int] | None = None,
    *,
    ratios: Ratios | None = None,
    kernels: Scores,
    solver: Solver = "auto",
) -> Plan:
    """Return the plan that merges, per group, the k pairs of two models with the largest total score.

    Unlike `partial_plan` it may give units new partners: the pairs are chosen together. Units keep the partner of the
    same index where that is as good. The units inside a head keep the order in which they lie.

    Args:
        spec: the symmetry.
        merged: group -> number k of pairs that are merged; all units in groups that are not named.
        ratios: the same as kept-separate ratios; instead of `merged`.
        kernels: group -> `[d, d]`, the score of every unit of model 0 with every unit of model 1.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.

    Raises:
        ValueError: as `partial_plan`.
    """
    counts = _counts(spec, merged, ratios)
    chosen = {}
    for group in widenable(spec):
        size = spec.group(group).size
        kernel = _checked(kernels.get(group), group, (size, size))
        chosen[group] = _pairs(kernel, counts[group], solver)
    return _plan(spec, chosen, 2)


def constrained_assignment(
    scores: Float[Array | np.ndarray, "n n"], k: int, solver: Solver = "auto"
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Return the k pairs (rows, columns) with the largest total score, no row or column twice, by rows.

    One square assignment of size `2 n - k`: the `n - k` rows and columns that go without partner meet dummies.

    Raises:
        ValueError: k is not in 0..n, or the scores are not square or not finite.
    """
    n = scores.shape[0]
    if not 0 <= k <= n:
        raise ValueError(f"{k} pairs cannot be chosen among {n} units.")
    values = np.asarray(scores, np.float64)
    padded = np.zeros((2 * n - k, 2 * n - k))
    padded[:n, :n] = values / max(np.abs(values).max(initial=0), np.finfo(float).tiny)
    padded[n:, n:] = -2 * n - 1
    columns = np.asarray(solve(padded, solver))[:n]
    rows = np.flatnonzero(columns < n)
    return rows, columns[rows].astype(rows.dtype)


def composed(spec: PermutationSpec, first: Plan, second: Plan) -> Plan:
    """Return the plan over the original models: to the aligned ones by `first`, from there by `second`.

    Args:
        spec: the symmetry.
        first: what a matching found, one to one for every model.
        second: any plan over the aligned models.

    Raises:
        ValueError: the plans map different numbers of models, or `first` is not one to one.
    """
    if first.models != second.models:
        raise ValueError(f"the first plan maps {first.models} models, the second {second.models}; give plans that fit.")
    for model in range(first.models):
        if not first.is_bijective(model):
            raise ValueError(f"the first plan is not one to one for model {model}, so it aligns nothing.")
    rows = [{name: labels[model] for name, labels in first.labels.items()} for model in range(first.models)]
    labels = {g.name: tuple(map(_moved(spec, g), rows, second.labels[g.name])) for g in spec.groups}
    return Plan(labels, second.widths, second.per)


def _moved(spec: PermutationSpec, group: Group):
    """Return the function that permutes an array `[*per, n]` by the rows of all groups."""
    axes = tuple(Of(name) for name in (*group.per, group.name))
    (block,) = leaf_blocks(spec, Leaf(f"labels of {group.name}", spec.shape(group.name), axes))
    return lambda rows, values: move(block, rows, values)


def _plan(spec: PermutationSpec, chosen: Mapping[str, Sequence[np.ndarray]], models: int) -> Plan:
    labels, widths = {}, {}
    for group in spec.groups:
        if group.name in chosen:
            labels[group.name] = tuple(_labels(group.size, m, units) for m, units in enumerate(chosen[group.name]))
            merged = len(chosen[group.name][0])
            widths[group.name] = merged + models * (group.size - merged)
        else:
            still = np.broadcast_to(np.arange(group.size, dtype=np.int32), spec.shape(group.name))
            labels[group.name], widths[group.name] = (still,) * models, group.size
    return Plan(labels, widths, {g.name: g.per for g in spec.groups})


def _labels(size: int, model: int, shared: np.ndarray) -> np.ndarray:
    """Return the wide units of one model, given which of its units stand for shared unit 0, 1, ..."""
    merged = len(shared)
    labels = np.full(size, -1, np.int32)
    labels[shared] = np.arange(merged, dtype=np.int32)
    start = merged + model * (size - merged)
    labels[labels < 0] = np.arange(start, start + size - merged, dtype=np.int32)
    return labels


def _best(score: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-score, kind="stable")[:k])


def _pairs(kernel: np.ndarray, k: int, solver: Solver) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k pairs, of one index each where re-pairing gains nothing."""
    matched = _best(kernel.diagonal(), k)
    rows, columns = constrained_assignment(kernel, k, solver)
    before, after = kernel[matched, matched], kernel[rows, columns]
    gains = after.sum() - before.sum() > _RTOL * (np.abs(before).sum() + np.abs(after).sum())
    return (rows, columns) if gains else (matched, matched)


def _counts(spec: PermutationSpec, merged: Mapping[str, int] | None, ratios: Ratios | None) -> dict[str, int]:
    if (merged is None) == (ratios is None):
        raise ValueError("give either the number of units to merge, `merged`, or the `ratios` to keep separate.")
    if merged is None:
        return merged_units(spec, ratios or {})
    for name, count in merged.items():
        size = _known(spec, name).size
        if not 0 <= count <= size:
            raise ValueError(f"group '{name}' has {size} units, of which {count} cannot be merged.")
        _check_whole(spec, name, count)
    return {g.name: merged.get(g.name, g.size) for g in spec.groups}


def _known(spec: PermutationSpec, name: str) -> Group:
    if name not in spec:
        hint = nearest(name, [g.name for g in spec.groups])
        raise ValueError(f"the spec has no group '{name}'{hint}; name one of its groups.")
    return spec.group(name)


def _check_whole(spec: PermutationSpec, name: str, count: int) -> None:
    group = spec.group(name)
    if group.per and count != group.size:
        raise ValueError(
            f"group '{name}' is per {', '.join(map(repr, group.per))} and cannot be widened by itself; "
            "give the ratio to the outer group, whose units are kept whole."
        )


def _checked(scores: Any, group: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the scores of a group in float64, zeros if there are none."""
    values = np.zeros(shape) if scores is None else np.asarray(scores, np.float64)
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError(
            f"the scores of group '{group}' must be finite numbers of shape {shape}, not an array of shape "
            f"{values.shape} with {int((~np.isfinite(values)).sum())} that are not."
        )
    return values
