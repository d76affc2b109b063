"""One contraction with a leaf in a merged network: done once, and only on the blocks that some model owns.

In canonical form the features come last: `y[..., out] = x[..., in] W[in, out]`, for convolutions
`x[samples, *spatial, in]` and `W[*window, in, out]`. Batch axes of the leaf (experts) come first, flattened into one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from permjax.action import flat_factors
from permjax.merge.wide import Wide, mean_units, pick
from permjax.symmetry.program import Ref, Use
from permjax.symmetry.spec import Axis, Fixed, Product


class Piece(NamedTuple):
    """Outputs that some models own together, and the inputs that any of these models has."""

    owners: tuple[bool, ...]
    columns: Int[np.ndarray, " inputs"]
    outputs: Int[np.ndarray, " outputs"]


class Window(NamedTuple):
    """What a convolution does in space; paddings are pairs (low, high)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    base: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Contraction:
    """One use of a leaf, as it is done in a merged network; made by `contraction`.

    Attributes:
        wide: the geometry of the merged network.
        ref: the leaf.
        eqn: the equation.
        side: which operand the leaf is.
        ins: axes of the leaf (as it stands in the equation) that are contracted.
        outs: axes that make the output features.
        batch: axes that both operands have.
        in_axis: tree of the input features.
        out_axis: tree of the output features.
        batch_axis: tree of the batch axes, or of the feature groups of a grouped convolution.
        groups: number of feature groups in the merged network, 1 but for grouped convolutions.
        window: for convolutions.
    """

    wide: Wide
    ref: Ref
    eqn: Any
    side: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    batch: tuple[int, ...]
    in_axis: Axis
    out_axis: Axis
    batch_axis: Axis
    groups: int = 1
    window: Window | None = None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The blocks in which the outputs are computed: everything outside them is zero."""
        owners = self.wide.owners(self.in_axis)
        if self.groups > 1 or self.wide.touches(self.batch_axis):
            return (Piece((True,) * self.wide.models, np.arange(owners.shape[1]), np.arange(self.out_size)),)
        return tuple(
            Piece(s.owners, np.flatnonzero(owners[np.asarray(s.owners)].any(0)), s.positions)
            for s in self.wide.segments(self.out_axis)
        )

    @property
    def out_size(self) -> int:
        """Number of output features of the merged network."""
        return self.wide.wide_spec.size(self.out_axis)

    # -- inputs and outputs --------------------------------------------------------------------------------------

    def inputs(self, others: Sequence[Any], models: Sequence[int]) -> Any:
        """Return the input of the merged network: the mean over the views `others` of these models, canonical."""
        views = [self._input(other) for other in others]
        if self.window is not None:
            return mean_units(self.wide, self._features, views, models, -1)
        if self.batch and self.wide.touches(self.batch_axis):
            return mean_units(self.wide, self.batch_axis, views, models, 0)
        return mean_units(self.wide, self.in_axis, views, models, -1)

    def output(self, result: Any) -> Any:
        """Return the result of the equation for a model in canonical form."""
        if self.window is not None:
            batch, feature, *spatial = self.eqn.params["dimension_numbers"].out_spec
            return result.transpose(batch, *spatial, feature)
        lead, free = len(self.batch), len(self.outs)
        if self.side == 0:  # batch, leaf, rest
            order = (*range(lead), *range(lead + free, result.ndim), *range(lead, lead + free))
            result = result.transpose(order)
        rest = result.shape[lead : result.ndim - free]
        return result.reshape((*self._flat(result.shape[:lead]), *rest, prod(result.shape[result.ndim - free :])))

    def results(self, y: Any, models: Sequence[int]) -> list[Any]:
        """Return what the equation gives in the view of every model; one and the same object where views agree."""
        if self.wide.touches(self.out_axis) or self.wide.touches(self.batch_axis):
            return [self.result(y, m) for m in models]
        return [self.result(y, models[0])] * len(models)

    def result(self, y: Any, model: int) -> Any:
        """Return what the equation gives in the view of a model, of the merged network's canonical output."""
        if self.wide.touches(self.out_axis):
            y = pick(y, self.wide.index(self.out_axis, model), -1)
        if self.window is not None:
            batch, feature, *spatial = self.eqn.params["dimension_numbers"].out_spec
            return y.transpose(tuple(np.argsort((batch, *spatial, feature))))
        if self.batch and self.wide.touches(self.batch_axis):
            y = pick(y, self.wide.index(self.batch_axis, model), 0)
        lead, free = ([self._size(i, model) for i in axes] for axes in (self.batch, self.outs))
        rest = y.shape[1 if self.batch else 0 : -1]
        y = y.reshape((*lead, *rest, *free))
        if self.side == 0:
            first = len(lead) + len(rest)
            y = y.transpose((*range(len(lead)), *range(first, y.ndim), *range(len(lead), first)))
        return y

    def multiply(self, x: Any, leaf: Any) -> Any:
        """Return the canonical output of the merged network for its canonical input, block by block."""
        weight = self.weight(leaf)
        parts = [
            self._product(pick(x, p.columns, -1), pick(pick(weight, p.columns, -2), p.outputs, -1))
            if self.groups == 1 else self._product(x, weight)
            for p in self.pieces
        ]  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        order = np.concatenate([p.outputs for p in self.pieces])
        joined = jnp.concatenate(parts, axis=-1)
        if len(order) < self.out_size:  # positions that nobody owns
            shape = (*joined.shape[:-1], self.out_size)
            return jnp.zeros(shape, joined.dtype).at[..., order].set(joined)
        return pick(joined, np.argsort(order), -1)

    # -- weights -------------------------------------------------------------------------------------------------

    def weight(self, leaf: Any) -> Any:
        """Return the canonical weights `[in, out]`, `[batch, in, out]` or `[*window, in, out]` of a wide leaf."""
        value = self.ref.of(leaf)
        if self.window is not None:
            out, into, *spatial = self.eqn.params["dimension_numbers"].rhs_spec
            return value.transpose((*spatial, into, out))
        sizes = [[value.shape[i] for i in axes] for axes in (self.batch, self.ins, self.outs)]
        value = value.transpose((*self.batch, *self.ins, *self.outs))
        return value.reshape((*self._flat(sizes[0]), prod(sizes[1]), prod(sizes[2])))

    def stored(self, weight: np.ndarray, leaf: np.ndarray) -> np.ndarray:
        """Return a copy of a wide leaf (NumPy) in which this use finds the given canonical weights."""
        leaf = np.array(leaf)
        picked = dict(self.ref.at)
        part = leaf[tuple(picked.get(i, slice(None)) for i in range(leaf.ndim))]
        left = sorted(self.ref.axes)
        part = part.transpose([left.index(i) for i in self.ref.axes])
        if self.window is not None:
            out, into, *spatial = self.eqn.params["dimension_numbers"].rhs_spec
            order = (*spatial, into, out)
        else:
            order = (*self.batch, *self.ins, *self.outs)
        part = part.transpose(order)
        part[...] = weight.reshape(part.shape)
        return leaf

    # -- details -------------------------------------------------------------------------------------------------

    @property
    def _features(self) -> Axis:
        return Product((self.batch_axis, self.in_axis))

    def _size(self, place: int, model: int) -> int:
        tree = self.wide.spec.leaf(self.ref.leaf).axes[self.ref.axes[place]]
        return self.wide.sources[model].size(tree)

    def _flat(self, sizes: Sequence[int]) -> tuple[int, ...]:
        return (prod(sizes),) if self.batch else ()

    def _input(self, other: Any) -> Any:
        if self.window is not None:
            batch, feature, *spatial = self.eqn.params["dimension_numbers"].lhs_spec
            return other.transpose(batch, *spatial, feature)
        contracted, batch = (d[1 - self.side] for d in self.eqn.params["dimension_numbers"])
        rest = [i for i in range(other.ndim) if i not in contracted and i not in batch]
        sizes = [[other.shape[i] for i in axes] for axes in (batch, rest, contracted)]
        other = other.transpose((*batch, *rest, *contracted))
        return other.reshape((*self._flat(sizes[0]), *sizes[1], prod(sizes[2])))

    def _product(self, x: Any, weight: Any) -> Any:
        params = self.eqn.params
        kept = {k: params[k] for k in ("precision", "preferred_element_type")}
        if self.window is None:
            lead = ((0,), (0,)) if self.batch else ((), ())
            return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 2,)), lead), **kept)
        n = x.ndim
        same = (0, n - 1, *range(1, n - 1))
        numbers = jax.lax.ConvDimensionNumbers(same, (n - 1, n - 2, *range(n - 2)), same)
        w = self.window
        return jax.lax.conv_general_dilated(
            x, weight, w.strides, w.padding, w.base, w.dilation, numbers, self.groups, **kept
        )


def contraction(wide: Wide, use: Use) -> Contraction:
    """Return how a use of a leaf is done in a merged network.

    Raises:
        ValueError: names the leaf and the group that cannot be widened there.
    """
    trees = [wide.spec.leaf(use.ref.leaf).axes[i] for i in use.ref.axes]
    found = _convolution(wide, use, trees) if "window_strides" in use.eqn.params else _dot(wide, use, trees)
    if wide.touches(found.batch_axis) and (
        wide.touches(found.in_axis) or (found.window is None and wide.touches(found.out_axis))
    ):
        message = (
            f"leaf '{use.ref.leaf}' holds a separate matrix for every unit of a group that is widened, and these "
            "matrices would be widened as well; keep one of the groups whole (ratio 0)."
        )
        raise ValueError(message)
    return found


def _dot(wide: Wide, use: Use, trees: list[Axis]) -> Contraction:
    contracted, batch = (tuple(int(i) for i in d[use.side]) for d in use.eqn.params["dimension_numbers"])
    outs = tuple(i for i in range(len(trees)) if i not in contracted and i not in batch)
    into, out, around = (Product(tuple(trees[i] for i in places)) for places in (contracted, outs, batch))
    return Contraction(wide, use.ref, use.eqn, use.side, contracted, outs, batch, into, out, around)


def _convolution(wide: Wide, use: Use, trees: list[Axis]) -> Contraction:
    params = use.eqn.params
    out, into, *spatial = params["dimension_numbers"].rhs_spec
    count, leaf = params["feature_group_count"], use.ref.leaf
    if use.side == 0 or params["batch_group_count"] > 1:
        raise ValueError(f"leaf '{leaf}' stands where an image should, or in a convolution grouped over the batch.")
    outer = _outer(wide, trees[out], count)
    if outer is None and (wide.touches(trees[out]) or wide.touches(trees[into])):
        raise ValueError(f"leaf '{leaf}' is a convolution in {count} groups that are no units of its own; keep whole.")
    window = Window(
        tuple(wide.spec.size(trees[i]) for i in spatial),
        *(tuple(params[k]) for k in ("window_strides", "padding", "rhs_dilation", "lhs_dilation")),
    )
    groups = count if outer is None else wide.wide_spec.size(outer)
    around = Fixed(count) if outer is None else outer
    return Contraction(wide, use.ref, use.eqn, 1, (into,), (out,), (), trees[into], trees[out], around, groups, window)


def _outer(wide: Wide, axis: Axis, count: int) -> Axis | None:
    """Return the leading factors of an axis that number the groups of a grouped convolution."""
    factors = flat_factors(axis)
    for i in range(len(factors) + 1):
        if prod(wide.spec.size(f) for f in factors[:i]) == count:
            return Product(factors[:i])
    return None
