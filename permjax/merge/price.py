"""The cost of a merged network as a function of the ratios, quick to evaluate for many choices at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from permjax.merge.budget import live_and_stored, owned_entries, stored_leaves
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.work import Work


@dataclass(frozen=True)
class Polynomial:
    """A sum of products of named variables: the variables of every product, in order, and its coefficient."""

    terms: Mapping[tuple[str, ...], float | int]

    def __add__(self, other: "Polynomial | float | int") -> "Polynomial":
        """Return the sum."""
        return Polynomial(_collected([*self.terms.items(), *_terms(other).items()]))

    def __mul__(self, other: "Polynomial | float | int") -> "Polynomial":
        """Return the product."""
        pairs = product(self.terms.items(), _terms(other).items())
        return Polynomial(_collected((tuple(sorted(one + two)), a * b) for (one, a), (two, b) in pairs))

    __radd__, __rmul__ = __add__, __mul__


class Price(NamedTuple):
    """Cost relative to one parent, as a polynomial in ratios and steps for products of activations.

    Attributes:
        groups: the groups that may choose their ratio.
        sizes: their number of units.
        coefficients: of every product of ratios.
        places: which ratios make the product; the number of groups stands for one.
        extra: what every product of activations costs more once one of its groups is widened.
        switches: which groups do so.
    """

    groups: tuple[str, ...]
    sizes: Int[np.ndarray, " groups"]
    coefficients: Float[np.ndarray, " terms"]
    places: Int[np.ndarray, "terms degree"]
    extra: Float[np.ndarray, " products"]
    switches: Bool[np.ndarray, "products groups"]

    def __call__(self, ratios: Float[np.ndarray, "*batch groups"]) -> Float[np.ndarray, "*batch"]:
        """Return the relative cost at some ratios."""
        widened = ((ratios[..., None, :] > 0) & self.switches).any(-1)
        factors = np.concatenate([ratios, np.ones((*ratios.shape[:-1], 1))], -1)[..., self.places]
        return np.asarray(factors.prod(-1) @ self.coefficients + widened @ self.extra)


def flops_price(contractions: Sequence[Work], spec: PermutationSpec, models: int, fixed: Mapping[str, float]) -> Price:
    """Return the price in FLOPs without zero blocks; `fixed` groups have the ratio 0 or 1 given there."""
    steps = [(work.multiply_adds, work.groups) for work in contractions if work.leaf is None]
    uses = [(w.leaf, w.multiply_adds / prod(spec.leaf(w.leaf).shape)) for w in contractions if w.leaf is not None]
    return _price(spec, models, fixed, _collected(uses), steps, stored=False)


def params_price(spec: PermutationSpec, models: int, fixed: Mapping[str, float]) -> Price:
    """Return the price in stored parameters, zero blocks included."""
    return _price(spec, models, fixed, dict.fromkeys(stored_leaves(spec), 1.0), [], stored=True)


def _price(
    spec: PermutationSpec,
    models: int,
    fixed: Mapping[str, float],
    uses: Mapping[str, float | int],
    steps: Iterable[tuple[int, tuple[str, ...]]],
    stored: bool,
) -> Price:
    everyone = (1 << models) - 1

    def units(name: str) -> dict[int, Any]:
        group = spec.group(name)
        if group.per or name not in spec:
            return {everyone: group.size}
        ratio = fixed.get(name, Polynomial({(name,): 1.0}))
        return {everyone: group.size + -group.size * ratio} | {1 << m: group.size * ratio for m in range(models)}

    total, parent = Polynomial({}), 0.0
    for name, count in uses.items():
        entries = live_and_stored(owned_entries(spec.leaf(name), units, everyone))
        total, parent = total + entries[stored] * count, parent + prod(spec.leaf(name).shape) * count
    names = tuple(g.name for g in spec.groups if not g.per and g.name not in fixed)
    extra, switches = [], []
    for multiply_adds, groups in steps:
        parent += multiply_adds
        apart = any(fixed.get(g, 0) > 0 for g in groups)
        total = total + multiply_adds * (models if apart else 1)
        extra.append(0 if apart else multiply_adds * (models - 1))
        switches.append([g in groups for g in names])
    if not parent:
        raise ValueError("the program has no contraction whose cost could be counted; give a budget in `params`.")
    sizes = np.array([spec.group(g).size for g in names], np.int64)
    steepness = np.array(extra, float) / parent, np.array(switches, bool).reshape(len(extra), len(names))
    return Price(names, sizes, *_arrays(total, names, parent), *steepness)


def _arrays(total: Polynomial, names: tuple[str, ...], parent: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coefficients and places of a polynomial."""
    degree = max((len(term) for term in total.terms), default=0)
    places = [[*map(names.index, term), *[len(names)] * (degree - len(term))] for term in total.terms]
    return np.array([*total.terms.values()], float) / parent, np.array(places, int).reshape(len(total.terms), degree)


def _collected(pairs: Iterable[tuple[Any, float | int]]) -> dict[Any, float | int]:
    """Add up the numbers of each key."""
    found: dict[Any, float | int] = {}
    for key, number in pairs:
        found[key] = found.get(key, 0) + number
    return found


def _terms(value: "Polynomial | float | int") -> Mapping[tuple[str, ...], float | int]:
    return value.terms if isinstance(value, Polynomial) else {(): value}
