"""What layer-wise least squares needs to know of the data: sums of products of a layer's inputs and outputs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from permjax.files import atomic_path
from permjax.merge.products import Sums, dot_sums, whole
from permjax.merge.windows import Window, conv_sums, pick_positions, sampled_sums
from permjax.permutation import is_traced

Arrays: TypeAlias = tuple[Array, Array, Array]

_HEADER = "permjax-grams"
_ARRAYS = ("inputs", "cross", "targets")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram:
    """The statistics that decide on the least squares Y ~ X W of one layer, in float64, on the device or the host.

    They add: the Gram of two parts of the data is the sum of theirs, `a + b`, so parts of the data, devices and owners
    of data can be summed up. With a leading axis of groups they describe as many separate problems. Arrays on the
    device are float64 even outside `with jax.enable_x64(True)`, but JAX then computes with them in float32; NumPy does
    not.

    Attributes:
        inputs: X^T X, `[*groups, k, k]`; with a bias the last column of X is the constant one.
        cross: X^T Y, `[*groups, k, n]`.
        targets: sums of squares of Y, `[*groups, n]`.
        rows: number of rows of X.
        samples: number of independent samples, fewer than rows for convolutions and sequences.
        bias: whether the last column of X is the constant one.
    """

    inputs: Float[Array | np.ndarray, "*groups k k"]
    cross: Float[Array | np.ndarray, "*groups k n"]
    targets: Float[Array | np.ndarray, "*groups n"]
    rows: Any
    samples: Any
    bias: bool = field(metadata={"static": True})

    @classmethod
    def empty(cls, inputs: int, outputs: int, *, bias: bool, groups: int | None = None) -> "Gram":
        """Return the Gram of no data for X of `inputs` columns, the constant one included, and Y of `outputs`."""
        lead = () if groups is None else (groups,)
        cross = np.zeros((*lead, inputs, outputs))
        return cls(np.zeros((*lead, inputs, inputs)), cross, np.zeros((*lead, outputs)), 0, 0, bias)

    def __add__(self, other: "Gram") -> "Gram":
        """Return the Gram of both sets of rows.

        Raises:
            ValueError: they belong to layers of different shapes.
        """
        if (self.cross.shape, self.bias) != (other.cross.shape, other.bias):
            message = (
                f"Grams of X^T Y {self.cross.shape} with bias={self.bias} and {other.cross.shape} with "
                f"bias={other.bias} belong to different layers and cannot be added."
            )
            raise ValueError(message)
        with jax.enable_x64(True):
            return Gram(
                self.inputs + other.inputs,
                self.cross + other.cross,
                self.targets + other.targets,
                _count(self.rows) + _count(other.rows),
                _count(self.samples) + _count(other.samples),
                self.bias,
            )


def dot_gram(x: Any, y: Any, *, bias: bool, batched: bool = False, what: str = "the layer") -> Gram:
    """The Gram of a dense layer or a contraction from its inputs and outputs.

    Activations of any float dtype, sharded over samples or not, become float64 before they are multiplied: the Gram of
    float32 data in float32 is useless from cond(X) = 1e4. Under a trace values are not checked.

    Args:
        x: inputs, `[samples, ..., in]`.
        y: outputs, `[samples, ..., out]`, without the layer's bias or with it, as is to be fitted.
        bias: append the constant one to the columns of X.
        batched: the first axis of both, before samples, is one of groups.
        what: name of the layer for errors.

    Raises:
        ValueError: sizes that do not fit, no rows, or activations that are not finite; names `what`.

    Example:
        >>> total = dot_gram(x1, y1, bias=True) + dot_gram(x2, y2, bias=True)
        >>> fit = solve(total, prior, ridge=1e-2)
    """
    _check_sizes(np.shape(x)[:-1], np.shape(y)[:-1], what)
    with jax.enable_x64(True):
        arrays = _dot(jnp.asarray(x), jnp.asarray(y), bias, batched)
    lead = np.shape(x)[int(batched) : -1]
    return _finished(arrays, prod(lead), lead[0], bias, what)


def conv_gram(
    x: Any,
    y: Any,
    *,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool,
    positions: int | None = None,
    key: Array | None = None,
    what: str = "the layer",
) -> Gram:
    """The Gram of a convolution: every output position is a row, its columns are what the kernel sees there.

    Columns are ordered like the rows of a kernel `[*window, in, out]` reshaped to `[prod(window) * in, out]`, the
    constant one last. For wide layers with strides of one no patches are made: see `permjax.merge.windows.shift_sums`.

    Args:
        x: inputs, channels last, `[samples, *spatial, groups * in]`.
        y: outputs, `[samples, *out, groups * n]`.
        window: sizes of the kernel, as many as there are spatial axes.
        strides: of the window.
        padding: numbers of zeros (low, high) at each spatial axis.
        dilation: of the kernel.
        groups: of channels; with more than one the Gram has a leading axis of groups.
        bias: append the constant one to the columns of X.
        positions: use only so many rows of every sample: output positions drawn from equal parts of the image, each
            as likely as the others, so that Gram / rows has the same expectation. Neighbours tell much the same, and
            the cost falls in proportion.
        key: for drawing positions; a new one for every batch.
        what: name of the layer for errors.

    Raises:
        ValueError: sizes that do not fit, positions without a key, or activations that are not finite; names `what`.
    """
    pads = tuple((int(low), int(high)) for low, high in padding)
    geometry = Window(tuple(window), tuple(strides), pads, tuple(dilation))
    _check_window(np.shape(x), np.shape(y), geometry, groups, what)
    count = prod(np.shape(y)[1:-1])
    picked = count if positions is None else min(positions, count)
    if picked < 1 or (picked < count and key is None):
        raise ValueError(f"Drawing {positions} positions of {what} takes a key and at least one position; give both.")
    with jax.enable_x64(True):
        key = key if picked < count else None
        arrays = _conv(jnp.asarray(x), jnp.asarray(y), key, geometry, groups, bias, picked)
    samples = np.shape(x)[0]
    return _finished(arrays, samples * picked, samples, bias, what)


def check_finite(gram: Gram, what: str = "the layer") -> None:
    """Check that the activations that went into a Gram were finite.

    Raises:
        ValueError: names `what`.
    """
    with jax.enable_x64(True):
        finite = _is_finite(gram.inputs, gram.targets)
    if not finite:
        message = (
            f"Activations of {what} are not finite: NaN, infinite or too large to be squared; check the models and "
            "the calibration data."
        )
        raise ValueError(message)


def save_grams(path: str | Path, grams: Mapping[str, Gram], metadata: Mapping[str, str] | None = None) -> None:
    """Write Grams by leaf name as safetensors: statistics that owners of data can share in place of it.

    Args:
        path: the file; the old one survives a failure.
        grams: leaf -> Gram.
        metadata: text to keep with them, such as what data and models they were taken from.
    """
    heads = {leaf: {"rows": int(g.rows), "samples": int(g.samples), "bias": g.bias} for leaf, g in grams.items()}
    arrays = {f"{n}/{leaf}": np.ascontiguousarray(getattr(g, n)) for leaf, g in grams.items() for n in _ARRAYS}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={**(metadata or {}), _HEADER: json.dumps(heads)})


def load_grams(path: str | Path) -> tuple[dict[str, Gram], dict[str, str]]:
    """Read the Grams and the metadata that `save_grams` wrote.

    Raises:
        ValueError: the file holds no Grams, or damaged ones.
    """
    try:
        with safe_open(path, "np") as handle:
            metadata = dict(handle.metadata() or {})
            heads = json.loads(metadata.pop(_HEADER))
            arrays = {leaf: {name: handle.get_tensor(f"{name}/{leaf}") for name in _ARRAYS} for leaf in heads}
        for leaf, parts in arrays.items():
            _check_loaded(leaf, **parts)
        grams = {leaf: Gram(**parts, **heads[leaf]) for leaf, parts in arrays.items()}
        for leaf, gram in grams.items():
            check_finite(gram, f"leaf '{leaf}'")
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"'{path}' holds no Grams of permjax ({error}); write them by `save_grams`.") from error
    return grams, metadata


@partial(jax.jit, static_argnums=(2, 3))
def _dot(x: Array, y: Array, bias: bool, batched: bool) -> Arrays:
    def one(pair: tuple[Array, Array]) -> Arrays:
        return _bordered(dot_sums(*pair), prod(pair[0].shape[:-1]), bias)

    return jax.lax.map(one, (x, y)) if batched else one((x, y))


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _conv(x: Array, y: Array, key: Array | None, window: Window, groups: int, bias: bool, picked: int) -> Arrays:
    """Return the arrays of a Gram; all positions are used without a key."""
    picks = None if key is None else pick_positions(key, x.shape[0], prod(y.shape[1:-1]), picked)

    def one(pair: tuple[Array, Array]) -> Arrays:
        found = conv_sums(*pair, window) if picks is None else sampled_sums(*pair, picks, window)
        return _bordered(found, x.shape[0] * picked, bias)

    if groups == 1:
        return one((x, y))
    parts = (v.reshape((*v.shape[:-1], groups, v.shape[-1] // groups)) for v in (x, y))
    return jax.lax.map(one, tuple(jnp.moveaxis(v, -2, 0) for v in parts))


def _bordered(sums: Sums, rows: int, bias: bool) -> Arrays:
    """Return X^T X, X^T Y and the squares of Y, with the constant column if asked."""
    inputs, cross, targets, x, y = sums
    if not bias:
        return whole(inputs), cross, targets
    corner = jnp.full((1, 1), rows, jnp.float64)
    return whole((inputs, x[:, None], corner)), jnp.concatenate([cross, y[None]]), targets


@jax.jit
def _is_finite(inputs: Array, targets: Array) -> Array:
    """Tell whether all sums of squares are finite; no product of two columns exceeds them."""
    return jnp.isfinite(jnp.diagonal(inputs, axis1=-2, axis2=-1)).all() & jnp.isfinite(targets).all()


def _finished(arrays: Arrays, rows: int, samples: int, bias: bool, what: str) -> Gram:
    gram = Gram(*arrays, rows, samples, bias)
    if not is_traced(*arrays):
        check_finite(gram, what)
    return gram


def _count(number: Any) -> Any:
    """Return a number as a Python integer, which cannot overflow, where it has a value."""
    return number if is_traced(number) else int(number)


def _check_sizes(x: tuple[int, ...], y: tuple[int, ...], what: str) -> None:
    if x != y or not prod(x):
        message = (
            f"Inputs and outputs of {what} must have the same samples and positions, and one or more, not {x} and {y}."
        )
        raise ValueError(message)


def _check_window(x: tuple[int, ...], y: tuple[int, ...], window: Window, groups: int, what: str) -> None:
    axes = len(x) - 2
    if any(len(part) != axes for part in window):
        message = f"Inputs {x} of {what} have {axes} spatial axes, but not so its {window}; give one entry per axis."
        raise ValueError(message)
    if x[-1] % groups or y[-1] % groups:
        message = f"Inputs {x} and outputs {y} of {what} do not split into {groups} groups of channels."
        raise ValueError(message)
    _check_sizes((x[0], *window.outputs(x[1:-1])), y[:-1], what)


def _check_loaded(leaf: str, inputs: np.ndarray, cross: np.ndarray, targets: np.ndarray) -> None:
    *lead, k, n = cross.shape
    shapes = inputs.shape, cross.shape, targets.shape
    if shapes != ((*lead, k, k), (*lead, k, n), (*lead, n)) or len(lead) > 1:
        raise ValueError(f"the shapes {shapes} of leaf '{leaf}' do not fit together")
    if any(a.dtype != np.float64 for a in (inputs, cross, targets)):
        raise ValueError(f"leaf '{leaf}' is not float64")
