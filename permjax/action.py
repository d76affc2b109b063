"""The action of permutations on models: every leaf gathered along its axis trees."""

from collections.abc import Mapping
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.permutation import is_traced, namespace, validate
from permjax.symmetry.spec import Axis, Fixed, Leaf, Of, PermutationSpec, Product, Sum, walk

Tree = TypeVar("Tree")


def permute(spec: PermutationSpec, permutations: Mapping[str, Any], params: Tree) -> Tree:
    """Permute the units of a model: `leaf -> take(leaf, index(axis tree), axis)` on every axis.

    The result computes the same function. NumPy leaves stay NumPy, gathered one at a time, as long as the permutations
    are concrete; JAX leaves may be traced, so this works under `jit`, `vmap` and `grad`.

    Args:
        spec: the symmetry.
        permutations: group -> int array `[*per, n]`, gather convention. Under a trace their values are not checked.
        params: pytree with the spec's leaf names and shapes.

    Returns:
        A pytree like `params`.

    Raises:
        ValueError: if permutations are no bijections, or leaves do not fit the spec.

    Example:
        >>> same = permute(spec, random_permutations(spec, jax.random.key(0)), params)
    """
    validate(spec, permutations)
    named = tree.flatten(params)
    spec.validate({name: np.shape(leaf) for name, leaf in named.items()}, "params")
    return tree.unflatten(params, {n: permute_leaf(spec, spec.leaf(n), permutations, v) for n, v in named.items()})


def permute_state(spec: PermutationSpec, permutations: Mapping[str, Any], state: Tree) -> Tree:
    """Permute an optimizer state: every leaf whose name ends in the name of a model leaf moves like it.

    Covers moments and averages (Adam, momentum, EMA) that mirror the params; scalars pass unchanged.

    Raises:
        ValueError: names a non-scalar leaf that mirrors no leaf of the model (as in factored second moments).
    """
    validate(spec, permutations)
    known = {leaf.name: leaf for leaf in spec.leaves}

    def move(path, value):
        for start in range(len(path)):
            leaf = known.get(jax.tree_util.keystr(path[start:], simple=True, separator="/"))
            if leaf is not None and leaf.shape == np.shape(value):
                return permute_leaf(spec, leaf, permutations, value)
        if np.ndim(value) == 0:
            return value
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
            f"state leaf '{name}' of shape {np.shape(value)} mirrors no leaf of the model, so it is unknown how "
            "its axes move; permute the parts that mirror the params by themselves."
        )

    return jax.tree_util.tree_map_with_path(move, state)


def permute_leaf(spec: PermutationSpec, leaf: Leaf, permutations: Mapping[str, Any], value: Any) -> Any:
    """Permute one leaf of the spec; shapes are taken as checked."""
    moved = {i: source(spec, leaf, i, permutations) for i, a in enumerate(leaf.axes) if moves(spec, a)}
    if not moved:
        return value
    if not isinstance(value, np.ndarray) or is_traced(*moved.values()):
        value = jnp.asarray(value)
    if all(index.size == index.shape[i] for i, index in moved.items()):
        return reduce(lambda kept, i: _take(kept, moved[i], i), moved, value)
    try:
        order = list(TopologicalSorter({i: _outer_axes(spec, leaf, i) & moved.keys() for i in moved}).static_order())
    except CycleError:  # axes that index each other can only move together
        return _gather(value, moved)
    return reduce(lambda kept, i: _take(kept, moved[i], i), order, value)


def moves(spec: PermutationSpec, axis: Axis) -> bool:
    """Tell whether any part of an axis tree carries a free group."""
    return any(isinstance(end, Of) and end.group in spec for _, end in walk(axis))


def flat_factors(axis: Axis) -> tuple[Axis, ...]:
    """Return the factors of an axis with nested products taken apart, major to minor."""
    return tuple(f for part in axis.factors for f in flat_factors(part)) if isinstance(axis, Product) else (axis,)


def source(spec: PermutationSpec, leaf: Leaf, axis: int, permutations: Mapping[str, Any]) -> Any:
    """Return where each target position of an axis comes from.

    Returns:
        int32 index that broadcasts against the leaf: the size of `axis` there, and of every other axis that the
        groups of this axis are `per`; 1 elsewhere.
    """
    match leaf.axes[axis]:
        case Of(group) if group in spec and not spec.group(group).per:
            return permutations[group].reshape([-1 if i == axis else 1 for i in range(len(leaf.axes))])
    groups = {end.group for _, end in walk(leaf.axes[axis]) if isinstance(end, Of)}
    needed = {outer for g in groups for outer in spec.group(g).per} - groups
    others = [i for i in range(len(leaf.axes)) if i != axis]
    grid = {
        name: where.reshape([-1 if j == i else 1 for j in others])
        for i in others
        for name, where in _coordinates(spec, leaf.axes[i]).items()
        if name in needed
    }
    index = _source(spec, leaf.axes[axis], permutations, grid, len(others))
    return namespace(index).moveaxis(index, -1, axis)


def _source(spec, axis: Axis, p, grid: dict[str, np.ndarray], rank: int):
    """Return the source index of an axis tree, shape `[*grid broadcast (rank), size]`."""
    match axis:
        case Fixed(size):
            return np.arange(size, dtype=np.int32).reshape((1,) * rank + (size,))
        case Of(group):
            return _unit_source(spec, group, p, grid, rank)
        case Sum(segments):
            return _sum_source(spec, segments, p, grid, rank)
        case Product(factors):
            return _product_source(spec, factors, p, grid, rank)


def _unit_source(spec, group: str, p, grid, rank: int):
    n = spec.group(group).size
    if group not in spec:
        return np.arange(n, dtype=np.int32).reshape((1,) * rank + (n,))
    rows, per = p[group], spec.group(group).per
    if not per:
        return rows.reshape((1,) * rank + (n,))
    if missing := [outer for outer in per if outer not in grid]:
        raise ValueError(f"group '{group}' is per '{missing[0]}', which does not stand beside it in every leaf.")
    return rows[tuple(np.broadcast_arrays(*(grid[outer] for outer in per)))]


def _sum_source(spec, segments, p, grid, rank: int):
    parts, offset = [], 0
    for segment in segments:
        part = _source(spec, segment, p, grid, rank)
        parts.append(part + np.int32(offset))
        offset += part.shape[-1]
    xp = namespace(*parts)
    lead = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return xp.concatenate([xp.broadcast_to(part, (*lead, part.shape[-1])) for part in parts], axis=-1)


def _product_source(spec, factors, p, grid, rank: int):
    factors = flat_factors(Product(factors))
    sizes = [spec.size(f) for f in factors]
    k = len(factors)
    index = np.zeros((1,) * (rank + k), np.int32)
    for i, factor in enumerate(factors):
        inner = {name: where.reshape(where.shape + (1,) * (k - 1)) for name, where in grid.items()}
        siblings = [j for j in range(k) if j != i]
        for place, j in enumerate(siblings):
            if isinstance(sibling := factors[j], Of):
                shape = [1] * (rank + k - 1)
                shape[rank + place] = sizes[j]
                inner[sibling.group] = np.arange(sizes[j], dtype=np.int32).reshape(shape)
        part = _source(spec, factor, p, inner, rank + k - 1)
        stride = np.int32(np.prod(sizes[i + 1 :], dtype=np.int64))
        index = index + namespace(part).moveaxis(part, -1, rank + i) * stride
    xp = namespace(index)
    lead = index.shape[:rank]
    return xp.broadcast_to(index, (*lead, *sizes)).reshape((*lead, -1))


def _coordinates(spec: PermutationSpec, axis: Axis) -> dict[str, np.ndarray]:
    """Return, for the groups that stand once in an axis outside any sum, their unit at each position."""
    factors = flat_factors(axis)
    sizes = [spec.size(f) for f in factors]
    places = np.unravel_index(np.arange(int(np.prod(sizes))), sizes) if factors else ()
    return {f.group: w.astype(np.int32) for f, w in zip(factors, places, strict=True) if isinstance(f, Of)}


def _outer_axes(spec: PermutationSpec, leaf: Leaf, axis: int) -> set[int]:
    """Return the other axes of a leaf with groups that those of `axis` are `per`."""
    groups = [{end.group for _, end in walk(a) if isinstance(end, Of)} for a in leaf.axes]
    outer = {g for name in groups[axis] for g in spec.group(name).per} - groups[axis]
    return {i for i in range(len(groups)) if i != axis and groups[i] & outer}


def _take(value: Any, index: Any, axis: int) -> Any:
    xp = namespace(value)
    if index.size == index.shape[axis]:
        return xp.take(value, xp.asarray(index.reshape(-1)), axis=axis)
    return xp.take_along_axis(value, xp.asarray(index), axis=axis)


def _gather(value: Any, moved: Mapping[int, Any]) -> Any:
    plain = [np.arange(n).reshape([-1 if j == i else 1 for j in range(value.ndim)]) for i, n in enumerate(value.shape)]
    return value[tuple(moved.get(i, plain[i]) for i in range(value.ndim))]
