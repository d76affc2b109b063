"""Axes as trees of factors with union-find: the values that the tracer reasons about.

A node is an atom, a product of nodes (major to minor) or a sum of segments. Atoms split lazily when an equation needs
a finer view, and since nodes are shared, every earlier occurrence sees the split. Uniting two nodes says that their
positions must move together; pinning one says that they must not move at all.
"""

from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from math import prod
from typing import Any, Literal

_LABELS = count()


class Node:
    """A factor of an axis; `reason` (an equation or text) is set once the atom is pinned, `label` is unique."""

    __slots__ = ("kind", "label", "parent", "parts", "reason", "size")

    def __init__(
        self,
        size: int,
        kind: Literal["atom", "product", "sum"] = "atom",
        parts: Sequence["Node"] = (),
        reason: Any = None,
    ):
        self.size, self.kind, self.parts, self.reason = size, kind, list(parts), reason
        self.parent: Node | None = None
        self.label = f"class {next(_LABELS)}"

    def find(self) -> "Node":
        """Return the representative of this node's class."""
        node = self
        while node.parent is not None:
            node = node.parent
        if self.parent is not None and self.parent is not node:
            self.parent = node
        return node

    def become(self, kind: Literal["product", "sum"], parts: Sequence["Node"]) -> None:
        """Turn this node into a product or sum; a pin moves down to the parts."""
        self.kind, self.parts = kind, list(parts)
        if self.reason is not None:
            for part in parts:
                pin(part, self.reason)


def product(parts: Sequence[Node]) -> Node:
    """Return the product of nodes, major to minor; factors of size 1 vanish."""
    flat = [f for part in parts for f in factors(part)]
    return flat[0] if len(flat) == 1 else Node(prod(f.size for f in flat), "product" if flat else "atom", flat)


def concatenation(parts: Sequence[Node]) -> Node:
    """Return the sum of segments in order; empty ones vanish, a single segment is itself."""
    flat = [s for part in parts for s in segments(part) if s.size] or [Node(0)]
    return flat[0] if len(flat) == 1 else Node(sum(s.size for s in flat), "sum", flat)


def factors(node: Node) -> list[Node]:
    """Return the factors of a product, flattened, without those of size 1; other nodes are their only factor."""
    node = node.find()
    if node.size == 1:
        return []
    return [f for part in node.parts for f in factors(part)] if node.kind == "product" else [node]


def segments(node: Node) -> list[Node]:
    """Return the segments of a sum, flattened; other nodes are their only segment."""
    node = node.find()
    return [s for part in node.parts for s in segments(part)] if node.kind == "sum" else [node]


def atoms(node: Node) -> Iterator[Node]:
    """Yield the representatives of all atoms of a node."""
    node = node.find()
    if node.kind == "atom":
        yield node
    for part in node.parts:
        yield from atoms(part)


def is_pinned(node: Node) -> bool:
    """Tell whether every atom of the node is pinned."""
    return all(a.reason is not None for a in atoms(node) if a.size > 1)


def pin(node: Node, reason: Any) -> None:
    """Pin every atom of the node; the first reason stays."""
    for atom in atoms(node):
        if atom.reason is None:
            atom.reason = reason


def unite(a: Node, b: Node, reason: Any) -> None:
    """Make two nodes of one size move together; what cannot be aligned is pinned with `reason`."""
    a, b = a.find(), b.find()
    if a is b or a.size == 1:
        return
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        if a.reason is not None:
            pin(b, a.reason)
        a.parent = b
    elif a.kind == "product" and b.kind == "product":
        _align(factors(a), factors(b), reason)
    else:
        _align_segments(a, b, reason)


def split(node: Node, minor: int) -> tuple[Node, Node] | None:
    """Write a node as `major x minor` with a minor factor of the given size, or return None if that is impossible."""
    node = node.find()
    if minor == 1:
        return node, Node(1)
    if minor == node.size:
        return Node(1), node
    if node.size % minor:
        return None
    if node.kind == "atom":
        pair = (Node(node.size // minor), Node(minor))
        node.become("product", pair)
        return pair
    return _split_product(node, minor) if node.kind == "product" else _split_sum(node, minor)


def cut(node: Node, boundaries: Sequence[int]) -> list[Node] | None:
    """Cut a node into consecutive segments at the given interior positions, or return None if that is impossible."""
    node = node.find()
    if not boundaries:
        return [node]
    if node.kind == "product":
        return _cut_product(node, boundaries)
    if node.kind == "atom":
        edges = [0, *boundaries, node.size]
        pieces = [Node(end - start) for start, end in pairwise(edges)]
        node.become("sum", pieces)
        return pieces
    return _cut_sum(node, boundaries)


def cut_or_pin(node: Node, boundaries: Sequence[int], reason: Any) -> list[Node]:
    """Cut a node; where that is impossible pin it and return pinned pieces."""
    pieces = cut(node, boundaries)
    if pieces is not None:
        return pieces
    pin(node, reason)
    edges = [0, *boundaries, node.size]
    return [Node(end - start, reason=reason) for start, end in pairwise(edges)]


def _align(left: list[Node], right: list[Node], reason: Any) -> None:
    """Unite two products from the minor end."""
    while left and right:
        f, g = left.pop().find(), right.pop().find()
        small = min(f.size, g.size)
        pair = (split(f, small), split(g, small))
        if pair[0] is None or pair[1] is None:
            for node in (*left, *right, f, g):
                pin(node, reason)
            return
        left.extend(factors(pair[0][0]))
        right.extend(factors(pair[1][0]))
        unite(pair[0][1], pair[1][1], reason)


def _align_segments(a: Node, b: Node, reason: Any) -> None:
    """Unite two nodes of which at least one is a sum, by cutting both at all boundaries, else by factoring."""
    edges = sorted({*_boundaries(a), *_boundaries(b)})
    left, right = cut(a, edges), cut(b, edges)
    if left is not None and right is not None:
        for f, g in zip(left, right, strict=True):
            unite(f, g, reason)
        return
    whole, pieces = (a, b) if a.kind == "product" else (b, a)
    minor = factors(whole)[-1].size if whole.kind == "product" else 1
    if whole.kind == "product" and (pair := split(pieces, minor)) is not None:
        unite(pair[1], factors(whole)[-1], reason)
        unite(pair[0], product(factors(whole)[:-1]), reason)
        return
    pin(a, reason)
    pin(b, reason)


def _boundaries(node: Node) -> list[int]:
    edges, position = [], 0
    for segment in segments(node)[:-1]:
        position += segment.size
        edges.append(position)
    return edges


def _split_product(node: Node, minor: int) -> tuple[Node, Node] | None:
    left, taken, size = factors(node), [], 1
    while size < minor:
        f = left.pop()
        if minor % size:
            return None
        pair = split(f, min(f.size, minor // size))
        if pair is None:
            return None
        left.extend(factors(pair[0]))
        taken[:0] = factors(pair[1])
        size *= pair[1].size
    return (product(left), product(taken)) if size == minor else None


def _split_sum(node: Node, minor: int) -> tuple[Node, Node] | None:
    pairs = [split(s, minor) for s in segments(node)]
    if any(p is None for p in pairs):
        return None
    majors, minors = [p[0] for p in pairs if p], [p[1] for p in pairs if p]
    for other in minors[1:]:
        unite(minors[0], other, "segments of one axis share a factor")
    return concatenation(majors), minors[0]


def _cut_product(node: Node, boundaries: Sequence[int]) -> list[Node] | None:
    *major, minor = factors(node)
    if any(b % minor.size for b in boundaries):
        return None
    pieces = cut(product(major), [b // minor.size for b in boundaries])
    return None if pieces is None else [product([p, minor]) for p in pieces]


def _cut_sum(node: Node, boundaries: Sequence[int]) -> list[Node] | None:
    pieces: list[list[Node]] = [[] for _ in range(len(boundaries) + 1)]
    edges = [*boundaries, node.size]
    start, k = 0, 0
    for segment in segments(node):
        end = start + segment.size
        inside = [b - start for b in boundaries if start < b < end]
        parts = cut(segment, inside)
        if parts is None:
            return None
        for part in parts:
            while start >= edges[k]:
                k += 1
            pieces[k].append(part)
            start += part.size
    return [concatenation(p) for p in pieces]
