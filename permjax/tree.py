"""Named leaves: every leaf of a model is known by its key path, such as `params/Dense_0/kernel`.

NumPy leaves stay NumPy and are handled on the host; JAX leaves (tracers included) stay JAX, so that all
arithmetic here can be used under `jit`, `vmap` and `grad`.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PyTree

_CHUNK = 1 << 20  # elements of a host leaf that are widened to float64 at a time

_KNOWN_NAMES: dict[Any, tuple[str, ...]] = {}  # by tree structure: spelling out paths takes longer than small matmuls
_KNOWN_LIMIT = 256


# names


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by name, in tree order.

    A name is the key path joined by `/`; a bare leaf is called `""`.

    Raises:
        ValueError: two leaves have the same name.

    Example:
        >>> flatten({"a": {"kernel": 1}, "b": [2, 3]})
        {'a/kernel': 1, 'b/0': 2, 'b/1': 3}
    """
    leaves, structure = jax.tree.flatten(tree)
    if structure not in _KNOWN_NAMES:
        if len(_KNOWN_NAMES) >= _KNOWN_LIMIT:
            _KNOWN_NAMES.clear()
        _KNOWN_NAMES[structure] = _read_names(tree)
    return dict(zip(_KNOWN_NAMES[structure], leaves, strict=True))


def _read_names(tree: PyTree) -> tuple[str, ...]:
    found = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        message = (
            f"Several leaves share the name {', '.join(map(repr, twice))}; "
            "rename the keys so that their paths, joined by '/', differ."
        )
        raise ValueError(message)
    return tuple(found)


def names(tree: PyTree) -> tuple[str, ...]:
    """The names of the leaves of `tree`, in tree order; see `flatten`."""
    return tuple(flatten(tree))


def unflatten(like: PyTree, named: Mapping[str, Any]) -> PyTree:
    """The tree of the structure of `like` whose leaves are `named`; the inverse of `flatten`.

    Raises:
        ValueError: a leaf of `like` is missing from `named`, or `named` has a name that `like` has not.
    """
    wanted = names(like)
    _check_names(wanted, named, "the structure", "the named leaves")
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in wanted])


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from names split at `/`: the inverse of `flatten` for trees of dicts.

    Raises:
        ValueError: a name is both a leaf and the parent of other leaves.

    Example:
        >>> nest({"a/kernel": 1, "a/bias": 2})
        {'a': {'kernel': 1, 'bias': 2}}
    """
    root: dict[str, Any] = {}
    parents = {name[:i] for name in named for i, letter in enumerate(name) if letter == "/"}
    for name, leaf in named.items():
        if name in parents:
            message = f"{name!r} is both a leaf and the parent of other leaves; rename one of them."
            raise ValueError(message)
        *folders, last = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return root


def select(tree: PyTree, patterns: str | Iterable[str]) -> dict[str, Any]:
    """The named leaves whose name matches one of `patterns` (`fnmatch`; `*` also crosses `/`), in tree order.

    Example:
        >>> select({"a": {"kernel": 1, "bias": 2}}, "*/kernel")
        {'a/kernel': 1}
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return {n: leaf for n, leaf in flatten(tree).items() if any(fnmatchcase(n, p) for p in patterns)}


def map_named(f: Callable[..., Any], *trees: PyTree) -> PyTree:
    """The tree of `f(name, leaf, *leaves of the other trees of that name)`, with the structure of the first.

    Raises:
        ValueError: the trees do not have the same names.
    """
    first, *others = (flatten(tree) for tree in trees)
    for index, other in enumerate(others, 1):
        _check_names(first, other, "tree 0", f"tree {index}")
    leaves = [f(name, leaf, *(other[name] for other in others)) for name, leaf in first.items()]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), leaves)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint for an error message: ` (nearest: 'kernel')`, or nothing where there is no candidate."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.0)
    return f" (nearest: {found[0]!r})" if found else ""


# checks


def check_same_structure(models: Sequence[PyTree]) -> None:
    """Check that all models have the names, shapes and dtypes of the first; abstract leaves will do.

    Raises:
        ValueError: names the first leaf that is missing, extra, or of another shape or dtype.
    """
    _check_alike(models, "shape", "dtype")


def check_finite(tree: PyTree, what: str) -> None:
    """Check that no leaf of `tree` holds NaN or Inf; traced leaves, which have no values, are skipped.

    Args:
        tree: the model.
        what: what to call it in the message, such as `"model 1"` or a file name.

    Raises:
        ValueError: names the first leaf with such values and says how many it holds.
    """
    for name, leaf in flatten(tree).items():
        if isinstance(leaf, Tracer) or not _is_inexact(leaf):
            continue
        xp, values = _backend(leaf), _concrete(leaf)
        if bool(xp.all(xp.isfinite(values))):
            continue
        message = (
            f"Leaf {name!r} of {what} holds {int(xp.sum(xp.isnan(values)))} NaN and "
            f"{int(xp.sum(xp.isinf(values)))} Inf among its {values.size} values (shape {values.shape}); "
            "such a model cannot be compared or merged: take an earlier checkpoint or train it again."
        )
        raise ValueError(message)


def _check_alike(models: Sequence[PyTree], *attributes: str) -> None:
    if not models:
        raise ValueError("No model was given; give at least one.")
    first, *others = (flatten(model) for model in models)
    for index, other in enumerate(others, 1):
        _check_names(first, other, "model 0", f"model {index}")
        for name, attribute in ((n, a) for n in first for a in attributes):
            here, there = (getattr(_array(leaf), attribute) for leaf in (first[name], other[name]))
            if here != there:
                message = (
                    f"Leaf {name!r} has {attribute} {here} in model 0 but {there} in model {index}; "
                    f"give models of one architecture, with leaves of equal {' and '.join(attributes)}."
                )
                raise ValueError(message)


def _check_names(wanted: Iterable[str], given: Iterable[str], wants: str, gives: str) -> None:
    wanted, given = dict.fromkeys(wanted), dict.fromkeys(given)
    for name in wanted:
        if name not in given:
            hint = nearest(name, [n for n in given if n not in wanted] or given)
            message = f"Leaf {name!r} of {wants} is missing from {gives}{hint}; both need the same names."
            raise ValueError(message)
    for name in given:
        if name not in wanted:
            hint = nearest(name, wanted)
            message = f"Leaf {name!r} of {gives} is not in {wants}{hint}; both need the same names."
            raise ValueError(message)


# arithmetic


def lerp(a: PyTree, b: PyTree, t: ArrayLike) -> PyTree:
    """The point at `t` on the line from `a` to `b`: (1 - t) a + t b.

    Leaves keep the dtype of `a`; half precision is computed in float32. Integer and bool leaves must be equal
    and are taken from `a` (under a trace without the comparison).

    Args:
        a: the tree at `t = 0`.
        b: the tree at `t = 1`, with the names and shapes of `a`.
        t: a scalar; values outside [0, 1] extrapolate. A traced `t` turns NumPy leaves into JAX ones.

    Raises:
        ValueError: the trees differ in names, shapes or integer leaves; names the leaf.
    """
    t = _array(t)
    return _combine((a, b), (1 - t, t))


def average(trees: Sequence[PyTree], weights: Sequence[ArrayLike] | ArrayLike | None = None) -> PyTree:
    """The weighted mean of trees: sum_m w_m theta_m / sum_m w_m.

    Leaves keep the dtype of the first tree; half precision is accumulated in float32. Integer and bool leaves
    must be equal and are taken from the first tree (under a trace without the comparison).

    Args:
        trees: M trees of equal names and shapes.
        weights: M numbers, normalised here; equal ones by default.

    Raises:
        ValueError: there are not M finite weights of nonzero sum, or the trees differ; names the leaf.

    Example:
        >>> average([{"w": np.zeros(2)}, {"w": np.ones(2)}], [1, 3])
        {'w': array([0.75, 0.75])}
    """
    return _combine(trees, _normalised(weights, len(trees)))


def dot(a: PyTree, b: PyTree) -> Any:
    """The inner product over all floating leaves: sum_l <a_l, b_l>; integer and bool leaves do not count.

    NumPy leaves are accumulated in float64 on the host, JAX leaves in float32 or wider at highest precision.

    Args:
        a: the first tree; complex leaves are conjugated.
        b: the second tree, with the names and shapes of `a`.

    Returns:
        A NumPy float64 scalar where all leaves are NumPy, otherwise a JAX scalar.

    Raises:
        ValueError: the trees differ in names or shapes; names the leaf.
    """
    _check_alike((a, b), "shape")
    named = flatten(b)
    pairs = [(leaf, named[name]) for name, leaf in flatten(a).items() if _is_inexact(leaf)]
    host = sum((_host_dot(x, y) for x, y in pairs if _backend(x, y) is np), np.float64(0))
    device = [_device_dot(x, y) for x, y in pairs if _backend(x, y) is jnp]
    if not device:
        return host
    dtype = np.result_type(*(term.dtype for term in device))
    return sum((term.astype(dtype) for term in device), jnp.asarray(host, dtype))


def norm(a: PyTree) -> Any:
    """The Euclidean norm over all floating leaves, sqrt(dot(a, a)); see `dot`."""
    squared = dot(a, a)
    return _backend(squared).sqrt(squared.real)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """One tree whose leaves have a new first axis that counts the trees.

    Raises:
        ValueError: no tree is given, or they differ in names, shapes or dtypes; names the leaf.
    """
    check_same_structure(trees)
    return map_named(lambda _, *leaves: _backend(*leaves).stack(leaves), *trees)


def unstack(tree: PyTree) -> tuple[PyTree, ...]:
    """The trees along the first axis of every leaf; the inverse of `stack`. NumPy leaves become views.

    Raises:
        ValueError: a leaf has no first axis, or one of another length than that of the first leaf.
    """
    named = {name: _concrete(leaf) for name, leaf in flatten(tree).items()}
    count: int | None = None
    for name, leaf in named.items():
        length = leaf.shape[0] if leaf.ndim else None
        count = length if count is None else count
        if length is None or length != count:
            message = (
                f"Leaf {name!r} of shape {leaf.shape} cannot be unstacked: the first axis of every leaf "
                f"counts the models, which are {count} by the first leaf; stack the models with `stack`."
            )
            raise ValueError(message)
    return tuple(unflatten(tree, {n: leaf[i, ...] for n, leaf in named.items()}) for i in range(count or 0))


def _combine(trees: Sequence[PyTree], weights: Sequence[Any]) -> PyTree:
    """sum_m weights[m] trees[m], leaf by leaf; integer and bool leaves from the first tree."""
    _check_alike(trees, "shape")

    def combine(name: str, *leaves: Any) -> Any:
        if not _is_inexact(leaves[0]):
            return _common(name, leaves)
        xp = _backend(*leaves, *(w for w in weights if isinstance(w, Tracer)))
        arrays = [xp.asarray(leaf) for leaf in leaves]
        wide = np.result_type(np.float32, *(x.dtype for x in arrays))
        total = sum(x.astype(wide) * xp.asarray(w, wide) for x, w in zip(arrays, weights, strict=True))
        return xp.asarray(total, arrays[0].dtype)

    return map_named(combine, *trees)


def _common(name: str, leaves: Sequence[Any]) -> Any:
    """The first of some integer, bool or key leaves, which must be equal."""
    first, *others = (_concrete(leaf) for leaf in leaves)
    for index, other in enumerate(others, 1):
        traced = any(isinstance(leaf, Tracer) for leaf in (first, other))
        if not traced and not bool((first == other).all()):
            message = (
                f"Leaf {name!r} of dtype {first.dtype} differs between tree 0 and tree {index} and cannot be "
                "averaged; make it equal in all trees or leave it out."
            )
            raise ValueError(message)
    return first


def _normalised(weights: Any, count: int) -> Sequence[Any]:
    """`count` weights that add up to one; traced weights are normalised but not checked."""
    if weights is None:
        return [1 / max(count, 1)] * count
    traced = any(isinstance(w, Tracer) for w in jax.tree.leaves(weights))
    values = jnp.asarray(weights) if traced else np.asarray(weights, np.float64)
    if values.shape != (count,):
        message = f"{count} trees need {count} weights in one axis, not weights of shape {values.shape}."
        raise ValueError(message)
    if not traced and not (np.isfinite(values).all() and math.fsum(values) != 0):
        raise ValueError(f"The weights {values.tolist()} must be finite and must not add up to zero.")
    return list(values / values.sum())


def _host_dot(a: Any, b: Any) -> Any:
    a, b = (np.asarray(x).reshape(-1) for x in (a, b))
    wide = np.result_type(np.float64, a.dtype, b.dtype)
    pieces = (slice(i, i + _CHUNK) for i in range(0, a.size, _CHUNK))
    return sum((np.vdot(a[s].astype(wide), b[s].astype(wide)) for s in pieces), wide.type(0))


def _device_dot(a: Any, b: Any) -> jax.Array:
    a, b = jnp.asarray(a), jnp.asarray(b)
    wide = np.result_type(np.float32, a.dtype, b.dtype)
    a, b = jnp.conj(a.astype(wide)), b.astype(wide)
    return jnp.tensordot(a, b, axes=a.ndim, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


def _backend(*leaves: Any) -> Any:
    """`jax.numpy` if a leaf is a JAX array (or tracer), else `numpy`."""
    return jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np


def _array(leaf: Any) -> Any:
    """The leaf itself if it has a shape and dtype (lazy and abstract leaves do), else a NumPy array of it."""
    return leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)


def _concrete(leaf: Any) -> Any:
    """The leaf itself if it is a JAX array, else a NumPy array of it (lazy leaves are read)."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(_array(leaf).dtype, jnp.inexact)
