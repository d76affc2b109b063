"""One layer of a merged network as a least-squares problem: its inputs, its targets, its solution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from permjax.merge.contraction import Contraction
from permjax.merge.gram import Gram, conv_gram, dot_gram
from permjax.merge.ridge import Blocks
from permjax.merge.wide import Wide, mean_units


@dataclass(frozen=True, eq=False)
class Layer:
    """A contraction of the merged network together with the bias that is added to it.

    Attributes:
        contraction: the geometry.
        bias: name of the bias leaf, or None.
        constant: whether a constant is fitted at all; without a bias leaf it is dropped afterwards, as batch
            statistics that are estimated later make up for it.
    """

    contraction: Contraction
    bias: str | None
    constant: bool

    @property
    def wide(self) -> Wide:
        """The geometry of the merged network."""
        return self.contraction.wide

    @property
    def leaf(self) -> str:
        """Name of the leaf, with the position of loops over it."""
        ref = self.contraction.ref
        return ref.leaf + "".join(f"[{i}]" for _, i in ref.at)

    # -- targets -------------------------------------------------------------------------------------------------

    def target(self, results: Sequence[Any], biases: Sequence[Any], owner: Any | None) -> Any:
        """Return what the merged layer should give, canonical, of the results of the parents on the same samples.

        A unit shared by several models gets their mean, or what the `owner` of a sample gives (one model for each
        sample; the mean again where the owner has no part in the unit, and for leaves with batch axes).
        """
        outs = [self.own(result, bias) for result, bias in zip(results, biases, strict=True)]
        models = range(len(outs))
        c = self.contraction
        if owner is None or c.batch:
            return self._mean(outs, models)
        places = self.wide.owners(c.out_axis)
        each = [self._mean([out], [m]) for m, out in enumerate(outs)]
        chosen = (jnp.asarray(owner)[:, None] == jnp.arange(len(outs))[None]).astype(each[0].dtype)  # [samples, models]
        has = jnp.asarray(places, each[0].dtype)  # [models, out]
        owned = chosen @ has  # [samples, out]: whether the owner has the unit
        share = has / jnp.maximum(has.sum(0), 1)[None]
        total = jnp.zeros_like(each[0])
        for m, value in enumerate(each):
            weight = owned * chosen[:, m, None] + (1 - owned) * share[m][None]
            total = total + value * self._along(weight, value.shape)
        return total

    def only(self, result: Any, bias: Any, model: int) -> Any:
        """Return what one parent gives at its own places of the merged layer, canonical; zero elsewhere."""
        return self._mean([self.own(result, bias)], [model])

    def own(self, result: Any, bias: Any) -> Any:
        """Return the canonical output of one parent, bias included."""
        return self.with_bias(self.contraction.output(result), bias)

    def with_bias(self, out: Any, bias: Any) -> Any:
        """Return a canonical output with a bias added."""
        if bias is None:
            return out
        lead = (out.shape[0],) if self.contraction.batch else (1,)
        return out + jnp.asarray(bias, out.dtype).reshape((*lead, *(1,) * (out.ndim - 2), -1))

    def _mean(self, outs: Sequence[Any], models: Sequence[int]) -> Any:
        c = self.contraction
        if c.batch and self.wide.touches(c.batch_axis):
            return mean_units(self.wide, c.batch_axis, outs, models, 0)
        return mean_units(self.wide, c.out_axis, outs, models, -1)

    def _along(self, weight: Any, shape: tuple[int, ...]) -> Any:
        """Return `[samples, out]` so that it broadcasts against canonical outputs."""
        first = 1 if self.contraction.batch else 0
        samples, rows = weight.shape[0], shape[first]
        if rows % samples:
            raise ValueError(f"leaf '{self.leaf}': {rows} rows of activations do not divide among {samples} samples.")
        weight = jnp.repeat(weight, rows // samples, axis=0)
        return weight.reshape((1,) * first + (rows,) + (1,) * (len(shape) - first - 2) + (weight.shape[-1],))

    # -- statistics ----------------------------------------------------------------------------------------------

    def gram(self, x: Any, y: Any, *, positions: int | None = None, key: jax.Array | None = None) -> Gram:
        """Return the statistics of one batch of canonical inputs and targets."""
        c = self.contraction
        if c.window is None:
            return dot_gram(x, y, bias=self.constant, batched=bool(c.batch), what=f"the layer '{self.leaf}'")
        w = c.window
        return conv_gram(
            x,
            y,
            window=w.shape,
            strides=w.strides,
            padding=w.padding,
            dilation=w.dilation,
            groups=c.groups,
            bias=self.constant,
            positions=positions,
            key=key,
            what=f"the layer '{self.leaf}'",
        )

    # -- weights -------------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> Blocks | None:
        """Input columns and outputs of each block of the least-squares problem; None if it is one block."""
        c = self.contraction
        if c.groups > 1 or (len(c.pieces) == 1 and len(c.pieces[0].outputs) == c.out_size):
            return None
        taps = prod(c.window.shape) if c.window else 1
        width, found = self.wide.wide_spec.size(c.in_axis), []
        for piece in c.pieces:
            columns = (np.arange(taps)[:, None] * width + piece.columns[None]).reshape(-1)
            found.append((np.append(columns, taps * width) if self.constant else columns, piece.outputs))
        nobodys = np.setdiff1d(np.arange(c.out_size), np.concatenate([outputs for _, outputs in found]))
        return [*found, (np.zeros(0, int), nobodys)]

    def matrix(self, named: Mapping[str, Any]) -> Float[np.ndarray, "*groups k n"]:
        """Return the weights of this layer as the matrix that is fitted, the constant in the last row."""
        c = self.contraction
        weight = np.asarray(c.weight(np.asarray(named[c.ref.leaf], np.float64)), np.float64)
        if c.window is not None:
            weight = weight.reshape((-1, weight.shape[-1]))
            if c.groups > 1:
                weight = weight.reshape((len(weight), c.groups, -1)).transpose(1, 0, 2)
        if not self.constant:
            return weight
        shape = (*weight.shape[:-2], 1, weight.shape[-1])
        found = self._bias(named)
        bias = np.zeros(shape) if found is None else np.asarray(found, np.float64).reshape(shape)
        return np.concatenate([weight, bias], axis=-2)

    def stored(self, matrix: Float[np.ndarray, "*groups k n"], named: dict[str, Any]) -> dict[str, Any]:
        """Return the leaves that hold a fitted matrix."""
        c = self.contraction
        weight = matrix[..., :-1, :] if self.constant else matrix
        found = {}
        if self.bias is not None and self.constant:
            bias = np.array(named[self.bias])
            place = self._bias_place(bias.ndim)
            bias[place] = matrix[..., -1, :].reshape(bias[place].shape)
            found[self.bias] = bias
        if c.groups > 1:
            weight = weight.transpose(1, 0, 2).reshape((weight.shape[1], -1))
        found[c.ref.leaf] = c.stored(weight, named[c.ref.leaf])
        return found

    def biases(self, models: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the bias of this layer in every parent."""
        return [self._bias(named) for named in models]

    def _bias(self, named: Mapping[str, Any]) -> np.ndarray | None:
        if self.bias is None:
            return None
        bias = np.asarray(named[self.bias])
        return bias[self._bias_place(bias.ndim)]

    def _bias_place(self, rank: int) -> tuple[Any, ...]:
        at = dict(self.contraction.ref.at)
        return tuple(at.get(i, slice(None)) for i in range(rank)) if at else (slice(None),) * rank
