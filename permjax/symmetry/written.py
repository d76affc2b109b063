"""Specs as plain dicts for JSON, so that a file can say what the axes of its leaves are.

An axis tree is a number (fixed), a name (of a group), `{"product": [...]}` or `{"sum": [...]}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from permjax.symmetry.spec import Axis, Fixed, Group, Leaf, Of, PermutationSpec, Product, Sum


def spec_to_dict(spec: PermutationSpec) -> dict[str, Any]:
    """Return a spec as lists, text and numbers; why an axis is fixed, and how the spec was verified, is left out."""
    leaves = {
        leaf.name: {"shape": list(leaf.shape), "axes": [_written(axis) for axis in leaf.axes], "role": leaf.role}
        for leaf in spec.leaves
    }
    groups, indices = ([[g.name, g.size, list(g.per)] for g in some] for some in (spec.groups, spec.indices))
    return {"groups": groups, "indices": indices, "leaves": leaves}


def spec_from_dict(values: Mapping[str, Any]) -> PermutationSpec:
    """Return the spec that `spec_to_dict` wrote.

    Raises:
        ValueError: the values are no spec, or one that contradicts itself.
    """
    try:
        leaves = [
            Leaf(name, tuple(leaf["shape"]), tuple(map(_read, leaf["axes"])), leaf["role"])
            for name, leaf in values["leaves"].items()
        ]
        return PermutationSpec(_groups(values["groups"]), tuple(leaves), _groups(values["indices"]))
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"these values are no permutation spec ({type(error).__name__}: {error}).") from error


def _groups(rows: Sequence[Any]) -> tuple[Group, ...]:
    return tuple(Group(row[0], row[1], tuple(row[2])) for row in rows)


def _written(axis: Axis) -> Any:
    match axis:
        case Fixed(size):
            return size
        case Of(group):
            return group
        case Product(factors):
            return {"product": [_written(part) for part in factors]}
        case Sum(segments):
            return {"sum": [_written(part) for part in segments]}


def _read(value: Any) -> Axis:
    match value:
        case int():
            return Fixed(value)
        case str():
            return Of(value)
        case {"product": [*parts]}:
            return Product(tuple(map(_read, parts)))
        case {"sum": [*parts]}:
            return Sum(tuple(map(_read, parts)))
    raise TypeError(f"{value!r} is no axis")
