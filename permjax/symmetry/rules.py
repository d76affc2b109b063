"""Rules of primitives that compute: elementwise, contractions, reductions, sorting, windows, randomness."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from permjax.symmetry import moves, regions  # noqa: F401  (register their rules)
from permjax.symmetry.factors import Node, pin, split, unite
from permjax.symmetry.walk import Value, Walk, rule

UNARY = """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz conj cos
cosh digamma erf erf_inv erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p log2 logistic neg not
one_minus_square population_count real reduce_precision round rsqrt sign sin sinh sqrt square tan
tanh""".split()
KEEPING = """copy copy_p device_put name optimization_barrier pcast pvary sharding_constraint
stop_gradient""".split()
BINARY = """add add_any atan2 and complex div ge gt igamma igamma_grad_a igammac le lt max min mul ne nextafter or
polygamma polynomial pow regularized_incomplete_beta rem shift_left shift_right_arithmetic shift_right_logical sub xor
zeta eq_to le_to lt_to""".split()


def _elementwise(walk: Walk, eqn: Any, operands: list[Value], index: Node | None = None) -> Value:
    """Unite operands axis by axis; an axis of size 1 constrains nothing."""
    shape = eqn.outvars[0].aval.shape
    axes = []
    for i, n in enumerate(shape):
        full = [v.axes[i] for v in operands if v.axes and v.axes[i].size == n]
        axes.append(full[0] if full else Node(n))
    out = walk.value(axes, index)
    for value in operands:
        for i, node in enumerate(value.axes):
            if node.size == shape[i]:
                walk.link(value, i, out, i, eqn)
    return out


@rule(*UNARY)
def _unary(walk, eqn, operands):
    return [walk.like(v, eqn) for v in operands]


@rule("bitcast_convert_type")
def _bitcast(walk, eqn, operands):
    same = operands[0].shape == eqn.outvars[0].aval.shape
    return [walk.like(operands[0], eqn)] if same else _give_up(walk, eqn, operands)


@rule(*KEEPING, index=True)
def _keeping(walk, eqn, operands):
    return [walk.keep(value, eqn) for value in operands]


def _holds(dtype, size: int) -> bool:
    """Tell whether a type tells all positions below a size apart."""
    positions = np.arange(size)
    return np.array_equal(positions.astype(dtype).astype(complex), positions)


@rule("convert_element_type", index=True)
def _convert(walk, eqn, operands):
    (value,), dtype = operands, eqn.params["new_dtype"]
    named = value.wrapped if value.index is None else value.index
    if named is not None and not _holds(dtype, 2 * named.size):
        walk.pin_index(value, eqn)
    out = walk.keep(value, eqn)
    out.const = None if value.const is None else np.asarray(value.const).astype(dtype)[()]
    return [out]


@rule(*BINARY, index=True)
def _binary(walk, eqn, operands):
    return [_plain(walk, eqn, operands)]


def _plain(walk, eqn, operands) -> Value:
    """An elementwise result; positions that are computed with pin the axis they name, except in jnp's index wrap."""
    name, indexed = eqn.primitive.name, next((v for v in operands if v.index is not None), None)
    other = next((v for v in operands if v is not indexed), None)
    if indexed is not None and other is not None and other.const is not None:
        size = indexed.index.size
        if name == "lt" and operands[0] is indexed and other.const <= 0:
            out = _elementwise(walk, eqn, operands)
            out.never = True
            return out
        if name == "add" and other.const == 0:
            return _elementwise(walk, eqn, operands, indexed.index)
        if name == "add" and other.const == size:
            out = _elementwise(walk, eqn, operands)
            out.wrapped = indexed.index
            return out
        if (name == "max" and other.const <= 0) or (name == "min" and other.const >= size - 1):
            return _elementwise(walk, eqn, operands, indexed.index)
    for value in operands:
        walk.pin_index(value, eqn)
    return _elementwise(walk, eqn, operands)


@rule("eq", "ne", index=True)
def _equal(walk, eqn, operands):
    a, b = operands
    if a.index is not None and b.index is not None and a.index.size == b.index.size:
        unite(a.index, b.index, eqn)
        return [_elementwise(walk, eqn, operands)]
    return [_plain(walk, eqn, operands)]


@rule("select_n", index=True)
def _select(walk, eqn, operands):
    which, *cases = operands
    walk.pin_index(which, eqn)
    if which.never and len(cases) == 2 and cases[0].index is not None and cases[1].wrapped is not None:
        return [_elementwise(walk, eqn, operands, cases[0].index)]
    nodes = [v.index for v in cases]
    if all(n is not None for n in nodes) and len({n.size for n in nodes}) == 1:
        for node in nodes[1:]:
            unite(nodes[0], node, eqn)
        return [_elementwise(walk, eqn, operands, nodes[0])]
    for value in cases:
        walk.pin_index(value, eqn)
    return [_elementwise(walk, eqn, operands)]


@rule("clamp", index=True)
def _clamp(walk, eqn, operands):
    low, value, high = operands
    named, ends = value.index, (low.const, high.const)
    if named is not None and None not in ends and ends[0] <= 0 and ends[1] >= named.size - 1:
        return [_elementwise(walk, eqn, operands, value.index)]
    for operand in operands:
        walk.pin_index(operand, eqn)
    return [_elementwise(walk, eqn, operands)]


@rule("dot_general")
def _dot_general(walk, eqn, operands):
    lhs, rhs = operands
    contracted, batch = eqn.params["dimension_numbers"]
    return [_dot(walk, eqn, lhs, rhs, contracted, batch)]


def _dot(walk, eqn, lhs, rhs, contracted, batch) -> Value:
    contracted, batch = ([[int(i) for i in side] for side in pair] for pair in (contracted, batch))
    for i, j in zip(*contracted, strict=True):
        walk.link(lhs, i, rhs, j, eqn)
    for i, j in zip(*batch, strict=True):
        walk.link(lhs, i, rhs, j, eqn)
    free_l = [i for i in range(len(lhs.axes)) if i not in (*contracted[0], *batch[0])]
    free_r = [j for j in range(len(rhs.axes)) if j not in (*contracted[1], *batch[1])]
    places = [*((lhs, i) for i in (*batch[0], *free_l)), *((rhs, j) for j in free_r)]
    out = walk.value(v.axes[i] for v, i in places)
    for k, (value, i) in enumerate(places):
        walk.link(value, i, out, k, eqn)
    for k, j in enumerate(batch[1]):
        walk.link(rhs, j, out, k, eqn)
    return out


@rule("ragged_dot_general")
def _ragged_dot(walk, eqn, operands):
    lhs, rhs, sizes = operands[:3]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    groups, rows = tuple(numbers.rhs_group_dimensions), tuple(numbers.lhs_ragged_dimensions)
    for value, axes in ((lhs, rows), (rhs, groups), (sizes, range(len(sizes.axes)))):
        for i in axes:
            pin(value.axes[i], eqn)
    if not groups or set(rows) & {*lc, *lb}:
        walk.pin_value(lhs, eqn)
        walk.pin_value(rhs, eqn)
        return [walk.fresh(eqn.outvars[0].aval.shape, eqn)]
    kept = [j for j in range(len(rhs.axes)) if j not in groups]
    view = walk.value(rhs.axes[j] for j in kept)
    for k, j in enumerate(kept):
        walk.link(rhs, j, view, k, eqn)
    return [_dot(walk, eqn, lhs, view, (lc, [kept.index(j) for j in rc]), (lb, [kept.index(j) for j in rb]))]


@rule("conv_general_dilated")
def _convolution(walk, eqn, operands):
    lhs, rhs = operands
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    (lb, lf, *ls), (ro, ri, *rs), (ob, of, *os) = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    shape = eqn.outvars[0].aval.shape
    if p["batch_group_count"] != 1:
        return _give_up(walk, eqn, operands)
    groups = p["feature_group_count"]
    left, right = split(lhs.axes[lf], lhs.axes[lf].size // groups), split(rhs.axes[ro], shape[of] // groups)
    if left is None or right is None:
        return _give_up(walk, eqn, operands)
    (gl, il), (gr, ol) = left, right
    unite(gl, gr, eqn)
    unite(il, rhs.axes[ri], eqn)
    axes: list[Any] = [None] * len(shape)
    axes[ob], axes[of] = lhs.axes[lb], rhs.axes[ro]
    for k, (i, j, o) in enumerate(zip(ls, rs, os, strict=True)):
        axes[o] = _window_axis(eqn, (lhs, i), (rhs, j), k, shape[o])
    out = walk.value(axes)
    walk.match((lhs, (lb,)), (out, (ob,)))
    for i, o in zip(ls, os, strict=True):
        if axes[o] is lhs.axes[i]:
            walk.match((lhs, (i,)), (out, (o,)))
    _match_features(walk, (lhs, lf, (gl, il)), (rhs, ro, (gr, ol)), ri, (out, of))
    return [out]


def _match_features(walk, lhs, rhs, ri: int, out) -> None:
    """Record which feature goes where, on views in which the group is an axis of its own."""
    left, right = walk.value(lhs[2]), walk.value((*rhs[2], rhs[0].axes[ri]))
    result = walk.value(rhs[2])
    walk.match((lhs[0], (lhs[1],)), (left, (0, 1)))
    walk.match((rhs[0], (rhs[1],)), (right, (0, 1)))
    walk.match((rhs[0], (ri,)), (right, (2,)))
    walk.match((left, (0,)), (right, (0,)))
    walk.match((left, (1,)), (right, (2,)))
    for k in (0, 1):
        walk.match((right, (k,)), (result, (k,)))
    walk.match((left, (0,)), (result, (0,)))
    walk.match((result, (0, 1)), (out[0], (out[1],)))


def _window_axis(eqn, lhs, rhs, k: int, size: int) -> Node:
    """Return the result's node along a spatial axis: the operand's own if the window is trivial, else pinned."""
    p, (value, i), (kernel, j) = eqn.params, lhs, rhs
    trivial = (
        kernel.axes[j].size == 1
        and p["window_strides"][k] == 1
        and tuple(p["padding"][k]) == (0, 0)
        and p["lhs_dilation"][k] == 1
    )
    if trivial:
        return value.axes[i]
    pin(value.axes[i], eqn)
    pin(kernel.axes[j], eqn)
    return Node(size, reason=eqn)


def _give_up(walk, eqn, operands):
    for value in operands:
        walk.pin_value(value, eqn)
    return [walk.fresh(v.aval.shape, eqn) for v in eqn.outvars]


def _without(walk, eqn, value: Value, axes, index: Node | None = None) -> Value:
    kept = [i for i in range(len(value.axes)) if i not in set(axes)]
    out = walk.value((value.axes[i] for i in kept), index)
    for k, i in enumerate(kept):
        walk.link(value, i, out, k, eqn)
    return out


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
def _reduce(walk, eqn, operands):
    return [_without(walk, eqn, operands[0], eqn.params["axes"])]


@rule("argmax", "argmin")
def _argmax(walk, eqn, operands):
    axis = int(eqn.params["axes"][0])
    _no_ties(eqn, operands[0], axis)
    return [_without(walk, eqn, operands[0], (axis,), operands[0].axes[axis])]


def _no_ties(eqn, value: Value, axis: int, keys: int = 1) -> None:
    """Pin an axis whose order decides between equal keys; floating-point keys count as different."""
    if not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars[:keys]):
        pin(value.axes[axis], eqn)


def _ranked(walk, eqn, value: Value, axis: int, size: int, index: Node | None) -> Value:
    out = walk.value((Node(size, reason=eqn) if i == axis else n for i, n in enumerate(value.axes)), index)
    for i in range(len(value.axes)):
        if i != axis:
            walk.link(value, i, out, i, eqn)
    return out


@rule("top_k")
def _top_k(walk, eqn, operands):
    (value,) = operands
    axis = eqn.params.get("axis", len(value.axes) - 1) % len(value.axes)
    k = eqn.params["k"]
    _no_ties(eqn, value, axis)
    return [_ranked(walk, eqn, value, axis, k, None), _ranked(walk, eqn, value, axis, k, value.axes[axis])]


@rule("sort", index=True)
def _sort(walk, eqn, operands):
    axis, first = eqn.params["dimension"], operands[0]
    if len(operands) > 1:
        _no_ties(eqn, first, axis, eqn.params["num_keys"])
    for number, value in enumerate(operands):
        if number < eqn.params["num_keys"]:
            walk.pin_index(value, eqn)
        for i in range(len(first.axes)):
            walk.link(first, i, value, i, eqn)
    results = [_ranked(walk, eqn, v, axis, v.axes[axis].size, v.index) for v in operands]
    for value, out in zip(operands, results, strict=True):
        out.wrapped = value.wrapped
    return results


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulate(walk, eqn, operands):
    return [_pinning(walk, eqn, operands[0], (eqn.params["axis"],))]


@rule("rev")
def _reverse(walk, eqn, operands):
    return [_pinning(walk, eqn, operands[0], eqn.params["dimensions"])]


def _pinning(walk, eqn, value: Value, axes, shape=None) -> Value:
    """Pin the given axes; the others pass."""
    shape = value.shape if shape is None else shape
    for i in axes:
        pin(value.axes[i], eqn)
    out = walk.value(Node(shape[i], reason=eqn) if i in axes else n for i, n in enumerate(value.axes))
    for i in range(len(value.axes)):
        if i not in axes:
            walk.link(value, i, out, i, eqn)
    return out


@rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(walk, eqn, operands):
    p, value = eqn.params, operands[0]
    if len(eqn.outvars) > 1:
        return _give_up(walk, eqn, operands)
    columns = zip(
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        p["base_dilation"],
        p["window_dilation"],
        strict=True,
    )
    touched = [i for i, (w, s, pad, b, _) in enumerate(columns) if (w, s, tuple(pad), b) != (1, 1, (0, 0), 1)]
    return [_pinning(walk, eqn, value, touched, eqn.outvars[0].aval.shape)]


@rule("iota")
def _iota(walk, eqn, _):
    out = walk.fresh(eqn.params["shape"])
    out.index = out.axes[eqn.params["dimension"]]
    walk.indexed.append(out.index)
    return [out]


@rule("random_seed", "random_wrap", "random_unwrap", "random_split", "random_fold_in", "random_bits", "threefry2x32")
def _random(walk, eqn, operands):
    return _give_up(walk, eqn, operands)
