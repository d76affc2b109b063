"""What a merged network costs, with and without its zero blocks.

Every entry of a wide leaf is used as often as an entry of a parent's leaf. An entry exists if some model owns it, that
is, has a unit at its position on every axis. If M models keep shares r and s separate on the two axes of a leaf, it has
`1 + (M - 1) (r + s - r s)` times the entries of a parent's, among `(1 + (M - 1) r) (1 + (M - 1) s)` stored ones.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from permjax.merge.wide import Wide
from permjax.plan import Plan
from permjax.symmetry.spec import Axis, Fixed, Leaf, Of, PermutationSpec, Product, Sum
from permjax.symmetry.work import Work

Owned: TypeAlias = dict[int, Any]
"""Owners, one bit for each model -> how many positions of an axis, or entries of a leaf, are theirs alone together."""


class Cost(NamedTuple):
    """Costs of a merged network and of one parent.

    Attributes:
        flops: two for every multiply-add of a contraction or convolution, without zero blocks.
        dense_flops: the same with zero blocks.
        params: entries of leaves of role weight and statistic, without zero blocks.
        dense_params: the same as they are stored.
        parent_flops: `flops` of one parent.
        parent_params: `params` of one parent.
    """

    flops: int
    dense_flops: int
    params: int
    dense_params: int
    parent_flops: int
    parent_params: int

    @property
    def relative(self) -> dict[str, float]:
        """Every cost of the merged network as a multiple of that of one parent."""
        flops, params = max(self.parent_flops, 1), max(self.parent_params, 1)
        return {
            "flops": self.flops / flops,
            "dense_flops": self.dense_flops / flops,
            "params": self.params / params,
            "dense_params": self.dense_params / params,
        }


def cost(contractions: Sequence[Work], spec: PermutationSpec, plan: Plan) -> Cost:
    """Return what the network that a plan describes costs.

    A product of two activations costs as much as in one parent if no group on it is widened, else it is computed for
    every model.

    Args:
        contractions: see `permjax.symmetry.work.contractions`.
        spec: the symmetry of the models.
        plan: a plan over the aligned models.

    Raises:
        ValueError: the plan is not one over aligned models of this spec.

    Example:
        >>> cost(contractions(apply, spec, params, x), spec, partial_plan(spec, ratios={"w1:1": 0.5})).relative["flops"]

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS", CVPR 2025, section 3.3: `1 + r + s - r s` for two models.
    """
    wide = Wide(spec, plan)
    everyone = (1 << wide.models) - 1
    units = {g.name: _owned_units(wide, g.name) for g in (*spec.groups, *spec.indices)}
    entries = {leaf.name: owned_entries(leaf, units.__getitem__, everyone) for leaf in spec.leaves}
    flops = [0, 0, 0]
    for work in contractions:
        one = 2 * work.multiply_adds
        if work.leaf is None:
            both = one * (wide.models if wide.widened & set(work.groups) else 1)
            found = (both, both, one)
        else:
            size = prod(spec.leaf(work.leaf).shape)
            live, stored = live_and_stored(entries[work.leaf])
            found = (one * live // size, one * stored // size, one)
        flops = [a + b for a, b in zip(flops, found, strict=True)]
    names = stored_leaves(spec)
    params, dense = (sum(column) for column in zip(*(live_and_stored(entries[name]) for name in names), strict=True))
    return Cost(flops[0], flops[1], params, dense, flops[2], sum(prod(spec.leaf(name).shape) for name in names))


def stored_leaves(spec: PermutationSpec) -> tuple[str, ...]:
    """Return the leaves that count as parameters: those of role weight and statistic."""
    return tuple(leaf.name for leaf in spec.leaves if leaf.role != "frozen")


def owned_entries(leaf: Leaf, units: Callable[[str], Owned], everyone: int) -> Owned:
    """Return how many entries of a leaf belong to which models; owner 0 means a zero block.

    Args:
        leaf: the leaf.
        units: group -> owners of its units. Numbers, or anything that can be added and multiplied.
        everyone: the owners that are all models.
    """
    return reduce(_both, (_owned(axis, units, everyone) for axis in leaf.axes), {everyone: 1})


def live_and_stored(entries: Owned) -> tuple[Any, Any]:
    """Return how many entries some model owns, and how many there are."""
    return sum(n for owners, n in entries.items() if owners), sum(entries.values())


def _owned(axis: Axis, units: Callable[[str], Owned], everyone: int) -> Owned:
    match axis:
        case Fixed(size):
            return {everyone: size}
        case Of(group):
            return units(group)
        case Product(factors):
            return reduce(_both, (_owned(f, units, everyone) for f in factors), {everyone: 1})
        case Sum(segments):
            return _summed((o, n) for s in segments for o, n in _owned(s, units, everyone).items())


def _both(a: Owned, b: Owned) -> Owned:
    """Return the owners of pairs of positions: those of both."""
    return _summed((p & q, m * n) for p, m in a.items() for q, n in b.items())


def _summed(pairs: Iterable[tuple[int, Any]]) -> Owned:
    found: Owned = {}
    for owners, count in pairs:
        found[owners] = found[owners] + count if owners in found else count
    return found


def _owned_units(wide: Wide, group: str) -> Owned:
    bits = 1 << np.arange(wide.models)
    owners, counts = np.unique(bits @ wide.owners(Of(group)), return_counts=True)
    return dict(zip(owners.tolist(), counts.tolist(), strict=True))
