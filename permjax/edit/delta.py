"""Edits as values: changes of single leaves, of low rank or dense, that add up, scale, undo, travel and are saved."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from permjax import tree
from permjax.action import permute_leaf, source
from permjax.edit.places import layer_count, mlp_place
from permjax.io.checkpoint import CheckpointError, open_checkpoint, save_checkpoint
from permjax.io.lazy import StrPath
from permjax.nets.base import Net
from permjax.permutation import namespace, validate
from permjax.symmetry.spec import PermutationSpec

Orientation: TypeAlias = Literal["in_out", "out_in"]

_HEADER = "permjax-delta"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A change of rank r, `dW = u v^T` as a map of keys to values; a leaf of orientation "in_out" holds `dW^T`.

    Attributes:
        u: `[*edits, d, r]`, in the space of values.
        v: `[*edits, m, r]`, in the space of keys.
        orientation: `"in_out"` for a leaf `[m, d]` (GPT-2), `"out_in"` for a leaf `[d, m]` (Llama).
    """

    u: Float[Array | np.ndarray, "*edits d r"]
    v: Float[Array | np.ndarray, "*edits m r"]
    orientation: Orientation = field(metadata={"static": True})

    def dense(self) -> "Dense":
        """The same change in the leaf's own layout."""
        left, right = (self.v, self.u) if self.orientation == "in_out" else (self.u, self.v)
        return Dense(_product(left, namespace(right).swapaxes(right, -1, -2)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """A change of any rank.

    Attributes:
        value: what is added, in the leaf's own layout.
    """

    value: Float[Array | np.ndarray, "*shape"]

    def dense(self) -> "Dense":
        """The change itself."""
        return self


Delta: TypeAlias = Mapping[str, LowRank | Dense]


def apply_delta(params: PyTree, delta: Delta) -> PyTree:
    """The parameters after an edit, `W + dW`; every other leaf is the very same object.

    Leaves keep their dtype; the sum is taken in float64 for NumPy leaves, else in float32 or wider.

    Args:
        params: a pytree whose leaves have the names of the delta.
        delta: leaf name -> change.

    Raises:
        ValueError: a name or shape does not fit; names the leaf.

    Example:
        >>> edited = apply_delta(params, rome(net, params, [edit], layer=5).delta)
    """
    named = tree.flatten(params)
    for name in delta:
        if name not in named:
            raise ValueError(f"The delta changes leaf {name!r}, which the model has not{tree.nearest(name, named)}.")
    return tree.unflatten(params, {**named, **{name: _added(name, named[name], delta[name]) for name in delta}})


def _added(name: str, leaf: Any, change: LowRank | Dense) -> Any:
    value = change.dense().value
    if np.shape(leaf) != value.shape:
        message = f"The delta of leaf {name!r} has shape {value.shape}, but the leaf has {np.shape(leaf)}; "
        raise ValueError(message + "it was made for another model or another layout.")
    xp = namespace(leaf, value)
    wide = np.result_type(leaf.dtype, np.float64 if xp is np else np.float32)
    return (xp.asarray(leaf, wide) + xp.asarray(value, wide)).astype(leaf.dtype)


def scale(delta: Delta, factor: Any) -> dict[str, LowRank | Dense]:
    """The delta times a number."""
    return {
        name: replace(one, u=one.u * factor) if isinstance(one, LowRank) else Dense(one.value * factor)
        for name, one in delta.items()
    }


def invert(delta: Delta) -> dict[str, LowRank | Dense]:
    """The delta that undoes this one, up to rounding; bit-identical is only to keep the parameters from before."""
    return scale(delta, -1)


def compose(*deltas: Delta) -> dict[str, LowRank | Dense]:
    """The one delta that does what all of them do, one after the other; ranks add up.

    Raises:
        ValueError: two changes of a leaf have different layouts or shapes; names the leaf.

    Example:
        >>> compose(delta, invert(delta))  # changes nothing
    """
    names = dict.fromkeys(name for delta in deltas for name in delta)
    return {name: reduce(partial(_sum, name), (delta[name] for delta in deltas if name in delta)) for name in names}


def _sum(name: str, a: LowRank | Dense, b: LowRank | Dense) -> LowRank | Dense:
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        if a.orientation != b.orientation:
            message = f"Two changes of leaf {name!r} have the orientations {a.orientation!r} and {b.orientation!r}; "
            raise ValueError(message + "they belong to models of different layouts.")
        return LowRank(_beside(name, a.u, b.u), _beside(name, a.v, b.v), a.orientation)
    x, y = a.dense().value, b.dense().value
    if x.shape != y.shape:
        raise ValueError(_unlike(name, x, y))
    return Dense(x + y)


def _beside(name: str, x: Any, y: Any) -> Any:
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(_unlike(name, x, y))
    return namespace(x, y).concatenate([x, y], -1)


def _unlike(name: str, x: Any, y: Any) -> str:
    return f"Two changes of leaf {name!r} have shapes {x.shape} and {y.shape}; they belong to different models."


def permute_delta(spec: PermutationSpec, permutations: Mapping[str, Any], delta: Delta) -> dict[str, LowRank | Dense]:
    """Carry a delta to the permuted model.

    `apply_delta(permute(params), permute_delta(delta)) = permute(apply_delta(params, delta))`. With the permutations of
    a matching it goes to another model.

    Args:
        spec: the symmetry of the model.
        permutations: group -> int array, gather convention, as `permute` takes them.
        delta: leaf name -> change; low rank is kept where the two axes of the leaf move independently.

    Raises:
        ValueError: permutations are no bijections, or the spec has no such leaf.
    """
    validate(spec, permutations)
    return {name: _moved(spec, name, permutations, one) for name, one in delta.items()}


def _moved(spec: PermutationSpec, name: str, permutations: Mapping[str, Any], one: LowRank | Dense) -> LowRank | Dense:
    leaf = spec.leaf(name)
    if isinstance(one, LowRank):
        rows, columns = (source(spec, leaf, axis, permutations) for axis in (0, 1))
        if rows.size == rows.shape[0] and columns.size == columns.shape[1]:
            keys, values = (rows, columns) if one.orientation == "in_out" else (columns, rows)
            return replace(one, u=_taken(one.u, values), v=_taken(one.v, keys))
    return Dense(permute_leaf(spec, leaf, permutations, one.dense().value))


def _taken(factor: Any, index: Any) -> Any:
    return namespace(factor, index).take(factor, index.reshape(-1), axis=-2)


def side_path(net: Net, delta: Delta) -> Callable[[str, Array], Array]:
    """A hook that adds `dW k` to the output of every edited matrix, whose weight stays as it is.

    One model and many candidate edits of low rank thus need no copies of its weights. Make it inside of the function
    that is jitted or mapped, one for each call of `apply`.

    Args:
        net: a GPT-2 or Llama network.
        delta: changes of second MLP matrices.

    Raises:
        ValueError: the delta changes another leaf; names it.

    Example:
        >>> logits = net.apply(params, tokens, hook=side_path(net, delta))
    """
    places = {p.weight: p for p in (mlp_place(net.config, i) for i in range(layer_count(net.config)))}
    if foreign := [name for name in delta if name not in places]:
        message = f"The delta changes {foreign[0]!r}{tree.nearest(foreign[0], places)}, but a side path "
        raise ValueError(message + "exists only beside the second matrix of an MLP; use `apply_delta`.")
    matrices = {places[name].key: places[name] for name in delta}
    values = {places[name].value: places[name] for name in delta}
    keys: dict[str, Array] = {}

    def hook(name: str, x: Array) -> Array:
        if name in matrices:
            keys[matrices[name].weight] = x
        if name not in values:
            return x
        place = values[name]
        return x + _mapped(delta[place.weight], keys[place.weight], place.orientation).astype(x.dtype)

    return hook


def _mapped(change: LowRank | Dense, keys: Array, orientation: Orientation) -> Array:
    if isinstance(change, LowRank):
        return _product(_product(keys, jnp.asarray(change.v, keys.dtype)), jnp.asarray(change.u, keys.dtype).T)
    value = jnp.asarray(change.value, keys.dtype)
    return _product(keys, value if orientation == "in_out" else value.T)


def _product(a: Any, b: Any) -> Any:
    xp = namespace(a, b)
    return np.matmul(a, b) if xp is np else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def save_delta(path: StrPath, delta: Delta) -> None:
    """Write a delta to a safetensors file; factors, layouts and dtypes are kept.

    Raises:
        CheckpointError: the file cannot be written.
    """
    kinds = {name: one.orientation if isinstance(one, LowRank) else "dense" for name, one in delta.items()}
    tensors = {f"{part}:{name}": value for name, one in delta.items() for part, value in vars(one).items()}
    arrays = {name: np.asarray(value) for name, value in tensors.items() if not name.startswith("orientation:")}
    save_checkpoint(path, arrays, metadata={_HEADER: json.dumps(kinds)})


def load_delta(path: StrPath) -> dict[str, LowRank | Dense]:
    """Read a delta that `save_delta` wrote, with NumPy arrays.

    Raises:
        CheckpointError: the file cannot be read, or holds no delta.
    """
    checkpoint = open_checkpoint(path)
    if _HEADER not in checkpoint.metadata:
        message = f"{checkpoint.path} holds no delta; give a file that `permjax edit` or `save_delta` wrote."
        raise CheckpointError(message)
    kinds: dict[str, Any] = json.loads(checkpoint.metadata[_HEADER])

    def read(part: str, name: str) -> np.ndarray:
        return checkpoint[f"{part}:{name}"].read()

    return {
        name: Dense(read("value", name)) if kind == "dense" else LowRank(read("u", name), read("v", name), kind)
        for name, kind in kinds.items()
    }
