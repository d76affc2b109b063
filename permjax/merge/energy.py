"""How much of what a layer computes a change of its weights disturbs: its energy, without a forward pass."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from permjax import tree
from permjax.merge.perplexity import Sentences
from permjax.symmetry.capture import LeafIO, capture
from permjax.symmetry.spec import PermutationSpec


@partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["axes"])
@dataclass(frozen=True)
class InputMoment:
    """What goes into one leaf.

    Attributes:
        matrix: `C = E[x x^T]` over the inputs of the leaf.
        axes: the axes of the leaf that are contracted with them.
    """

    matrix: Float[Array | np.ndarray, "*models inputs inputs"]
    axes: tuple[int, ...]


def input_moments(apply: Callable[..., Any], params: Any, data: Iterable) -> dict[str, InputMoment]:
    """The second moments of the inputs of every leaf that is contracted with its inputs, summed up in float64.

    Kernels of convolutions, leaves inside scans, and leaves that hold several matrices side by side are left out; of
    several uses of a leaf the first one counts.

    Args:
        apply: `apply(params, *inputs) -> outputs`.
        params: of the model.
        data: batches: `Sentences`, whose padding does not count, or inputs, several of them in a tuple.

    Raises:
        ValueError: there are no batches, or the inputs of a leaf are not finite; names the leaf.

    Example:
        >>> moments = input_moments(net.apply, params, probe["text"])
        >>> energies(params, edited, moments)
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}
    axes: dict[str, tuple[int, ...]] = {}
    for batch in data:
        inputs, mask = _inputs(batch)
        for name, (moment, count) in _sums(apply, params, inputs, mask).items():
            sums[name] = sums.get(name, 0.0) + np.asarray(moment.matrix, np.float64)
            counts[name] = counts.get(name, 0.0) + float(count)
            axes[name] = moment.axes
    if not counts:
        raise ValueError("data gave no batch with a leaf that is contracted with its inputs; give a list of batches.")
    if wrong := [name for name, total in sums.items() if not np.isfinite(total).all()]:
        raise ValueError(f"The inputs of leaf {wrong[0]!r} are not finite; look at the data and at the model.")
    return {name: InputMoment(sums[name] / max(counts[name], 1.0), axes[name]) for name in sums}


def _inputs(batch: Any) -> tuple[tuple[Any, ...], Any]:
    """The inputs of a batch, and where there is no padding, if there can be some."""
    if isinstance(batch, Sentences):
        return (batch.tokens,), batch.mask
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), None


@partial(jax.jit, static_argnames="apply")
def _sums(
    apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...], mask: Any
) -> dict[str, tuple[InputMoment, Float[Array, ""]]]:
    """Sums of x x^T over the inputs of every leaf, and their numbers."""
    shapes = {name: tuple(np.shape(leaf)) for name, leaf in tree.flatten(params).items()}
    used = capture(apply, PermutationSpec.from_axes(shapes, {}), params, *inputs).leaves
    return {
        name: _sum(io, mask)
        for name, io in used.items()
        if name in shapes and _is_plain(io, len(shapes[name])) and (mask is None or _rows(io) == mask.size)
    }


def _is_plain(io: LeafIO, ndim: int) -> bool:
    return io.kind == "dot" and not io.stacked and len(io.in_axes) + len(io.out_axes) == ndim


def _rows(io: LeafIO) -> int:
    return prod(io.input.shape[:-1])


def _sum(io: LeafIO, mask: Any) -> tuple[InputMoment, Float[Array, ""]]:
    x = io.input.reshape(_rows(io), io.input.shape[-1]).astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask.reshape(-1, 1), x, jnp.zeros_like(x))
    count = jnp.float32(len(x)) if mask is None else mask.sum().astype(jnp.float32)
    return InputMoment(jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST), io.in_axes), count


def energies(before: Any, after: Any, moments: Mapping[str, InputMoment]) -> dict[str, Float[Array, ""]]:
    """The energy of the change of every leaf whose inputs are known: sqrt(tr(dW C dW^T) / tr(W C W^T)).

    It is the root mean square of what the change adds to the outputs of a layer, relative to these outputs. Changes
    and models must be in the same coordinates: for a model whose units a matching has moved, undo that first,
    `permute(spec, invert(spec, permutations), after)`. Traceable.

    Args:
        before: the parameters W.
        after: the parameters W + dW.
        moments: leaf name -> C and the axes that are contracted with it; see `input_moments`.

    Returns:
        Leaf name -> energy; exactly 0 for a leaf that has not changed, NaN for one that is not finite.

    Raises:
        ValueError: a model has no leaf of that name, or C has another size than its axes; names the leaf.

    Example:
        >>> max(energies(params, edited, moments).values())
    """
    old, new = tree.flatten(before), tree.flatten(after)
    found = {}
    for name, moment in moments.items():
        _check(name, moment, old, new)
        same = old[name] is new[name]
        found[name] = jnp.float32(0.0) if same else _energy(old[name], new[name], moment)
    return found


def _check(name: str, moment: InputMoment, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for leaves in (old, new):
        if name not in leaves:
            raise ValueError(f"There are moments for leaf {name!r}, which a model has not{tree.nearest(name, leaves)}.")
    shape, size = np.shape(old[name]), moment.matrix.shape[-1]
    if max(moment.axes) >= len(shape) or prod(shape[i] for i in moment.axes) != size:
        message = f"The moments of leaf {name!r} are of {size} inputs along the axes {moment.axes}, but its shape is "
        raise ValueError(f"{message}{shape}; collect them with this model.")


@jax.jit
def _energy(old: Array, new: Array, moment: InputMoment) -> Float[Array, ""]:
    matrix = jnp.asarray(moment.matrix, jnp.float32)

    def power(weight: Array) -> Array:
        last = range(weight.ndim - len(moment.axes), weight.ndim)
        rows = jnp.moveaxis(weight, moment.axes, last).reshape(-1, len(matrix))
        return (jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST) * rows).sum()

    whole = old.astype(jnp.float32)
    change = power(new.astype(jnp.float32) - whole)
    return jnp.where(change == 0, jnp.zeros_like(change), jnp.sqrt(jnp.abs(change) / jnp.abs(power(whole))))
