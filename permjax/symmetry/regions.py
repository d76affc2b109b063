"""Rules of primitives that hold jaxprs: calls, loops and branches. Bodies are walked once."""

from typing import Any

from permjax.symmetry.factors import Node, unite
from permjax.symmetry.walk import CALLS, Equation, Value, Walk, body_of, rule


@rule(*CALLS, index=True)
def _call(walk, eqn, operands):
    return walk.run(body_of(eqn), (), operands)


def scan_split(eqn: Any) -> tuple[int, int]:
    """Return the numbers of constants and carries of a scan, read off the shapes (the same in every jax version)."""
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    sliced = [len(o.aval.shape) > len(i.aval.shape) for o, i in zip(eqn.invars, body.invars, strict=True)]
    stacked = [len(o.aval.shape) > len(i.aval.shape) for o, i in zip(eqn.outvars, body.outvars, strict=True)]
    carries = len(stacked) - sum(stacked)
    return len(sliced) - sum(sliced) - carries, carries


@rule("scan")
def _scan(walk, eqn, operands):
    consts, carries = scan_split(eqn)
    layer = Node(eqn.params["length"], reason=eqn)
    stacked = operands[consts + carries :]
    for value in stacked:
        unite(value.axes[0], layer, eqn)
    walk.context = (*walk.context, layer)
    inside = [_enter(walk, v) for v in operands[:consts]]
    inside += [_carry(walk, v) for v in operands[consts : consts + carries]]
    inside += [_slice_layer(walk, v) for v in stacked]
    outs = walk.run(eqn.params["jaxpr"], (), inside)
    for value in outs:
        walk.pin_index(value, eqn)
    walk.context = walk.context[:-1]
    _loop(walk, outs[:carries], inside[consts : consts + carries], eqn)
    return [*(_leave(walk, v) for v in outs[:carries]), *(_stack_layer(walk, v, layer) for v in outs[carries:])]


def _enter(walk: Walk, value: Value) -> Value:
    """Return the body's view of a value from outside: the same axes, accompanied by the layer index."""
    view = _carry(walk, value)
    view.const = value.const
    return view


def _carry(walk: Walk, value: Value) -> Value:
    """Return the body's view of a carry: the same axes, but what it holds at the start it does not keep."""
    view = walk.value(value.axes)
    for i in range(len(value.axes)):
        walk.match((value, (i,)), (view, (i,)))
    walk.moved(value, view, range(len(value.axes)))
    return view


def _slice_layer(walk: Walk, value: Value) -> Value:
    """Return one layer of a stacked value: its leading axis becomes the context."""
    view = walk.value(value.axes[1:])
    for i in range(1, len(value.axes)):
        walk.match((value, (i,)), (view, (i - 1,)))
    walk.match((value, (0,)), (view, (-len(view.context),)))
    walk.moved(value, view, range(1, len(value.axes)))
    return view


def _stack_layer(walk: Walk, value: Value, layer: Node) -> Value:
    """Return the stack of a body's result: the context becomes the leading axis."""
    out = walk.value((layer, *value.axes))
    for i in range(len(value.axes)):
        walk.match((value, (i,)), (out, (i + 1,)))
    walk.match((value, (-len(value.context),)), (out, (0,)))
    return out


def _leave(walk: Walk, value: Value) -> Value:
    """Return the final carry outside: it belongs to no layer."""
    out = walk.value(value.axes)
    for i in range(len(value.axes)):
        walk.match((value, (i,)), (out, (i,)))
    return out


def _loop(walk: Walk, outs, ins, eqn) -> None:
    """Tie what a body returns to what it takes: position by position, but from one layer to the next."""
    outer, walk.equation = walk.equation, Equation(loop=True)
    walk.equations.append(walk.equation)
    for out, carried in zip(outs, ins, strict=True):
        for i in range(len(out.axes)):
            walk.link(out, i, carried, i, eqn)
    walk.equation = outer


@rule("while")
def _while(walk, eqn, operands):
    p = eqn.params
    tests, consts = p["cond_nconsts"], p["body_nconsts"]
    carry = [_carry(walk, v) for v in operands[tests + consts :]]
    stopped = walk.run(p["cond_jaxpr"], (), [*operands[:tests], *carry])
    outs = walk.run(p["body_jaxpr"], (), [*operands[tests : tests + consts], *carry])
    for value in (*stopped, *outs):
        walk.pin_index(value, eqn)
    for out, carried in zip(outs, carry, strict=True):
        for i in range(len(out.axes)):
            walk.link(out, i, carried, i, eqn)
    return [walk.like(v, eqn) for v in outs]


@rule("cond")
def _cond(walk, eqn, operands):
    which, *rest = operands
    walk.pin_value(which, eqn)
    branches = [walk.run(b, (), rest) for b in eqn.params["branches"]]
    results = []
    for values in zip(*branches, strict=True):
        out = walk.value(Node(n) for n in values[0].shape)
        for value in values:
            walk.pin_index(value, eqn)
            for i in range(len(value.axes)):
                walk.link(value, i, out, i, eqn)
        results.append(out)
    return results
