"""A jaxpr run step by step: it stops at every contraction with a leaf and goes on with what it is handed.

So that several copies of one program can run side by side and share the work of their weights, weights can be fitted
in the middle of a run, and nothing but the contractions has to know of it.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from permjax.symmetry.regions import scan_split
from permjax.symmetry.walk import CALLS, body_of


@dataclass(frozen=True)
class Ref:
    """A leaf that has not been read yet.

    Attributes:
        leaf: its name.
        axes: which axis of the leaf each axis of this value is.
        dtype: of the value; the leaf is cast to it.
        at: (axis of the leaf, position) where a loop over that axis stands.
    """

    leaf: str
    axes: tuple[int, ...]
    dtype: Any
    at: tuple[tuple[int, int], ...] = ()

    def of(self, array: Any) -> Any:
        """Return the value, given the leaf as an array of any width."""
        picked = dict(self.at)
        array = array[tuple(picked.get(i, slice(None)) for i in range(array.ndim))] if picked else array
        left = sorted(self.axes)
        order = tuple(left.index(i) for i in self.axes)
        array = array if order == tuple(range(len(order))) else array.transpose(order)
        return array if array.dtype == self.dtype else array.astype(self.dtype)


class Use(NamedTuple):
    """A contraction or convolution of a leaf with a value.

    Attributes:
        eqn: the equation, `dot_general` or `conv_general_dilated`.
        ref: the leaf.
        side: which operand it is, 0 or 1.
        other: the other operand.
    """

    eqn: Any
    ref: Ref
    side: int
    other: Any

    def result(self, array: Any, other: Any = None) -> Any:
        """Return what the equation gives for a leaf; `other` replaces the other operand."""
        value = jnp.asarray(self.ref.of(array))
        operands = [value, self.other if other is None else other]
        return bind(self.eqn, operands[::-1] if self.side else operands)[0]

    @property
    def contracted(self) -> tuple[int, ...]:
        """The axes of the leaf that are summed over (the input features; not the window of a convolution)."""
        if self.eqn.primitive.name == "conv_general_dilated":
            return (self.ref.axes[self.eqn.params["dimension_numbers"].rhs_spec[1]],)
        return tuple(self.ref.axes[int(i)] for i in self.eqn.params["dimension_numbers"][0][self.side])

    @property
    def made(self) -> tuple[int, ...]:
        """The axes of the leaf that the result has: those of both operands first, then the output features."""
        if self.eqn.primitive.name == "conv_general_dilated":
            return (self.ref.axes[self.eqn.params["dimension_numbers"].rhs_spec[0]],)
        summed, batch = (tuple(map(int, d[self.side])) for d in self.eqn.params["dimension_numbers"])
        free = (i for i in range(len(self.ref.axes)) if i not in summed and i not in batch)
        return tuple(self.ref.axes[i] for i in (*batch, *free))


class Survey(NamedTuple):
    """How a function uses its leaves: contractions in forward order (their `other` is a tracer that must not be used),
    leaves used in other ways, and leaves that are computed with before they are contracted.
    """

    uses: tuple[Use, ...]
    fetched: frozenset[str]
    derived: frozenset[str]


class _Derived(NamedTuple):
    """A value made of leaves alone."""

    value: Any
    leaves: frozenset[str]


Program: TypeAlias = Generator[Use, Any, list[Any]]
"""Yields every `Use`, takes its result, and returns the outputs."""

_ALIASES = frozenset(("convert_element_type", "copy", "copy_p"))


def steps(
    apply: Callable,
    params: Any,
    *inputs: Any,
    fetch: Callable[[Ref], Any],
    derived: Callable[[frozenset[str]], None] = lambda _: None,
    memo: dict[Any, Any] | None = None,
) -> Program:
    """Return `apply(params, *inputs)` as a program. Loops (`scan`) that use leaves are unrolled.

    Args:
        apply: the function.
        params: pytree of arrays or `jax.ShapeDtypeStruct`, of which only structure, shapes and dtypes are used.
        *inputs: arrays, also traced ones.
        fetch: the value of a leaf that is used in another way than by a contraction or convolution.
        derived: told the leaves of a contraction with something that was computed from leaves before.
        memo: copies of a program that run side by side share it, so that what they do to the same objects is done once;
            it holds results until it is cleared.
    """
    params, given = jax.tree.map(_abstract, params), jax.tree.map(_abstract, inputs)
    leaves, structure = jax.tree.flatten((params, given))
    closed = _traced(apply, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    refs = [
        Ref(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(range(len(leaf.shape))), leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    run = _Run(fetch, derived, {} if memo is None else memo, memo is not None)
    return run.run(closed, closed.consts, [*refs, *jax.tree.leaves(inputs)])


@lru_cache(maxsize=32)
def _traced(apply: Callable, structure: Any, leaves: tuple) -> Any:
    """Return the jaxpr; copies of a program get the same one."""
    params, inputs = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.make_jaxpr(apply)(params, *inputs)


def survey(apply: Callable, params: Any, *inputs: Any) -> Survey:
    """Return how `apply(params, *inputs)` uses its leaves; nothing is computed."""
    uses: list[Use] = []
    fetched: set[str] = set()
    derived: set[str] = set()
    named = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(params)
    }

    def run(*inputs: Any) -> list[Any]:
        def fetch(ref: Ref) -> Any:
            fetched.add(ref.leaf)
            return jnp.zeros(jnp.shape(named[ref.leaf]), jnp.result_type(named[ref.leaf]))

        program, reply = steps(apply, params, *inputs, fetch=fetch, derived=derived.update), None
        while True:
            try:
                use = program.send(reply)
            except StopIteration as stop:
                return stop.value
            uses.append(use)
            aval = use.eqn.outvars[0].aval
            reply = jnp.zeros(aval.shape, aval.dtype)

    jax.eval_shape(run, *inputs)
    return Survey(tuple(uses), frozenset(fetched), frozenset(derived))


class _Run:
    def __init__(self, fetch: Callable, derived: Callable, memo: dict[Any, Any], shares: bool) -> None:
        self.fetch, self.derived, self.memo, self.shares = fetch, derived, memo, shares

    def run(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> Program:
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Any] = dict(zip(inner.constvars, getattr(jaxpr, "consts", None) or consts, strict=True))
        known.update(zip(inner.invars, operands, strict=True))
        del operands
        last = _last_uses(inner)
        for number, eqn in enumerate(inner.eqns):
            values = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            for v in last.get(number, ()):
                known.pop(v, None)
            known.update(zip(eqn.outvars, (yield from self.evaluate(eqn, values)), strict=True))
        outputs = [v.val if isinstance(v, Literal) else known[v] for v in inner.outvars]
        return [self.read(v) if isinstance(v, Ref) else _plain(v) for v in outputs]

    def evaluate(self, eqn: Any, values: list[Any]) -> Program:
        name, refs = eqn.primitive.name, [v for v in values if isinstance(v, Ref)]
        if refs and name in CALLS:
            return (yield from self.run(body_of(eqn), (), values))
        if refs and name == "scan":
            return (yield from self.scan(eqn, values))
        if refs and name in _ALIASES:
            return [replace(refs[0], dtype=eqn.outvars[0].aval.dtype)]
        if refs and name == "transpose":
            return [replace(refs[0], axes=tuple(refs[0].axes[i] for i in eqn.params["permutation"]))]
        if name in ("dot_general", "conv_general_dilated"):
            side = next((i for i, v in enumerate(values) if isinstance(v, Ref)), None)
            if side is not None and not isinstance(values[1 - side], Ref | _Derived):
                return [(yield Use(eqn, values[side], side, values[1 - side]))]
            self.note_derived(values)
        return self.bound(eqn, values)

    def scan(self, eqn: Any, values: list[Any]) -> Program:
        consts, carries = scan_split(eqn)
        carry, rows = values[consts : consts + carries], values[consts + carries :]
        length, found = eqn.params["length"], []
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        for i in order:
            layer = [self.once(("row", i), [v], lambda v=v, i=i: _row(v, i)) for v in rows]
            outs = yield from self.run(eqn.params["jaxpr"], (), [*values[:consts], *carry, *layer])
            carry = outs[:carries]
            found.append(outs[carries:])
        found = found[::-1] if eqn.params["reverse"] else found
        return [*carry, *(jnp.stack(column) for column in zip(*found, strict=True))]

    def bound(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluate an equation as it stands; what is made of leaves alone stays marked as such."""
        leaves = frozenset().union(*(_leaves(v) for v in values))
        made_of_leaves = bool(leaves) and all(_leaves(v) or jnp.ndim(v) == 0 for v in values)
        operands = [self.read(v) if isinstance(v, Ref) else _plain(v) for v in values]
        results = self.once(id(eqn), operands, lambda: bind(eqn, operands))
        return [_Derived(r, leaves) for r in results] if made_of_leaves else results

    def read(self, ref: Ref) -> Any:
        array = self.fetch(ref)
        return self.once(ref, [array], lambda: jnp.asarray(ref.of(array)))

    def once(self, what: Any, operands: Sequence[Any], make: Callable[[], Any]) -> Any:
        """Return what is made of some objects, made before if another copy of the program made it."""
        if not self.shares:
            return make()
        key = (what, *map(id, operands))
        if key not in self.memo:
            self.memo[key] = make(), operands  # the operands are kept, so that no other object gets their id
        return self.memo[key][0]

    def note_derived(self, values: list[Any]) -> None:
        marks = [_leaves(v) for v in values]
        if any(marks) and not all(marks):
            self.derived(frozenset().union(*marks))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation."""
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _row(value: Any, i: int) -> Any:
    if not isinstance(value, Ref):
        return _plain(value)[i]
    return replace(value, axes=value.axes[1:], at=(*value.at, (value.axes[0], i)))


def _leaves(value: Any) -> frozenset[str]:
    if isinstance(value, Ref):
        return frozenset((value.leaf,))
    return value.leaves if isinstance(value, _Derived) else frozenset()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Derived) else value


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Return which variables are needed no more after each equation."""
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    last: dict[Any, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        last.update((v, number) for v in eqn.invars if not isinstance(v, Literal))
    found: dict[int, list[Any]] = {}
    for v, number in last.items():
        if v not in kept:
            found.setdefault(number, []).append(v)
    return found


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
