"""Rules of primitives that move data: reshape, transpose, broadcast, slice, concatenate, pad, gather, scatter."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from permjax.symmetry.factors import Node, concatenation, cut_or_pin, pin, product, split, unite
from permjax.symmetry.walk import Value, Walk, rule


@rule("reshape", index=True)
def _reshape(walk, eqn, operands):
    value, shape = operands[0], tuple(eqn.params["new_sizes"])
    axes: list[Any] = [None] * len(shape)
    if 0 in shape:
        return [walk.fresh(shape)]
    blocks = list(_blocks(value.shape, shape))
    for left, right in blocks:
        nodes = _regroup([value.axes[i] for i in left], [shape[j] for j in right], eqn)
        for j, node in zip(right, nodes, strict=True):
            axes[j] = node
    out = walk.value(axes, value.index)
    out.wrapped, out.never = value.wrapped, value.never
    for left, right in blocks:
        if left and right:
            walk.match((value, left), (out, right))
    walk.moved(value, out, None)
    return [out]


def _blocks(old: Sequence[int], new: Sequence[int]):
    """Yield the smallest runs of axes of both shapes that hold the same number of positions."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        while (a := prod(old[k] for k in left)) != (b := prod(new[k] for k in right)):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        yield left, right


def _regroup(nodes: list[Node], sizes: list[int], eqn: Any) -> list[Node]:
    """Deal the factors of `nodes` out to axes of the given sizes, from the minor end; pin all if they do not fit."""
    if len(sizes) == 1:
        return [product(nodes)]
    left = product(nodes)
    found: list[Node] = []
    for size in reversed(sizes):
        pair = split(left, size)
        if pair is None:
            for node in nodes:
                pin(node, eqn)
            return [Node(n, reason=eqn) for n in sizes]
        left, minor = pair
        found.insert(0, minor)
    return found


@rule("transpose", index=True)
def _transpose(walk, eqn, operands):
    return [_select_axes(walk, eqn, operands[0], eqn.params["permutation"])]


@rule("squeeze", index=True)
def _squeeze(walk, eqn, operands):
    rank = len(operands[0].axes)
    gone = {d % rank for d in eqn.params["dimensions"]}
    return [_select_axes(walk, eqn, operands[0], [i for i in range(rank) if i not in gone])]


def _select_axes(walk: Walk, eqn, value: Value, order) -> Value:
    out = walk.value((value.axes[i] for i in order), value.index)
    out.wrapped, out.never = value.wrapped, value.never
    for k, i in enumerate(order):
        walk.link(value, i, out, k, eqn)
    walk.moved(value, out, order)
    return out


@rule("broadcast_in_dim", index=True)
def _broadcast(walk, eqn, operands):
    value, shape = operands[0], eqn.params["shape"]
    places = {int(j): i for i, j in enumerate(eqn.params["broadcast_dimensions"]) if value.axes[i].size == shape[j]}
    out = walk.value((value.axes[places[j]] if j in places else Node(n) for j, n in enumerate(shape)), value.index)
    out.wrapped, out.never, out.const = value.wrapped, value.never, value.const
    for j, i in places.items():
        walk.link(value, i, out, j, eqn)
    walk.moved(value, out, None)
    return [out]


@rule("tile", index=True)
def _tile(walk, eqn, operands):
    value = operands[0]
    pairs = list(zip([Node(int(r)) for r in eqn.params["reps"]], value.axes, strict=True))
    view = walk.value(node for pair in pairs for node in pair)
    out = walk.value((product(pair) for pair in pairs), value.index)
    out.wrapped = value.wrapped
    for i in range(len(pairs)):
        walk.match((value, (i,)), (view, (2 * i + 1,)))
        walk.match((view, (2 * i, 2 * i + 1)), (out, (i,)))
    return [out]


@rule("stack", index=True)
def _stack(walk, eqn, operands):
    axis, first = eqn.params["axis"], operands[0]
    slots = concatenation([Node(1, reason=eqn) for _ in operands])
    index = _common_index(walk, eqn, operands)
    out = walk.value([*first.axes[:axis], slots, *first.axes[axis:]], index)
    for value in operands:
        for i in range(len(first.axes)):
            walk.link(value, i, out, i + (i >= axis), eqn)
    return [out]


@rule("unstack", index=True)
def _unstack(walk, eqn, operands):
    (value,) = operands
    axis = eqn.params["axis"]
    kept = [i for i in range(len(value.axes)) if i != axis]
    cut_or_pin(value.axes[axis], range(1, value.axes[axis].size), eqn)
    return [_select_axes(walk, eqn, value, kept) for _ in eqn.outvars]


def _common_index(walk: Walk, eqn, operands) -> Node | None:
    nodes = [v.index for v in operands]
    if all(n is not None for n in nodes) and len({n.size for n in nodes}) == 1:
        for node in nodes[1:]:
            unite(nodes[0], node, eqn)
        return nodes[0]
    for value in operands:
        walk.pin_index(value, eqn)
    return None


@rule("concatenate", index=True)
def _concatenate(walk, eqn, operands):
    axis, first = eqn.params["dimension"], operands[0]
    joined = concatenation([v.axes[axis] for v in operands])
    index = _common_index(walk, eqn, operands)
    out = walk.value((joined if i == axis else n for i, n in enumerate(first.axes)), index)
    start = 0
    for value in operands:
        for i in range(len(first.axes)):
            if i != axis:
                walk.link(value, i, out, i, eqn)
        size = value.axes[axis].size
        walk.match((value, (axis,)), (out, (axis,)), (0, start), size)
        start += size
    return [out]


@rule("slice", index=True)
def _slice(walk, eqn, operands):
    value, p = operands[0], eqn.params
    strides = p["strides"] or (1,) * len(value.axes)
    return [_slices(walk, eqn, value, list(zip(p["start_indices"], p["limit_indices"], strides, strict=True)))]


def _slices(walk: Walk, eqn, value: Value, ranges) -> Value:
    """Cut every axis to `start:limit:stride`; strided axes are pinned."""
    axes, passes = [], []
    for i, (start, limit, stride) in enumerate((int(a), int(b), int(c)) for a, b, c in ranges):
        node = value.axes[i]
        if stride != 1 and limit - start > 1:
            pin(node, eqn)
            axes.append(Node(-(-(limit - start) // stride), reason=eqn))
            continue
        limit = min(limit, start + 1) if stride != 1 else limit
        edges = [e for e in (start, limit) if 0 < e < node.size]
        pieces = cut_or_pin(node, sorted(set(edges)), eqn) if limit > start else [Node(0), Node(0)]
        axes.append(pieces[1 if start > 0 else 0])
        passes.append((i, start, limit - start))
    out = walk.value(axes, value.index)
    out.wrapped, out.never = value.wrapped, value.never
    for i, start, size in passes:
        whole = size == value.axes[i].size
        walk.match((value, (i,)), (out, (i,)), (start, 0), 0 if whole else size)
    return out


@rule("split", index=True)
def _split(walk, eqn, operands):
    value, axis, sizes = operands[0], eqn.params["axis"], eqn.params["sizes"]
    edges = [0, *accumulate(int(n) for n in sizes)]
    whole = [(0, n, 1) for n in value.shape]
    return [
        _slices(walk, eqn, value, [(a, b, 1) if i == axis else r for i, r in enumerate(whole)])
        for a, b in pairwise(edges)
    ]


@rule("dynamic_slice", index=True)
def _dynamic_slice(walk, eqn, operands):
    value, *starts = operands
    sizes = eqn.params["slice_sizes"]
    for start in starts:
        walk.pin_index(start, eqn)
    if all(s.const is not None or n == value.shape[i] for i, (s, n) in enumerate(zip(starts, sizes, strict=True))):
        ranges = []
        for start, n, size in zip(starts, sizes, value.shape, strict=True):
            first = 0 if n == size else min(max(int(start.const), 0), size - n)
            ranges.append((first, first + n, 1))
        return [_slices(walk, eqn, value, ranges)]
    touched = [i for i, n in enumerate(sizes) if n != value.shape[i]]
    for i in touched:
        pin(value.axes[i], eqn)
    out = walk.value((Node(n, reason=eqn) if i in touched else value.axes[i] for i, n in enumerate(sizes)), value.index)
    out.wrapped = value.wrapped
    for i in range(len(sizes)):
        if i not in touched:
            walk.link(value, i, out, i, eqn)
    return [out]


@rule("pad")
def _pad(walk, eqn, operands):
    value, config = operands[0], [tuple(map(int, c)) for c in eqn.params["padding_config"]]
    axes = []
    for node, (low, high, interior) in zip(value.axes, config, strict=True):
        if interior or low < 0 or high < 0:
            pin(node, eqn)
            axes.append(Node(low + high + node.size + max(node.size - 1, 0) * interior, reason=eqn))
        else:
            axes.append(concatenation([n for n in (Node(low), node, Node(high)) if n.size]))
    out = walk.value(axes)
    for i, (low, high, interior) in enumerate(config):
        if not interior and low >= 0 and high >= 0:
            whole = low == high == 0
            walk.match((value, (i,)), (out, (i,)), (0, low), 0 if whole else value.axes[i].size)
    return [out]


@rule("gather", index=True)
def _gather(walk, eqn, operands):
    value, where = operands
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batch = dict(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
    named = where.index if len(d.start_index_map) == 1 else None
    for k in d.start_index_map:
        node = value.axes[k]
        if named is not None and sizes[k] == 1 and node.size == named.size:
            unite(node, named, eqn)
        else:
            pin(node, eqn)
            walk.pin_index(where, eqn)
            walk.looked_up.append(node.size)
    for k in set(d.collapsed_slice_dims) - set(d.start_index_map):
        pin(value.axes[k], eqn)
    for k, j in batch.items():
        walk.link(value, k, where, j, eqn)
    shape = eqn.outvars[0].aval.shape
    window = [k for k in range(len(value.axes)) if k not in d.collapsed_slice_dims and k not in batch]
    places = {o: (value, k) for o, k in zip(d.offset_dims, window, strict=True) if k not in d.start_index_map}
    rest = [o for o in range(len(shape)) if o not in d.offset_dims]
    places.update({o: (where, j) for o, j in zip(rest, range(len(rest)), strict=True)})
    out = _assemble(walk, eqn, shape, places, value.index)
    out.wrapped = value.wrapped
    for k, j in batch.items():
        walk.match((value, (k,)), (out, (rest[j],)))
    return [out]


def _assemble(walk: Walk, eqn, shape, places: dict[int, tuple[Value, int]], index: Node | None) -> Value:
    """Return a value whose axes come from the given places, pinned where there is none or only a part of it."""
    whole = {o: (v, i) for o, (v, i) in places.items() if v.axes[i].size == shape[o]}
    for o, (value, i) in places.items():
        if o not in whole:
            pin(value.axes[i], eqn)
    axes = (whole[o][0].axes[whole[o][1]] if o in whole else Node(n, reason=eqn) for o, n in enumerate(shape))
    out = walk.value(axes, index)
    for o, (value, i) in whole.items():
        walk.link(value, i, out, o, eqn)
    return out


@rule(
    "scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter-add", "scatter-mul", "scatter-sub"
)
def _scatter(walk, eqn, operands):
    value, where, update = operands
    d = eqn.params["dimension_numbers"]
    batch = dict(zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True))
    window = [k for k in range(len(value.axes)) if k not in d.inserted_window_dims and k not in batch]
    for k in {*d.scatter_dims_to_operand_dims, *d.inserted_window_dims}:
        pin(value.axes[k], eqn)
    out = walk.like(value, eqn)
    for u, k in zip(d.update_window_dims, window, strict=True):
        if update.axes[u].size == value.axes[k].size and k not in d.scatter_dims_to_operand_dims:
            walk.link(update, u, out, k, eqn)
        else:
            pin(update.axes[u], eqn)
            pin(value.axes[k], eqn)
    rest = [u for u in range(len(update.axes)) if u not in d.update_window_dims]
    for j, u in enumerate(rest):
        walk.link(where, j, update, u, eqn)
        if eqn.primitive.name == "scatter":
            pin(update.axes[u], eqn)
    for k, j in batch.items():
        walk.link(value, k, where, j, eqn)
    return [out]


@rule("dynamic_update_slice")
def _dynamic_update_slice(walk, eqn, operands):
    value, update = operands[:2]
    for i, node in enumerate(value.axes):
        if update.axes[i].size != node.size:
            pin(node, eqn)
            pin(update.axes[i], eqn)
    out = walk.like(value, eqn)
    for i, node in enumerate(value.axes):
        if update.axes[i].size == node.size:
            walk.link(update, i, out, i, eqn)
    return [out]
