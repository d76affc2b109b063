"""Assignment of groups within groups: the best order of heads, where every pair of heads has its own best inside.

Arrays here have named axes: `(group, 0)` counts the anchor's units, `(group, 1)` the other model's. A kernel holds the
inner product of every anchor unit with every other unit; picking a permutation leaves only `(group, 0)`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from permjax.match.costs import growth
from permjax.permutation import is_traced, namespace

Label: TypeAlias = tuple[str, int]
_ROUNDS = 10  # upper limit for groups that are solved in turn
_TRACED_ROUNDS = 3  # all of them are made, because under a trace nothing tells when to stop
_RTOL = 1e-6  # smallest relative gain that float32 kernels can tell from none


class Named(NamedTuple):
    """An array with a label for every axis."""

    labels: tuple[Label, ...]
    values: Any


class Nest(NamedTuple):
    """What every step of the recursion needs.

    Attributes:
        per: group -> the groups that index it.
        assign: `assign(costs [..., n, n], what=...) -> assignments [..., n]`; `what` names the group.
    """

    per: Mapping[str, tuple[str, ...]]
    assign: Callable[..., Any]


def solve_nested(nest: Nest, kernels: Sequence[Named], group: str, lifted: tuple[str, ...] = ()) -> dict[str, Named]:
    """Return the best rows of a group and of all groups below it, given kernels that hold no other free group.

    Where groups lie below, every pair of units is first given its own best inner assignment, by the same function on
    the slices; the value that it attains is the pair's score. Exact if the groups below share no kernel.
    """
    labels = _labels(nest, group, lifted)
    inside = [k for k in kernels if _free(k) - {group, *lifted}]
    scores = [total(k, labels) for k in kernels if not _free(k) - {group, *lifted}]
    rows: dict[str, Named] = {}
    if inside:
        rows, value = _solve_forest(nest, inside, labels, (*lifted, group))
        scores.append(value)
    own = Named(labels[:-1], nest.assign(reduce(add, scores), what=f"the cost of group '{group}'"))
    return {group: own} | {name: pick(row, group, own) for name, row in rows.items()}


def assigned(nest: Nest, kernels: Sequence[Named], root: str) -> dict[str, np.ndarray]:
    """Return the best permutations `[*per, n]` of a root group and of those below it; none if staying is as good.

    The gain is compared with what the units that would change are worth, so that small units count as large ones do.
    """
    rows = solve_nested(nest, kernels, root)
    found = {g: np.asarray(total(row, tuple((h, 0) for h in (*nest.per[g], g)))) for g, row in rows.items()}
    if all(stays(p) for p in found.values()):
        return {}
    still = {g: Named(((g, 0),), np.arange(p.shape[-1], dtype=np.int32)) for g, p in found.items()}
    units = tuple((h, 0) for h in (*nest.per[root], root))
    before, after = (np.asarray(attained(nest, kernels, r, units), np.float64) for r in (still, rows))
    at_stake = (abs(before) + abs(after))[before != after].sum()
    return found if (after - before).sum() > _RTOL * at_stake else {}


def stays(permutation: np.ndarray) -> bool:
    """Tell whether a permutation moves nothing."""
    return bool((permutation == np.arange(permutation.shape[-1])).all())


def pick(x: Named, group: str, rows: Named) -> Named:
    """Keep, of the axis `(group, 1)`, for each unit of `(group, 0)` the one that `rows` assigns to it."""
    axis = x.labels.index((group, 1))
    index = spread(rows, x.labels)
    values = namespace(x.values, index).take_along_axis(x.values, index, axis=axis).squeeze(axis)
    return Named((*x.labels[:axis], *x.labels[axis + 1 :]), values)


def total(x: Named, labels: tuple[Label, ...]) -> Any:
    """Sum over all axes but `labels`, and return the values in their order."""
    out = tuple(i for i, label in enumerate(x.labels) if label not in labels)
    kept = [label for label in x.labels if label in labels]
    values = x.values.sum(out) if out else x.values
    return values.transpose([kept.index(label) for label in labels])


def spread(x: Named, labels: tuple[Label, ...]) -> Any:
    """Return the values with axes in the order of `labels`, of size 1 where `x` has none."""
    places = [labels.index(label) for label in x.labels]
    sizes = dict(zip(places, x.values.shape, strict=True))
    ordered = x.values.transpose(sorted(range(len(places)), key=places.__getitem__))
    return ordered.reshape([sizes.get(i, 1) for i in range(len(labels))])


def attained(nest: Nest, kernels: Sequence[Named], rows: Mapping[str, Named], labels: tuple[Label, ...] = ()) -> Any:
    """Return what all kernels together attain at these rows, over the axes `labels`."""
    return reduce(add, (total(settle(nest, k, rows), labels) for k in kernels))


def settle(nest: Nest, kernel: Named, rows: Mapping[str, Named], but: frozenset[str] = frozenset()) -> Named:
    """Pick the rows of every group of the kernel, outer groups first, except those in `but`."""
    names = [name for name, side in kernel.labels if side == 1 and name in rows and name not in but]
    for name in sorted(names, key=lambda g: len(nest.per[g])):
        kernel = pick(kernel, name, rows[name])
    return kernel


def _solve_forest(
    nest: Nest, kernels: list[Named], outer: tuple[Label, ...], lifted: tuple[str, ...]
) -> tuple[dict[str, Named], Any]:
    """Return the best rows of all groups that are not lifted, and their value over the axes `outer`.

    Groups that share a kernel are solved in turn: once from nothing, each seeing only kernels whose other groups are
    settled, and once from the identity; every element of the batch keeps the better end.
    """
    names = frozenset().union(*(_free(k) for k in kernels)) - set(lifted)
    tops = {name: _tops(nest, name, names) for name in names}
    parts = [(k.values.size, frozenset().union(*(tops[g] for g in _free(k) & names))) for k in kernels]
    coupled = any(len(groups) > 1 for _, groups in parts)
    identity = {g: Named(((g, 0),), np.arange(_size(kernels, g), dtype=np.int32)) for g in names}
    traced = is_traced(*(k.values for k in kernels))
    rounds = _TRACED_ROUNDS if traced else _ROUNDS

    def alternate(placed: frozenset[str]) -> tuple[dict[str, Named], Any]:
        rows, value = dict(identity), None
        for _ in range(rounds if coupled else 1):
            for top in growth(parts):
                own = frozenset(name for name in names if top in tops[name])
                seen = [(k, groups) for k, (_, groups) in zip(kernels, parts, strict=True) if top in groups]
                known = [k for k, groups in seen if groups - {top} <= placed] or [k for k, _ in seen]
                rows |= solve_nested(nest, [settle(nest, k, rows, own) for k in known], top, lifted)
                placed |= {top}
            before, value = value, attained(nest, kernels, rows, outer)
            if before is None or traced:
                continue
            if not bool((value > before + _RTOL * abs(before)).any()):
                break
        return rows, value

    grown = alternate(frozenset())
    return _better(outer, grown, alternate(names)) if coupled else grown


def _better(outer: tuple[Label, ...], first: tuple, second: tuple) -> tuple[dict[str, Named], Any]:
    (one, ahead), (two, behind) = first, second
    xp = namespace(ahead, behind)
    wins = Named(outer, ahead > behind)
    rows = {
        name: Named(row.labels, xp.where(spread(wins, row.labels), row.values, spread(two[name], row.labels)))
        for name, row in one.items()
    }
    return rows, xp.maximum(ahead, behind)


def _labels(nest: Nest, group: str, lifted: tuple[str, ...]) -> tuple[Label, ...]:
    """The axes of a group's cost: pairs of lifted outer units, settled outer units, then its own two."""
    outer = [(g, side) for g in nest.per[group] for side in ((0, 1) if g in lifted else (0,))]
    return (*outer, (group, 0), (group, 1))


def _free(kernel: Named) -> frozenset[str]:
    """Groups of which the kernel holds every pair of units."""
    return frozenset(name for name, side in kernel.labels if side == 1)


def _tops(nest: Nest, group: str, names: frozenset[str]) -> frozenset[str]:
    """Groups among `names` that are above `group` and below no other; itself if there are none."""
    above = names & set(nest.per[group])
    return frozenset(g for g in above if not above & set(nest.per[g])) or frozenset({group})


def _size(kernels: list[Named], group: str) -> int:
    return next(k.values.shape[k.labels.index((group, 1))] for k in kernels if (group, 1) in k.labels)
