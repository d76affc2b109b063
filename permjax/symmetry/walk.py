"""The walk over a jaxpr: every intermediate value gets axes made of factors, every equation adds constraints."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from permjax.symmetry.factors import Node, pin, unite


class Value:
    """What the walk knows of one intermediate value.

    Attributes:
        axes: one node per axis.
        context: scan axes that accompany the value inside loop bodies.
        index: node whose positions the (integer) values name, as `argmax` and `iota` give.
        wrapped: the same after adding the axis size, as in `where(i < 0, i + n, i)`.
        never: whether this is a comparison that is false for every position.
        const: the value of a scalar literal.
    """

    __slots__ = ("axes", "const", "context", "index", "never", "wrapped")

    def __init__(self, axes: Iterable[Node], context: tuple[Node, ...] = (), index: Node | None = None):
        self.axes, self.context, self.index = tuple(axes), context, index
        self.wrapped: Node | None = None
        self.never = False
        self.const: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(n.size for n in self.axes)


Place = tuple[Value, tuple[int, ...], int, int]
"""A value, a block of its axes (negative: context), and start and size within the axis if the block is a single one."""


class Equation:
    """The identity maps of one equation: pairs of places whose positions correspond one to one.

    All values of an equation share their context position by position; where a scan hands its carry on (`loop`), the
    innermost one moves from one layer to the next instead.
    """

    __slots__ = ("links", "loop")

    def __init__(self, loop: bool = False) -> None:
        self.links: list[tuple[Place, Place]] = []
        self.loop = loop


Rule = Callable[["Walk", Any, list[Value]], Sequence[Value]]
CALLS = frozenset(
    """jit pjit closed_call core_call call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    custom_lin composite""".split()
)
REGIONS = CALLS | {"scan", "while", "cond"}
RULES: dict[str, Rule] = {}
KEEPS_INDEX: set[str] = set()


def rule(*names: str, index: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for primitives by name; `index` says that it knows what to do with position values."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            if index:
                KEEPS_INDEX.add(name)
        return function

    return register


class Walk:
    """State of one walk: all values, all equations, and how many equations were visited."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.equations: list[Equation] = []
        self.equation = Equation()
        self.indexed: list[Node] = []
        self.looked_up: list[int] = []
        self.context: tuple[Node, ...] = ()
        self.visited = 0

    # -- what rules use ------------------------------------------------------------------------------------------

    def value(self, axes: Iterable[Node], index: Node | None = None) -> Value:
        """Return a new value of the current context."""
        made = Value(axes, self.context, index)
        self.values.append(made)
        if index is not None:
            self.indexed.append(index)
        return made

    def fresh(self, shape: Iterable[int], reason: Any = None) -> Value:
        """Return a value whose axes are all new; pinned if a reason is given."""
        return self.value(Node(int(n), reason=reason) for n in shape)

    def link(self, u: Value, i: int, w: Value, j: int, reason: Any) -> None:
        """Unite axis `i` of `u` with axis `j` of `w`, position by position."""
        unite(u.axes[i], w.axes[j], reason)
        self.match((u, (i,)), (w, (j,)))

    def match(
        self, u: tuple[Value, Sequence[int]], w: tuple[Value, Sequence[int]], start=(0, 0), size: int = 0
    ) -> None:
        """Record that two blocks of axes, or `size` positions from `start` of two single axes, correspond."""
        self.equation.links.append(((u[0], tuple(u[1]), start[0], size), (w[0], tuple(w[1]), start[1], size)))

    def like(self, operand: Value, eqn: Any, index: Node | None = None) -> Value:
        """Return the result of an equation that leaves every axis of its operand alone."""
        out = self.value(operand.axes, index)
        for i in range(len(operand.axes)):
            self.link(operand, i, out, i, eqn)
        return out

    def keep(self, operand: Value, eqn: Any) -> Value:
        """Return the result of an equation that leaves axes and values alone."""
        out = self.like(operand, eqn, operand.index)
        out.wrapped, out.never, out.const = operand.wrapped, operand.never, operand.const
        self.moved(operand, out, range(len(operand.axes)))
        return out

    def moved(self, value: Value, out: Value, order: Sequence[int] | None) -> None:
        """Hear that `out` is `value` with its axes in the given order (None: rearranged in some other way)."""

    def pin_value(self, value: Value, reason: Any) -> None:
        """Pin all axes of a value and the axis that its positions name."""
        for node in value.axes:
            pin(node, reason)
        self.pin_index(value, reason)

    def pin_index(self, value: Value, reason: Any) -> None:
        """Pin the axis whose positions a value names: the equation does with them what no permutation survives."""
        for node in (value.index, value.wrapped):
            if node is not None:
                pin(node, reason)

    # -- the walk ------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Value]) -> list[Value]:
        """Walk a jaxpr (open or closed) and return the values of its outputs."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        consts = getattr(jaxpr, "consts", None) or consts
        known: dict[Any, Value] = {}
        for var, const in zip(inner.constvars, consts, strict=True):
            known[var] = const if isinstance(const, Value) else self.constant(const)
        known.update(zip(inner.invars, operands, strict=True))
        dead = _dead(inner)
        for eqn in inner.eqns:
            if id(eqn) in dead:
                self.visited += count(eqn)
                continue
            operands = [self.read(known, v) for v in eqn.invars]
            known.update(zip(eqn.outvars, self.apply(eqn, operands), strict=True))
        return [self.read(known, v) for v in inner.outvars]

    def apply(self, eqn: Any, operands: list[Value]) -> Sequence[Value]:
        """Return the results of one equation and record its constraints."""
        name = eqn.primitive.name
        self.visited += 1
        outer, self.equation = self.equation, Equation()
        self.equations.append(self.equation)
        if name not in KEEPS_INDEX:
            for value in operands:
                self.pin_index(value, eqn)
        results = RULES.get(name, unknown)(self, eqn, operands)
        self.equation = outer
        return results

    def read(self, known: dict[Any, Value], var: Any) -> Value:
        """Return the value of a variable or literal."""
        if not isinstance(var, Literal):
            return known[var]
        return self.constant(np.asarray(var.val))

    def constant(self, array: Any) -> Value:
        """Return a closed-over array: pinned along the axes on which its values vary, free along the others."""
        reason = "a constant that the function closes over"
        if hasattr(array, "dtype") and jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            return self.fresh(array.shape, reason)
        array = np.asarray(array) if hasattr(array, "shape") or np.isscalar(array) else np.zeros(())
        varies = [n > 1 and bool((array != array.take([0], i)).any()) for i, n in enumerate(array.shape)]
        made = self.value(Node(n, reason=reason if v else None) for n, v in zip(array.shape, varies, strict=True))
        made.const = array[()] if array.ndim == 0 else None
        return made


def _dead(jaxpr: Any) -> set[int]:
    """Return the ids of equations whose results nothing uses, as when only the shape of a value was asked for."""
    used = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    dead = set()
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in used for v in eqn.outvars):
            used.update(v for v in eqn.invars if not isinstance(v, Literal))
        else:
            dead.add(id(eqn))
    return dead


def count(eqn: Any) -> int:
    """Return how many equations a walk visits for one: itself and those in its bodies."""
    bodies = [body_of(eqn), *(eqn.params.get(k) for k in ("cond_jaxpr", "body_jaxpr")), *eqn.params.get("branches", ())]
    inner = [getattr(b, "jaxpr", b) for b in bodies if b is not None] if eqn.primitive.name in REGIONS else []
    return 1 + sum(count(e) for jaxpr in inner for e in jaxpr.eqns)


def body_of(eqn: Any) -> Any:
    """Return the jaxpr that a call-like equation runs, or None."""
    return next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)


def unknown(walk: Walk, eqn: Any, operands: list[Value]) -> list[Value]:
    """Pin every operand and result of a primitive without a rule."""
    for value in operands:
        walk.pin_value(value, eqn)
    return [walk.fresh(v.aval.shape, eqn) for v in eqn.outvars]
