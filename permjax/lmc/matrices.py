"""The weight matrices of a model, and their singular triplets.

Every floating leaf of role weight with two axes or more is a matrix, flattened as follows. Axes whose groups index each
other (the heads of a projection and the places inside a head) belong together. Where two sets of axes remain, they are
rows and columns; which is which changes no singular value, and no number of this package. Where more remain, as in
convolutions, the rows are the output units: the last axis if a group stands on it (`HWIO`), else the first if a group
stands there (`OIHW`), else the last; all other axes are the columns. An axis that counts layers gives one matrix for
every layer. Fused or tied leaves are taken whole, as they are stored.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from permjax import tree
from permjax.symmetry.spec import Leaf, Of, PermutationSpec, walk

Patterns = str | Iterable[str]


class Layout(NamedTuple):
    """How one leaf is seen as matrices.

    Attributes:
        leaf: name of the leaf.
        shape: its shape.
        stack: axes that count layers.
        rows: axes that make the rows, major to minor.
        columns: axes that make the columns.
    """

    leaf: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class Triplets(NamedTuple):
    """The singular value decomposition `W = sum_i s_i u_i v_i^T`, largest first.

    Attributes:
        u: left vectors, one column each.
        s: singular values.
        v: right vectors, one column each.
    """

    u: Float[np.ndarray, "rows r"]
    s: Float[np.ndarray, " r"]
    v: Float[np.ndarray, "columns r"]


def layouts(spec: PermutationSpec, model: PyTree, leaves: Patterns = "*") -> tuple[Layout, ...]:
    """How the leaves of a model that match `leaves` (`fnmatch`) are seen as matrices, in tree order.

    Raises:
        ValueError: the model does not fit the spec, or no leaf that matches is a matrix.
    """
    named = tree.flatten(model)
    spec.validate({name: np.shape(leaf) for name, leaf in named.items()})
    chosen = [spec.leaf(name) for name, leaf in tree.select(model, leaves).items() if _is_floating(leaf)]
    found = [_layout(spec, leaf) for leaf in chosen if leaf.role == "weight"]
    matrices = tuple(layout for layout in found if layout is not None)
    if not matrices:
        raise ValueError(f"No leaf that matches {leaves!r} is a weight matrix; the leaves are {list(named)}.")
    return matrices


def matrices(spec: PermutationSpec, model: PyTree, leaves: Patterns = "*") -> dict[str, Float[np.ndarray, "_ _"]]:
    """The weight matrices of a model by leaf, on the host, in float32 or wider.

    Args:
        spec: the symmetry; its roles and groups say which leaves are matrices, and how.
        model: a pytree.
        leaves: patterns of leaf names (`fnmatch`).

    Returns:
        leaf -> matrix; `leaf[i]` for every layer where one leaf holds several.

    Raises:
        ValueError: the model does not fit the spec or is not finite, or no leaf that matches is a matrix.

    Example:
        >>> {name: w.shape for name, w in matrices(spec, params, "*/kernel").items()}
    """
    found = layouts(spec, model, leaves)
    tree.check_finite(model, "the model")
    named = tree.flatten(model)
    return {name: w for layout in found for name, w in _unfold(layout, named[layout.leaf]).items()}


def with_matrices(
    spec: PermutationSpec, model: PyTree, new: Mapping[str, Float[np.ndarray, "_ _"]], leaves: Patterns = "*"
) -> PyTree:
    """The model with the matrices of `matrices(spec, model, leaves)` replaced; leaves keep their dtype."""
    by_leaf = {layout.leaf: layout for layout in layouts(spec, model, leaves)}
    return tree.map_named(lambda name, leaf: _fold(by_leaf[name], new, leaf) if name in by_leaf else leaf, model)


def decompose(matrix: Float[np.ndarray, "rows columns"]) -> Triplets:
    """The singular triplets of a matrix, in its own precision."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return Triplets(u, s, vt.T)


def rank(triplets: Triplets) -> int:
    """The numerical rank: values above the rounding error of the largest, `eps max(rows, columns) s_1`."""
    u, s, v = triplets
    return int(np.sum(s > np.finfo(s.dtype).eps * max(len(u), len(v)) * s.max(initial=0)))


def part(triplets: Triplets, start: int, stop: int | None) -> Float[np.ndarray, "rows columns"]:
    """The matrix `sum_i s_i u_i v_i^T` of some triplets only."""
    u, s, v = triplets
    return (u[:, start:stop] * s[start:stop]) @ v[:, start:stop].T


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype, jnp.floating))


def _layout(spec: PermutationSpec, leaf: Leaf) -> Layout | None:
    """Return how a leaf is seen as matrices, or None for a vector."""
    layers = {Of(group.name) for group in spec.indices}
    stack = tuple(i for i, axis in enumerate(leaf.axes) if axis in layers)
    units = _units(spec, leaf, [i for i in range(len(leaf.axes)) if i not in stack])
    if len(units) < 2:
        return None
    moves = [any(_groups(leaf, i) for i in unit) for unit in units]
    rows = units.pop(0 if moves[0] and not moves[-1] else -1)
    return Layout(leaf.name, leaf.shape, stack, tuple(rows), tuple(i for unit in units for i in unit))


def _units(spec: PermutationSpec, leaf: Leaf, axes: list[int]) -> list[list[int]]:
    """Return the axes in sets that belong together: those whose groups are per one another."""
    groups = {i: _groups(leaf, i) for i in axes}
    outer = {i: {name for g in groups[i] for name in spec.group(g).per} for i in axes}
    units: list[list[int]] = []
    for i in axes:
        mine = [unit for unit in units if any(outer[i] & groups[j] or outer[j] & groups[i] for j in unit)]
        for unit in mine:
            units.remove(unit)
        units.append(sorted([i, *(j for unit in mine for j in unit)]))
    return sorted(units)


def _groups(leaf: Leaf, axis: int) -> set[str]:
    return {end.group for _, end in walk(leaf.axes[axis]) if isinstance(end, Of)}


def _sizes(layout: Layout) -> tuple[int, int, int]:
    layers, rows, columns = (prod(layout.shape[i] for i in axes) for axes in layout[2:])
    return layers, rows, columns


def _names(layout: Layout) -> list[str]:
    if not layout.stack:
        return [layout.leaf]
    return [f"{layout.leaf}[{i}]" for i in range(_sizes(layout)[0])]


def _unfold(layout: Layout, value: Any) -> dict[str, np.ndarray]:
    array = np.asarray(value)
    array = array.astype(np.result_type(np.float32, array.dtype), copy=False)
    array = array.transpose(*layout.stack, *layout.rows, *layout.columns).reshape(_sizes(layout))
    return dict(zip(_names(layout), array, strict=True))


def _fold(layout: Layout, new: Mapping[str, np.ndarray], leaf: Any) -> Any:
    """Return the leaf made of its matrices; a JAX array where the old one was."""
    order = (*layout.stack, *layout.rows, *layout.columns)
    array = np.stack([new[name] for name in _names(layout)])
    array = array.reshape([layout.shape[i] for i in order]).transpose(np.argsort(order))
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.asarray(array, dtype=leaf.dtype)
