"""Adapters as values: low-rank updates of modules, and the rank-one pieces of one module of several adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax.permutation import namespace


class Factors(NamedTuple):
    """The update of one module, `delta = b @ a`; scales such as `lora_alpha / r` are already in the factors.

    Attributes:
        a: `[rank, in]`; kernels of convolutions are flattened to `in * height * width`.
        b: `[out, rank]`.
    """

    a: Any
    b: Any


Adapter: TypeAlias = Mapping[str, Factors]
"""A LoRA adapter: module name -> `Factors`. A plain pytree."""


def module_names(adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """The modules of all adapters, in the order in which the adapters have them."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter))


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["ranks"])
@dataclass(frozen=True)
class Pool:
    """The rank-one pieces (minimal semantic units) of one module of T adapters: piece j is the matrix `b[:, j] a[j]`.

    Attributes:
        a: `[pieces, in]`, the factors of all adapters one after the other.
        b: `[out, pieces]`.
        ranks: how many pieces each adapter has; zero for one without this module.
    """

    a: Any
    b: Any
    ranks: tuple[int, ...]

    @property
    def owners(self) -> Int[np.ndarray, " pieces"]:
        """The adapter that each piece comes from."""
        return np.repeat(np.arange(len(self.ranks)), self.ranks)

    def spread(self, weights: Any) -> Float[Array, " pieces"]:
        """The weight of every piece: that of its adapter."""
        return jnp.asarray(weights, self.a.dtype)[self.owners]

    def split(self) -> list[Factors]:
        """The factors of every adapter."""
        ends = np.cumsum((0, *self.ranks))
        return [Factors(self.a[i:j], self.b[:, i:j]) for i, j in pairwise(ends)]


class Merged(NamedTuple):
    """One module of a merged adapter.

    Attributes:
        a: `[rank, in]`.
        b: `[out, rank]`.
        labels: the cluster of every piece, `-1` for one that is left out; None where a method makes no clusters.
    """

    a: Any
    b: Any
    labels: Any = None


def padded(a: Any, b: Any, rank: int) -> Factors:
    """The same update with zeros up to `rank`; NumPy arrays stay NumPy."""
    more, xp = rank - a.shape[0], namespace(a, b)
    return Factors(xp.pad(a, ((0, more), (0, 0))), xp.pad(b, ((0, 0), (0, more)))) if more > 0 else Factors(a, b)
