"""A permutation symmetry as a static value: which axes of which leaves move together."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple, TypeAlias

Role: TypeAlias = Literal["weight", "statistic", "frozen"]


@dataclass(frozen=True)
class Fixed:
    """An axis, or a part of one, that nothing may permute; `reason` says which equation pinned it."""

    size: int
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class Of:
    """An axis, or a part of one, that carries the units of a group."""

    group: str


@dataclass(frozen=True)
class Product:
    """A product of parts, major to minor, as in `heads x head_dim`."""

    factors: tuple["Axis", ...]


@dataclass(frozen=True)
class Sum:
    """A concatenation of segments, as in a fused `q | k | v`."""

    segments: tuple["Axis", ...]


Axis: TypeAlias = Fixed | Of | Product | Sum


@dataclass(frozen=True)
class Group:
    """`size` interchangeable units, permuted separately for every index of the groups named in `per`."""

    name: str
    size: int
    per: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """Shape, axis trees and role of one array of the model."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    role: Role = "weight"


class Member(NamedTuple):
    """One place of a group: leaf name, axis, and the child indices that lead to it in the axis tree."""

    leaf: str
    axis: int
    path: tuple[int, ...]


class Verification(NamedTuple):
    """Relative change of the output under random permutations: in float64, in float32, and what was allowed."""

    float64: float
    float32: float
    tolerance: float


def children(axis: Axis) -> tuple[Axis, ...]:
    """Return the parts of a product or sum, and nothing for the end of a tree."""
    match axis:
        case Product(parts) | Sum(parts):
            return parts
        case _:
            return ()


def walk(axis: Axis, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Axis]]:
    """Yield every end of an axis tree with its path, major to minor."""
    if not children(axis):
        yield path, axis
    for i, child in enumerate(children(axis)):
        yield from walk(child, (*path, i))


def natural_key(text: str) -> tuple:
    """Sort key under which `h.2` precedes `h.10`."""
    return tuple((0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", text) if t)


@dataclass(frozen=True)
class PermutationSpec:
    """Every permutation symmetry of a model: groups, leaves with their axis trees, and fixed index groups.

    Attributes:
        groups: the groups that may be permuted.
        leaves: all leaves of the model, in tree order.
        indices: groups that never move but that others are `per`, such as a layer axis.
        unverified: groups of which no member, moved alone, changed the output when the spec was verified.
        verification: the verdict, or None if the spec was never verified.
    """

    groups: tuple[Group, ...]
    leaves: tuple[Leaf, ...]
    indices: tuple[Group, ...] = ()
    unverified: tuple[str, ...] = field(default=(), compare=False)
    verification: Verification | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_once("group", [g.name for g in (*self.groups, *self.indices)])
        _check_once("leaf", [leaf.name for leaf in self.leaves])
        for group in self.groups:
            _check_group(self, group)
        for leaf in self.leaves:
            _check_leaf(self, leaf)

    @cached_property
    def _groups(self) -> dict[str, Group]:
        return {g.name: g for g in (*self.groups, *self.indices)}

    @cached_property
    def _leaves(self) -> dict[str, Leaf]:
        return {leaf.name: leaf for leaf in self.leaves}

    @cached_property
    def _members(self) -> dict[str, tuple[Member, ...]]:
        found: dict[str, list[Member]] = {g.name: [] for g in self.groups}
        for leaf in self.leaves:
            for i, axis in enumerate(leaf.axes):
                for path, end in walk(axis):
                    if isinstance(end, Of) and end.group in found:
                        found[end.group].append(Member(leaf.name, i, path))
        return {name: tuple(members) for name, members in found.items()}

    @cached_property
    def _hash(self) -> int:
        return hash((self.groups, self.leaves, self.indices))

    def __hash__(self) -> int:
        return self._hash

    def __contains__(self, group: object) -> bool:
        return group in self._members

    def group(self, name: str) -> Group:
        """Return the group (or index group) of that name; KeyError names the nearest one."""
        return _lookup(self._groups, name, "group")

    def leaf(self, name: str) -> Leaf:
        """Return the leaf of that name; KeyError names the nearest one."""
        return _lookup(self._leaves, name, "leaf")

    def members(self, group: str) -> tuple[Member, ...]:
        """Return every place at which a group appears, in leaf order."""
        return _lookup(self._members, group, "group")

    def shape(self, group: str) -> tuple[int, ...]:
        """Return the shape of the group's permutation array: sizes of its `per` groups, then its own."""
        found = self.group(group)
        return (*(self.group(p).size for p in found.per), found.size)

    def size(self, axis: Axis) -> int:
        """Return the number of positions along an axis tree."""
        return axis_size(axis, {name: g.size for name, g in self._groups.items()})

    def validate(self, shapes: Mapping[str, tuple[int, ...]], what: str = "model") -> None:
        """Check leaf names and shapes against the spec.

        Raises:
            ValueError: names the leaf that is missing, extra or of another shape, with both shapes.
        """
        for name in shapes:
            if name not in self._leaves:
                raise ValueError(
                    f"{what} has the leaf '{name}', which the spec does not know{_nearest(name, self._leaves)}; "
                    "trace the spec from this model."
                )
        for leaf in self.leaves:
            if leaf.name not in shapes:
                raise ValueError(f"{what} lacks the leaf '{leaf.name}' of shape {leaf.shape}.")
            _check_shape(leaf, tuple(shapes[leaf.name]), what)

    def explain(self) -> str:
        """Return a readable page: groups with sizes and members, then pinned axes with their reasons."""
        from permjax.symmetry.explain import explain

        return explain(self)

    @staticmethod
    def from_axes(
        shapes: Mapping[str, tuple[int, ...]],
        axes: Mapping[str, Sequence[str | Axis | None]],
        *,
        sizes: Mapping[str, int] | None = None,
        per: Mapping[str, tuple[str, ...]] | None = None,
        roles: Mapping[str, Role] | None = None,
    ) -> "PermutationSpec":
        """Write a spec by hand.

        Args:
            shapes: leaf name -> shape, for every leaf of the model.
            axes: leaf name -> one entry per axis: a group name, None (fixed) or an axis tree. Leaves
                that are not listed are fixed.
            sizes: sizes of groups that never stand on a whole axis.
            per: group -> groups that index it.
            roles: leaf name -> role, `weight` where absent.

        Returns:
            The spec, with groups in natural order of their names.

        Raises:
            ValueError: names the leaf and axis that do not fit.

        Example:
            >>> shapes = {"w1": (4, 8), "w2": (8, 2)}
            >>> spec = PermutationSpec.from_axes(shapes, {"w1": (None, "hidden"), "w2": ("hidden", None)})
            >>> spec.shape("hidden")
            (8,)
        """
        sizes, per, roles = sizes or {}, per or {}, roles or {}
        _check_known("axes name the leaf", axes, shapes)
        _check_known("roles name the leaf", roles, shapes)
        found = dict(sizes)
        leaves = [_hand_leaf(name, tuple(s), axes.get(name), found, roles) for name, s in shapes.items()]
        used = {e.group for leaf in leaves for a in leaf.axes for _, e in walk(a) if isinstance(e, Of)}
        _check_known("sizes name the group", sizes, used)
        _check_known("per names the group", [n for g, outer in per.items() for n in (g, *outer)], used)
        if missing := sorted(used - found.keys()):
            raise ValueError(f"group '{missing[0]}' never stands on a whole axis; give its size in `sizes`.")
        groups = [Group(n, found[n], per.get(n, ())) for n in sorted(used, key=natural_key)]
        return PermutationSpec(tuple(groups), tuple(leaves))


def axis_size(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Return the number of positions along an axis tree, given the group sizes."""
    match axis:
        case Fixed(size):
            return size
        case Of(group):
            return sizes[group]
        case Product(factors):
            return prod(axis_size(f, sizes) for f in factors)
        case Sum(segments):
            return sum(axis_size(s, sizes) for s in segments)


def _lookup(table: Mapping, name: str, what: str):
    if name not in table:
        raise KeyError(f"there is no {what} '{name}'{_nearest(name, table)}.")
    return table[name]


def _nearest(name: str, names) -> str:
    close = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what} '{name}', which the model lacks{_nearest(name, sorted(known))}.")


def _check_once(what: str, names: Iterable[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{what} '{twice[0]}' is given twice; names must differ.")


def _check_group(spec: PermutationSpec, group: Group) -> None:
    for position, name in enumerate(group.per):
        outer = spec.group(name)
        if not set(outer.per) <= set(group.per[:position]):
            raise ValueError(
                f"group '{group.name}' is per {group.per}, but '{name}' is itself per {outer.per}: "
                "list those groups before it."
            )


def _check_leaf(spec: PermutationSpec, leaf: Leaf) -> None:
    if len(leaf.axes) != len(leaf.shape):
        raise ValueError(f"leaf '{leaf.name}' has shape {leaf.shape} but {len(leaf.axes)} axis entries.")
    for i, (axis, size) in enumerate(zip(leaf.axes, leaf.shape, strict=True)):
        for _, end in walk(axis):
            if isinstance(end, Of):
                spec.group(end.group)
        if spec.size(axis) != size:
            raise ValueError(
                f"leaf '{leaf.name}', axis {i}: the model has size {size}, the spec's parts make {spec.size(axis)}."
            )


def _check_shape(leaf: Leaf, shape: tuple[int, ...], what: str) -> None:
    if len(shape) != len(leaf.shape):
        raise ValueError(f"leaf '{leaf.name}' of {what} has {len(shape)} axes {shape}, the spec expects {leaf.shape}.")
    for i, (seen, expected) in enumerate(zip(shape, leaf.shape, strict=True)):
        if seen != expected:
            raise ValueError(
                f"leaf '{leaf.name}', axis {i}: {what} has size {seen}, the spec expects {expected}; "
                "models of different width cannot share a spec."
            )


def _hand_leaf(name, shape, entries, sizes: dict[str, int], roles: Mapping[str, Role]) -> Leaf:
    entries = [None] * len(shape) if entries is None else list(entries)
    if len(entries) != len(shape):
        raise ValueError(f"leaf '{name}' has shape {shape}, but {len(entries)} axis entries were given.")
    axes = []
    for i, (entry, size) in enumerate(zip(entries, shape, strict=True)):
        if isinstance(entry, str):
            entry = Of(entry)
        if isinstance(entry, Of) and sizes.setdefault(entry.group, size) != size:
            raise ValueError(
                f"leaf '{name}', axis {i} has size {size}, but group '{entry.group}' has size {sizes[entry.group]}."
            )
        axes.append(Fixed(size, "fixed by hand") if entry is None else entry)
    return Leaf(name, shape, tuple(axes), roles.get(name, "weight"))
