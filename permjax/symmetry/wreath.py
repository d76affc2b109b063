"""Which groups may be permuted separately for every unit of another group (wreath products).

D may be `per` H if every value that holds D holds H exactly once beside it, and every equation that carries D from one
value to another carries the H beside it along, position by position.
"""

from collections.abc import Iterable, Iterator
from itertools import product as cartesian
from typing import NamedTuple

from permjax.symmetry.factors import Node, atoms, factors, segments
from permjax.symmetry.walk import Equation, Place, Value, Walk


class Spot(NamedTuple):
    """One occurrence of an atom in a value: axis (negative: context), start of its segment, stride."""

    axis: int
    start: int
    stride: int


class Alternative(NamedTuple):
    """A segment of an axis: its first position, and its atoms with their strides, major to minor."""

    start: int
    atoms: list[tuple[Node, int]]


def normal_form(node: Node) -> list[Alternative]:
    """Write a node as a sum of products: its segments, with products of sums multiplied out."""
    node = node.find()
    if node.size == 1:
        return [Alternative(0, [])]
    if node.kind == "atom":
        return [Alternative(0, [(node, 1)])]
    if node.kind == "sum":
        return _sum_form(node)
    found, stride = [Alternative(0, [])], 1
    for part in reversed(factors(node)):
        found = [
            Alternative(
                head.start * stride + tail.start, [*((a, step * stride) for a, step in head.atoms), *tail.atoms]
            )
            for head, tail in cartesian(normal_form(part), found)
        ]
        stride *= part.size
    return found


def _sum_form(node: Node) -> list[Alternative]:
    found, offset = [], 0
    for segment in segments(node):
        found += [Alternative(alt.start + offset, alt.atoms) for alt in normal_form(segment)]
        offset += segment.size
    return found


class Layout:
    """The occurrences of every atom in one value."""

    def __init__(self, value: Value):
        self.value = value
        self.axes = {i: normal_form(n) for i, n in enumerate(value.axes)}
        self.axes.update({-1 - k: normal_form(n) for k, n in enumerate(value.context)})

    def spots(self) -> Iterable[tuple[Node, Spot]]:
        """Yield every atom with its place."""
        for axis, alternatives in self.axes.items():
            for alternative in alternatives:
                yield from _spots(axis, alternative)

    def companions(self, spot: Spot) -> dict[Node, Spot]:
        """Return the atoms that stand exactly once beside the one at `spot`, wherever it stands."""
        found: dict[Node, list[Spot]] = {}
        banned: set[Node] = set()
        for axis, alternatives in self.axes.items():
            if axis == spot.axis:
                alternatives = [alt for alt in alternatives if alt.start == spot.start]
            if len(alternatives) > 1:
                banned.update(atom for alt in alternatives for atom, _ in alt.atoms)
                continue
            for atom, other in _spots(axis, alternatives[0]):
                if other != spot:
                    found.setdefault(atom, []).append(other)
        return {atom: spots[0] for atom, spots in found.items() if len(spots) == 1 and atom not in banned}

    def expand(self, place: Place) -> list[list[tuple[Node, Spot]]]:
        """Return the alternatives of a block of axes, or of a run of positions in one axis."""
        _, block, start, size = place
        if size:
            (axis,) = block
            return [list(_spots(axis, alt)) for alt in self.axes[axis] if start <= alt.start < start + size]
        forms = [[list(_spots(axis, alt)) for alt in self.axes[axis]] for axis in block]
        return [[pair for alt in combination for pair in alt] for combination in cartesian(*forms)]


def _spots(axis: int, alternative: Alternative) -> Iterator[tuple[Node, Spot]]:
    return ((atom, Spot(axis, alternative.start, stride)) for atom, stride in alternative.atoms)


class Wreath:
    """The analysis over a finished walk: for each class the classes that it may be `per`."""

    def __init__(self, walk: Walk, classes: Iterable[Node]):
        self.layouts = {id(v): Layout(v) for v in walk.values}
        self.per: dict[Node, set[Node]] = {}
        self.memo: dict[tuple[int, Spot], dict[Node, Spot]] = {}
        wanted = {c for c in classes if c.reason is None}
        self._start(walk, wanted)
        for node in walk.indexed:
            for atom in atoms(node):
                self.per.pop(atom, None)
        for equation in walk.equations:
            self._check(equation)

    def beside(self, value: Value, spot: Spot) -> dict[Node, Spot]:
        """Return the companions of an occurrence."""
        key = (id(value), spot)
        if key not in self.memo:
            self.memo[key] = self.layouts[id(value)].companions(spot)
        return self.memo[key]

    def _start(self, walk: Walk, wanted: set[Node]) -> None:
        for value in walk.values:
            for atom, spot in self.layouts[id(value)].spots():
                if atom in wanted:
                    here = self.beside(value, spot).keys() - {atom}
                    self.per[atom] = self.per[atom] & here if atom in self.per else here

    def _check(self, equation: Equation) -> None:
        pairs = [pair for link in equation.links for pair in self._pairs(*link)]
        if not any(self.per.get(atom) for atom, *_ in pairs):
            return
        known = {frozenset({(id(u), s), (id(w), t)}) for _, u, s, w, t in pairs}
        for atom, u, s, w, t in pairs:
            for other in list(self.per.get(atom, ())):
                a, b = self.beside(u, s)[other], self.beside(w, t)[other]
                if not self._travels(equation, known, (u, a), (w, b)):
                    self.per[atom].discard(other)

    def _travels(self, equation: Equation, known, a: tuple[Value, Spot], b: tuple[Value, Spot]) -> bool:
        """Tell whether an equation takes one occurrence of H to the other, position by position."""
        if frozenset({(id(a[0]), a[1]), (id(b[0]), b[1])}) in known:
            return True
        if a[1].axis >= 0 or a[1].axis != b[1].axis:
            return False
        return not (equation.loop and a[1].axis == -len(a[0].context))

    def _pairs(self, left: Place, right: Place) -> list[tuple]:
        """Return the occurrences that a link identifies; if the trees differ, their classes lose every `per`."""
        u, w = left[0], right[0]
        a, b = self.layouts[id(u)].expand(left), self.layouts[id(w)].expand(right)
        if [[atom for atom, _ in alt] for alt in a] != [[atom for atom, _ in alt] for alt in b]:
            for atom in {atom for alt in (*a, *b) for atom, _ in alt}:
                self.per[atom] = set()
            return []
        return [
            (atom, u, s, w, t)
            for one, two in zip(a, b, strict=True)
            for (atom, s), (_, t) in zip(one, two, strict=True)
        ]
