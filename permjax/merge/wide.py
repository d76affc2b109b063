"""The geometry of a merged network: which units of its axes belong to which model, and where each model finds its own.

A merged ("wide") network has `plan.widths[g]` units in group g. Model m sees its own units as `wide[labels[m]]`, its
view; a unit with one label in several models is shared, and a position of an axis is owned by the models with a unit
there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from permjax.plan import Plan
from permjax.symmetry.spec import Axis, Fixed, Of, PermutationSpec, Product, Sum, axis_size

_RUNS = 8  # up to so many runs of positions are sliced, more are gathered


class Segment(NamedTuple):
    """The positions of an axis that the same models own: `owners` [models], `positions` in ascending order."""

    owners: tuple[bool, ...]
    positions: Int[np.ndarray, " positions"]


def resized(spec: PermutationSpec, sizes: Mapping[str, int]) -> PermutationSpec:
    """The spec of the same architecture with other group sizes; groups not named keep theirs."""
    groups = tuple(replace(g, size=sizes.get(g.name, g.size)) for g in spec.groups)
    known = {g.name: g.size for g in (*groups, *spec.indices)}
    leaves = tuple(
        replace(leaf, shape=tuple(axis_size(axis, known) for axis in leaf.axes)) if leaf.axes else leaf
        for leaf in spec.leaves
    )
    return replace(spec, groups=groups, leaves=leaves)


@dataclass(frozen=True, eq=False)
class Wide:
    """A spec of aligned models together with a plan that says which of their units are one.

    Raises:
        ValueError: the plan lacks a group, has labels of another size than the spec, or moves units inside another
            group (only aligned models can be merged).
    """

    spec: PermutationSpec
    plan: Plan

    def __post_init__(self) -> None:
        for group in self.spec.groups:
            if group.name not in self.plan.widths:
                raise ValueError(f"the plan says nothing of group '{group.name}'; make it for this spec.")
            if group.per and not all((rows == np.arange(group.size)).all() for rows in self.plan.labels[group.name]):
                raise ValueError(
                    f"the plan moves units of '{group.name}' inside '{group.per[-1]}'; only models that are already "
                    "aligned can be merged: give the models that a matching returned, and a plan for these."
                )

    @property
    def models(self) -> int:
        """Number of models."""
        return self.plan.models

    @cached_property
    def wide_spec(self) -> PermutationSpec:
        """The spec of the merged network."""
        return resized(self.spec, self.plan.widths)

    @cached_property
    def sources(self) -> tuple[PermutationSpec, ...]:
        """The spec of every model."""
        labels = self.plan.labels
        return tuple(
            resized(self.spec, {g.name: labels[g.name][m].shape[-1] for g in self.spec.groups})
            for m in range(self.models)
        )

    @cached_property
    def widened(self) -> frozenset[str]:
        """The groups in which the merged network is not simply the models unit by unit."""
        return frozenset(g.name for g in self.spec.groups if not g.per and not self._is_whole(g.name))

    @cached_property
    def views(self) -> tuple[int, ...]:
        """The models whose views differ: all of them, or the first alone if nothing is widened."""
        return tuple(range(self.models)) if self.widened else (0,)

    def touches(self, axis: Axis) -> bool:
        """Tell whether an axis carries a widened group."""
        return any(name in self.widened for name in groups_of(axis))

    def owners(self, axis: Axis) -> Bool[np.ndarray, "models positions"]:
        """Return for every position of a wide axis which models own it."""
        match axis:
            case Fixed(size):
                return np.ones((self.models, size), bool)
            case Of(group):
                return self._group_owners(group)
            case Sum(segments):
                return np.concatenate([self.owners(s) for s in segments], axis=1)
            case Product(factors):
                return reduce(_outer_and, (self.owners(f) for f in factors), np.ones((self.models, 1), bool))

    def index(self, axis: Axis, model: int) -> Int[np.ndarray, " positions"]:
        """Return where in a wide axis each position of a model's own axis is."""
        match axis:
            case Fixed(size):
                return np.arange(size)
            case Of(group):
                if group not in self.spec or self.spec.group(group).per:
                    return np.arange(self.spec.group(group).size)
                return self.plan.labels[group][model].astype(np.int64)
            case Sum(segments):
                starts = np.cumsum([0, *(self.wide_spec.size(s) for s in segments)])
                return np.concatenate(
                    [self.index(s, model) + start for s, start in zip(segments, starts, strict=False)]
                )
            case Product(factors):
                index = np.zeros(1, np.int64)
                for factor in factors:
                    index = (index[:, None] * self.wide_spec.size(factor) + self.index(factor, model)[None]).reshape(-1)
                return index

    def segments(self, axis: Axis) -> tuple[Segment, ...]:
        """Return the positions of a wide axis by their owners, shared ones first; those of nobody are left out."""
        owners = self.owners(axis)
        rows = {tuple(bool(x) for x in column) for column in owners.T}
        order = sorted((row for row in rows if any(row)), key=lambda row: (-sum(row), [not x for x in row]))
        return tuple(Segment(row, np.flatnonzero((owners == np.asarray(row)[:, None]).all(0))) for row in order)

    def view(self, leaf: str, model: int, array: Any) -> Any:
        """Return what a model sees of a wide leaf."""
        for i, axis in enumerate(self.spec.leaf(leaf).axes):
            if self.touches(axis):
                array = pick(array, self.index(axis, model), i)
        return array

    def _is_whole(self, group: str) -> bool:
        rows, width = self.plan.labels[group], self.plan.widths[group]
        return all(r.shape[-1] == width and (r == np.arange(width)).all() for r in rows)

    def _group_owners(self, group: str) -> Bool[np.ndarray, "models positions"]:
        if group not in self.spec or self.spec.group(group).per:
            return np.ones((self.models, self.spec.group(group).size), bool)
        owners = np.zeros((self.models, self.plan.widths[group]), bool)
        for model, labels in enumerate(self.plan.labels[group]):
            owners[model, labels] = True
        return owners


def groups_of(axis: Axis) -> frozenset[str]:
    """Return the groups in an axis tree."""
    match axis:
        case Of(group):
            return frozenset((group,))
        case Product(parts) | Sum(parts):
            return frozenset().union(*(groups_of(part) for part in parts))
        case _:
            return frozenset()


def mean_units(wide: Wide, axis: Axis, arrays: Sequence[Any], models: Sequence[int], place: int) -> Any:
    """Return the mean over all units with one label: views `[..., own units, ...]` to `[..., wide units, ...]`.

    Positions without a unit are zero.

    Args:
        wide: the geometry.
        axis: the tree of the axis at `place`.
        arrays: one array for each of `models`.
        models: the models that the arrays are views of.
        place: the axis of the arrays.
    """
    if not wide.touches(axis):
        return arrays[0] if len(arrays) == 1 else _mean((*arrays,))
    order = np.concatenate([wide.index(axis, m) for m in models])
    return _mean_by_label((*arrays,), (*order.tolist(),), wide.wide_spec.size(axis), place % arrays[0].ndim)


def pick(array: Any, positions: Int[np.ndarray, " positions"], axis: int) -> Any:
    """Return the given positions along an axis, by slices where they are a few runs."""
    axis %= array.ndim
    if len(positions) == array.shape[axis] and (np.diff(positions) == 1).all():
        return array
    return _pick(array, (*positions.tolist(),), axis)


# Compiled as a whole, as one by one every slice of its own place and size would be a program of its own.


@partial(jax.jit, inline=True)
def _mean(arrays: tuple[Any, ...]) -> Any:
    return sum(arrays[1:], start=arrays[0]) * jnp.asarray(1 / len(arrays), arrays[0].dtype)


@partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _mean_by_label(arrays: tuple[Any, ...], order: tuple[int, ...], size: int, place: int) -> Any:
    """The mean over all entries of one label; `order` has the label of every entry of the joined arrays."""
    counts = np.bincount(order, minlength=size)
    joined = jnp.concatenate([*arrays, jnp.zeros_like(jax.lax.slice_in_dim(arrays[0], 0, 1, axis=place))], axis=place)
    where, ends = np.argsort(order, kind="stable"), np.cumsum(counts)
    nth = [
        np.where(k < counts, where[np.minimum(ends - counts + k, len(order) - 1)], len(order))
        for k in range(counts.max())
    ]
    total = reduce(jnp.add, (pick(joined, units, place) for units in nth))
    column = [-1 if i == place else 1 for i in range(joined.ndim)]
    return total / jnp.asarray(np.maximum(counts, 1), joined.dtype).reshape(column)


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _pick(array: Any, positions: tuple[int, ...], axis: int) -> Any:
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    if len(cuts) > _RUNS:
        return jnp.take(array, jnp.asarray(positions, jnp.int32), axis=axis)
    runs = [run for run in np.split(np.array(positions, np.int64), cuts) if len(run)]
    parts = [jax.lax.slice_in_dim(array, int(run[0]), int(run[-1]) + 1, axis=axis) for run in runs]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _outer_and(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a[:, :, None] & b[:, None, :]).reshape(len(a), -1)
