"""Run a jaxpr again and keep the results of chosen equations, also those inside calls and scans."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from permjax.symmetry.regions import scan_split
from permjax.symmetry.walk import CALLS, body_of, count

Taps = dict[int, tuple[list[Any], list[Any]]]
"""Number of an equation -> its operands and results; inside a scan they are stacked along a leading axis."""


def replay(jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any], wanted: set[int], start: int = 1):
    """Evaluate a jaxpr and return (outputs, taps of the wanted equations, number after the last equation).

    Equations are numbered in the order in which `Walk.run` visits them. Values inside `while` and `cond` are not kept.
    Traceable: works under `jit`, `vmap` and `grad`.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    known: dict[Any, Any] = dict(zip(inner.constvars, getattr(jaxpr, "consts", None) or consts, strict=True))
    known.update(zip(inner.invars, operands, strict=True))
    taps: Taps = {}
    for eqn in inner.eqns:
        values = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
        end = start + count(eqn)
        results = _evaluate(eqn, values, wanted, start, taps) if wanted & set(range(start, end)) else _bind(eqn, values)
        if start in wanted:
            taps[start] = (values, results)
        known.update(zip(eqn.outvars, results, strict=True))
        start = end
    return [v.val if isinstance(v, Literal) else known[v] for v in inner.outvars], taps, start


def _evaluate(eqn: Any, values: list[Any], wanted: set[int], start: int, taps: Taps) -> list[Any]:
    if eqn.primitive.name in CALLS:
        results, found, _ = replay(body_of(eqn), (), values, wanted, start + 1)
        taps.update(found)
        return results
    if eqn.primitive.name == "scan":
        return _scan(eqn, values, wanted, start, taps)
    return _bind(eqn, values)


def _scan(eqn: Any, values: list[Any], wanted: set[int], start: int, taps: Taps) -> list[Any]:
    consts, carries = scan_split(eqn)

    def body(carry, xs):
        outs, found, _ = replay(eqn.params["jaxpr"], (), [*values[:consts], *carry, *xs], wanted, start + 1)
        return outs[:carries], (outs[carries:], found)

    carry, xs = values[consts : consts + carries], values[consts + carries :]
    options: Mapping[str, Any] = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, (ys, found) = jax.lax.scan(body, carry, xs, **options)
    taps.update(found)
    return [*carry, *ys]


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
