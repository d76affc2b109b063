"""Zipping: units that fire alike are joined, across models and within them, until a width is reached."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from permjax.match.models import check_models
from permjax.match.moments import NOTHING, Moments, Tap, merge, observe
from permjax.plan import Plan
from permjax.symmetry.capture import capture
from permjax.symmetry.spec import PermutationSpec
from permjax.tree import check_finite

_CONSTANT = 1e-10  # variance, relative to the squared mean, below which a unit counts as constant


def zip_plan(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    apply: Callable,
    data: Iterable,
    widths: Mapping[str, int] | None = None,
    damping: float = 0.3,
    within: float | int = 0.125,
) -> Plan:
    """Cluster the units of all models greedily: the two clusters that correlate most become one, down to a width.

    The features of M models of d units are put side by side, and their Pearson correlation is that of the activations
    which carry the group: its mean over the places that write it. Joined clusters correlate with others as the less
    alike of the two does, times `damping` where that is positive. Units that never vary correlate with nothing.

    Groups that are per others, and groups without activations, are not zipped: equal units share a label. The models
    need to be aligned for these, and for groups that others are per (heads), whose inner units must correspond; a spec
    without groups per others needs no alignment.

    Args:
        spec: the symmetry.
        models: two or more pytrees.
        apply: `apply(params, *inputs) -> outputs`.
        data: batches, read once; a batch is an array or a tuple or list of inputs.
        widths: group -> number of clusters, at most M d; d where absent.
        damping: alpha of the paper, in [0, 1]; 1 does not hold back clusters that were joined before.
        within: beta of the paper, in [0, 1]: the share of a model's units that may be joined to other units of the same
            model. With 0 (or False) every cluster holds one unit of each model at most, which is greedy matching.

    Returns:
        A plan, many-to-one in general; clusters are numbered in the order of their first unit, models in turn.

    Raises:
        ValueError: fewer than two models, models that differ or are not finite, no data, activations that are not
            finite, numbers outside their range, or a width that the joins allowed by `within` cannot reach.

    Example:
        >>> plan = zip_plan(spec, [a, b], apply=apply, data=batches, widths={"h0": 40})
        >>> plan.labels["h0"][1]  # where the units of b go

    Source:
        Stoica et al., "ZipIt! Merging models from different tasks without training", ICLR 2024, sections 4.1 and 4.3.
        Here `within` counts every join of units of one model, also that of two clusters which both models share.
    """
    models = tuple(models)
    check_models(spec, models)
    for index, model in enumerate(models):
        check_finite(model, f"model {index}")
    sizes = {g.name: g.size for g in spec.groups}
    wanted = sizes | dict(widths or {})
    _check(spec, wanted, len(models), damping, within)
    correlations = _correlations(spec, models, apply, data)
    _check_rest(wanted, {name: size for name, size in sizes.items() if name not in correlations})
    labels = {name: (np.broadcast_to(np.arange(size), spec.shape(name)),) * len(models) for name, size in sizes.items()}
    for group, correlation in correlations.items():
        owner = np.repeat(np.arange(len(models)), sizes[group])
        clusters = _clusters(correlation, owner, wanted[group], damping, int(within * sizes[group]))
        if clusters is None:
            message = f"Group '{group}': no joins that within={within} allows are left before {wanted[group]} clusters "
            raise ValueError(message + "are reached; raise `within` or the width.")
        labels[group] = tuple(clusters.reshape(len(models), -1))
    return Plan(labels, wanted, {g.name: g.per for g in spec.groups})


def _check(spec: PermutationSpec, widths: Mapping[str, int], models: int, damping: float, within: float | int) -> None:
    for name, value in (("damping", damping), ("within", within)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {value}; give a number in [0, 1].")
    for group, width in widths.items():
        if group not in spec:
            known = ", ".join(g.name for g in spec.groups)
            raise ValueError(f"`widths` names the group '{group}', which the spec does not have; it has {known}.")
        size = spec.group(group).size
        least = max(size - int(within * size), 1)
        if not least <= width <= models * size:
            message = f"Group '{group}' has {size} units in each of {models} models; with within={within} they can be "
            raise ValueError(message + f"zipped to {least}..{models * size} clusters, not to {width}.")


def _check_rest(widths: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    for group, size in sizes.items():
        if widths[group] != size:
            message = f"Group '{group}' cannot be zipped to {widths[group]} clusters: it is per other groups or has no "
            raise ValueError(message + f"activations, so it keeps its {size} units; leave it out of `widths`.")


def _correlations(spec: PermutationSpec, models: tuple, apply: Callable, data: Iterable) -> dict[str, np.ndarray]:
    """Return the correlation of all units of all models, by group, for the groups that can be zipped."""
    total: dict[str, dict[str, Moments]] = {}
    for batch in data:
        seen = _look(apply, spec, models, tuple(batch) if isinstance(batch, tuple | list) else (batch,))
        before = total or {group: dict.fromkeys(taps, NOTHING) for group, taps in seen.items()}
        total = {g: {t: merge(before[g][t], moments) for t, moments in taps.items()} for g, taps in seen.items()}
    if not total:
        raise ValueError("data gave no batches; give a list or a loader with one batch or more.")
    return {group: _mean_correlation(group, list(taps.values())) for group, taps in total.items() if taps}


@partial(jax.jit, static_argnames=("apply", "spec"))
def _look(apply: Callable, spec: PermutationSpec, models: tuple, inputs: tuple) -> dict[str, dict[str, Moments]]:
    """Return the moments of the features of all models side by side, by group and by place that writes it."""
    found = [capture(apply, spec, model, *inputs).groups for model in models]

    def moments(group: str, tap: str) -> Moments:
        features = jnp.concatenate([groups[group][tap] for groups in found], axis=-1)
        return observe(spec, Tap(group, tap, (), (group,)), features, features)

    return {g.name: {tap: moments(g.name, tap) for tap in found[0][g.name]} for g in spec.groups if not g.per}


def _mean_correlation(group: str, taps: list[Moments]) -> Float[np.ndarray, "units units"]:
    found = np.mean([_correlation(moments) for moments in taps], axis=0)
    if not np.isfinite(found).all():
        raise ValueError(f"The activations of group '{group}' are not finite; look at the data and at the models.")
    return found


def _correlation(moments: Moments) -> Float[np.ndarray, "units units"]:
    constant = moments.square_a <= _CONSTANT * moments.count * moments.mean_a**2
    scale = np.sqrt(np.where(constant, np.inf, moments.square_a))
    return moments.cross / (scale[:, None] * scale[None, :])


def _clusters(
    correlation: Float[np.ndarray, "units units"],
    owner: Int[np.ndarray, " units"],
    width: int,
    damping: float,
    budget: int,
) -> Int[np.ndarray, " units"] | None:
    """Return the cluster of every unit, or None where the budget of joins within a model does not reach the width.

    What two clusters are worth only ever falls, so the best value that a row once had is a bound on what it has now.
    """
    worth = correlation.copy()
    np.fill_diagonal(worth, -np.inf)
    owns = owner[:, None] == np.arange(owner.max() + 1)[None, :]  # cluster and model
    left = np.full(owns.shape[1], budget)
    cluster, bound = np.arange(len(owner)), worth.max(axis=1)
    if budget == 0:
        worth[owner[:, None] == owner[None, :]] = -np.inf
    for _ in range(len(owner) - width):
        one, two = _best(worth, bound)
        if worth[one, two] == -np.inf:
            return None
        common = owns[one] & owns[two]
        left -= common
        owns[one] |= owns[two]
        owns[two] = False
        cluster[cluster == two] = one
        low = np.minimum(worth[one], worth[two])
        low *= np.where(low > 0, damping, 1.0)
        low[owns[:, owns[one] & (left == 0)].any(axis=1)] = -np.inf
        worth[one] = worth[:, one] = low
        worth[two] = worth[:, two] = -np.inf
        for model in np.flatnonzero(common & (left == 0)):
            worth[np.ix_(owns[:, model], owns[:, model])] = -np.inf
    return np.unique(cluster, return_inverse=True)[1]


def _best(worth: Float[np.ndarray, "units units"], bound: Float[np.ndarray, " units"]) -> tuple[int, int]:
    """Return the pair that is worth most, the first one of equals, and correct the bounds that were too high."""
    while True:
        one = int(bound.argmax())
        two = int(worth[one].argmax())
        if worth[one, two] == bound[one]:
            return min(one, two), max(one, two)
        bound[one] = worth[one, two]
