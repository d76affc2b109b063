"""From a finished walk to a spec: classes become groups with readable names, nodes become axis trees."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from permjax.symmetry.factors import Node, atoms, factors, segments
from permjax.symmetry.spec import (
    Axis,
    Fixed,
    Group,
    Leaf,
    Of,
    PermutationSpec,
    Product,
    Role,
    Sum,
    children,
    natural_key,
)
from permjax.symmetry.spec import walk as ends
from permjax.symmetry.walk import Value, Walk
from permjax.symmetry.wreath import Wreath

Per = dict[str, set[str]]
"""Label of a class -> labels of the classes that it is per."""
Trees = dict[str, tuple[Axis, ...]]
"""Leaf -> axis trees whose ends are `Of(label of a class)`."""


def build_spec(walk: Walk, leaves: Mapping[str, Value], roles: Mapping[str, Role]) -> PermutationSpec:
    """Return the spec of a finished walk, given the value and role of every leaf."""
    classes = {a for v in leaves.values() for n in v.axes for a in atoms(n) if a.size > 1}
    free = {c for c in classes if c.reason is None}
    found = Wreath(walk, free).per
    per = _close({c.label: {o.label for o in found.get(c, ()) if o in classes} for c in free})
    known = {c.label: c for c in classes}
    kept = free | {known[o] for companions in per.values() for o in companions}
    trees = {name: tuple(_tree(n, kept) for n in v.axes) for name, v in leaves.items()}
    trees, per, sizes = _fuse(trees, _orient(per, trees), {c.label: c.size for c in kept})
    names = _names(trees, per)
    groups = _groups(names, per, sizes)
    shapes = {name: v.shape for name, v in leaves.items()}
    found_leaves = [Leaf(n, shapes[n], tuple(_renamed(a, names) for a in t), roles[n]) for n, t in trees.items()]
    fixed = tuple(Group(names[c.label], c.size) for c in kept - free if c.label in names)
    return PermutationSpec(groups, tuple(found_leaves), tuple(sorted(fixed, key=lambda g: natural_key(g.name))))


def _close(per: Per) -> Per:
    """Drop every H from D's companions that is itself per something which D is not per."""
    changed = True
    while changed:
        changed = False
        for d, companions in per.items():
            for h in list(companions):
                mutual = d in per.get(h, ())
                if not mutual and not per.get(h, set()) <= companions:
                    companions.discard(h)
                    changed = True
    return per


# -- axis trees over classes ---------------------------------------------------------------------------------------


def _tree(node: Node, kept: set[Node]) -> Axis:
    """Return the axis tree of a node, with `Of(class)`; sums stand as far to the minor side as they can."""
    node = node.find()
    if node.kind == "sum":
        return _join_sum([_tree(s, kept) for s in segments(node)])
    parts = factors(node)
    if not parts:
        return Fixed(1, describe(next(atoms(node)).reason))
    where = next((i for i, p in enumerate(parts) if p.kind == "sum"), None)
    if where is None:
        return _join_product([_end(p, kept) for p in parts])
    tails = [Node(s.size, "product", [s, *parts[where + 1 :]]) for s in segments(parts[where])]
    tail = _join_sum([_tree(_sized(t), kept) for t in tails])
    return _join_product([*(_end(p, kept) for p in parts[:where]), tail])


def _sized(node: Node) -> Node:
    size = 1
    for part in node.parts:
        size *= part.find().size
    return Node(size, "product", node.parts)


def _end(atom: Node, kept: set[Node]) -> Axis:
    return Of(atom.label) if atom in kept else Fixed(atom.size, describe(atom.reason))


def _join_product(parts: Sequence[Axis]) -> Axis:
    flat: list[Axis] = []
    for part in parts:
        for p in part.factors if isinstance(part, Product) else (part,):
            if isinstance(p, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * p.size, flat[-1].reason or p.reason)
            else:
                flat.append(p)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def _join_sum(parts: Sequence[Axis]) -> Axis:
    flat: list[Axis] = []
    for part in parts:
        for p in part.segments if isinstance(part, Sum) else (part,):
            if isinstance(p, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size + p.size, flat[-1].reason or p.reason)
            else:
                flat.append(p)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def describe(reason: Any) -> str:
    """Return a reason as text: the equation's primitive, its shapes, and the line of the user's code if known."""
    if reason is None or isinstance(reason, str):
        return reason or ""
    shapes = [
        ", ".join(v.aval.str_short() if hasattr(v.aval, "str_short") else str(v.aval) for v in side)
        for side in (reason.invars, reason.outvars)
    ]
    return f"{reason.primitive.name}({shapes[0]}) -> {shapes[1]}{_line(reason)}"


def _line(eqn: Any) -> str:
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    for frame in frames:
        name = frame.file_name
        if not any(part in name for part in ("/jax/", "/flax/", "/permjax/symmetry/", "importlib", "<frozen")):
            return f" at {name.rsplit('/', 1)[-1]}:{frame.line_num}"
    return ""


def axis_tree(node: Node, names: Mapping[tuple[Node, ...], str]) -> Axis:
    """Return the axis tree of a node of any value, given the groups that runs of classes stand for."""
    tree = _tree(node, {atom for run in names for atom in run})
    for run, name in sorted(names.items(), key=lambda item: -len(item[0])):
        tree = _replace(tree, tuple(atom.label for atom in run), name)
    return _fix_rest(tree, {atom.label: atom.size for run in names for atom in run})


def _fix_rest(axis: Axis, sizes: Mapping[str, int]) -> Axis:
    match axis:
        case Of(label) if label in sizes:
            return Fixed(sizes[label])
        case Product(parts):
            return _join_product([_fix_rest(p, sizes) for p in parts])
        case Sum(parts):
            return _join_sum([_fix_rest(p, sizes) for p in parts])
    return axis


# -- mutual per ----------------------------------------------------------------------------------------------------


def _orient(per: Per, trees: Trees) -> Per:
    """Where two classes are per each other and cannot be fused, keep the direction minor per major."""
    order = {c: i for i, c in enumerate(dict.fromkeys(_labels(trees)))}
    for d in per:
        for h in list(per[d]):
            if d in per.get(h, ()) and not _adjacent(h, d, trees) and not _adjacent(d, h, trees):
                low, high = sorted((d, h), key=lambda c: order.get(c, 0))
                per[low].discard(high)
    return per


def _fuse(trees: Trees, per: Per, sizes: dict[str, int]) -> tuple[Trees, Per, dict[str, int]]:
    """Fuse two classes that are per each other and always stand side by side: one permutation of their product."""
    for a, b in [(h, d) for d in per for h in per[d] if d in per.get(h, ())]:
        if a not in per or b not in per or b not in per[a] or not _adjacent(a, b, trees):
            continue
        fused = f"{a} x {b}"
        trees = {name: tuple(_replace(axis, (a, b), fused) for axis in axes) for name, axes in trees.items()}
        companions = (per.pop(a) & per.pop(b)) - {a, b}
        per = {c: (w - {a, b} | {fused}) if {a, b} <= w else w - {a, b} for c, w in per.items()}
        per[fused], sizes[fused] = companions, sizes[a] * sizes[b]
    return trees, per, sizes


def _adjacent(a: str, b: str, trees: Trees) -> bool:
    """Tell whether `a` and `b` only ever stand as neighbouring factors `a x b`."""
    seen = sum(label in (a, b) for label in _labels(trees))
    products = [p for axes in trees.values() for axis in axes for p in _products(axis)]
    pairs = sum(p.factors[i : i + 2] == (Of(a), Of(b)) for p in products for i in range(len(p.factors)))
    return seen > 0 and 2 * pairs == seen


def _labels(trees: Trees) -> list[str]:
    return [e.group for axes in trees.values() for axis in axes for _, e in ends(axis) if isinstance(e, Of)]


def _products(axis: Axis) -> Iterator[Product]:
    if isinstance(axis, Product):
        yield axis
    for child in children(axis):
        yield from _products(child)


def _replace(axis: Axis, run: tuple[str, ...], name: str) -> Axis:
    """Replace a run of neighbouring factors (or a single end) by one group."""
    wanted = tuple(Of(label) for label in run)
    if isinstance(axis, Sum):
        return Sum(tuple(_replace(s, run, name) for s in axis.segments))
    parts, found = axis.factors if isinstance(axis, Product) else (axis,), []
    while parts:
        hit = parts[: len(wanted)] == wanted
        part = Of(name) if hit else _replace(parts[0], run, name) if children(parts[0]) else parts[0]
        found.append(part)
        parts = parts[len(wanted) if hit else 1 :]
    return _join_product(found)


# -- names ---------------------------------------------------------------------------------------------------------


def _names(trees: Trees, per: Per) -> dict[str, str]:
    """Name every class after its first member: leaf, axis, and its part of the axis where it is not the whole."""
    places: dict[str, list[tuple]] = {}
    for name, axes in trees.items():
        for i, axis in enumerate(axes):
            for path, end in ends(axis):
                if isinstance(end, Of):
                    key = (len(axes) < 2, path != (), natural_key(name), i, path)
                    places.setdefault(end.group, []).append((key, name, i, path))
    first = {c: min(rows, key=lambda row: row[0])[1:] for c, rows in places.items()}
    outer = {h for w in per.values() for h in w}

    def name_of(c: str, long: bool) -> str:
        leaf, i, path = first[c]
        role = "dim" if per.get(c) else ("heads" if len(trees[leaf]) == 2 else "groups") if c in outer else "units"
        words = [*_steps(trees[leaf][i], path), role] if long else [role]
        return f"{leaf}:{i}" + (f"/{'.'.join(words)}" if path else "")

    short = {c: name_of(c, False) for c in first}
    taken = Counter(short.values())
    return {c: name if taken[name] == 1 else name_of(c, True) for c, name in short.items()}


def _steps(axis: Axis, path: tuple[int, ...]) -> Iterator[str]:
    for k in path:
        yield f"part{k}" if isinstance(axis, Sum) else str(k)
        axis = children(axis)[k]


def _groups(names: Mapping[str, str], per: Per, sizes: Mapping[str, int]) -> tuple[Group, ...]:
    found = []
    for c in sorted((c for c in names if c in per), key=lambda c: natural_key(names[c])):
        outer = sorted(per[c], key=lambda o: (len(per.get(o, ())), natural_key(names[o])))
        found.append(Group(names[c], sizes[c], tuple(names[o] for o in outer)))
    return tuple(found)


def _renamed(axis: Axis, names: Mapping[str, str]) -> Axis:
    match axis:
        case Of(label):
            return Of(names[label])
        case Product(parts):
            return Product(tuple(_renamed(p, names) for p in parts))
        case Sum(parts):
            return Sum(tuple(_renamed(p, names) for p in parts))
    return axis
