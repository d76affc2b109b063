"""Find the permutation symmetries of any JAX function by walking its jaxpr."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal as JaxprLiteral

from permjax import tree
from permjax.symmetry import rules  # noqa: F401  (registers the rules)
from permjax.symmetry.groups import build_spec
from permjax.symmetry.regions import scan_split
from permjax.symmetry.spec import PermutationSpec, Role
from permjax.symmetry.verify import verify as verify_spec
from permjax.symmetry.walk import Value, Walk, body_of

VERIFY_LIMIT = 200_000_000
"""Number of parameters up to which `verify="auto"` verifies."""


def trace_spec(
    apply: Callable,
    params: Any,
    *inputs: Any,
    verify: bool | Literal["auto"] = "auto",
    unused: Sequence[str] = (),
    frozen: Sequence[str] = (),
    statistics: Sequence[str] = ("batch_stats/*", "*running_*"),
    on_failure: Literal["raise", "pin"] = "raise",
    seed: int = 0,
) -> PermutationSpec:
    """Return every permutation of units that leaves `apply(params, *inputs)` unchanged, found from its jaxpr.

    The walk unites axes that must move together and pins whatever it does not understand, so the result is sound; it
    is then checked with random permutations on random weights. `apply` must return only what has to stay invariant,
    and run in evaluation mode (new BatchNorm statistics in the result would pin every channel).

    Args:
        apply: pure function `apply(params, *inputs) -> outputs`.
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
        *inputs: example inputs, concrete or abstract. Their axes and those of the outputs never move.
        verify: whether to check the spec numerically; "auto" does so up to 200 M parameters.
        unused: names or patterns of leaves that may have no effect; they are pinned.
        frozen: names or patterns of leaves that are pinned, such as "*inv_freq".
        statistics: names or patterns of leaves that are permuted but never enter costs or distances.
        on_failure: what to do with a group that fails verification: raise, or pin it.
        seed: seed of the random check.

    Returns:
        The spec; `spec.explain()` tells what pinned the other axes.

    Raises:
        ValueError: a leaf reaches no output, or a group fails verification (both named).

    Example:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
        >>> spec = trace_spec(apply, {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}, jnp.ones((1, 4)))
        >>> [g.name for g in spec.groups]
        ['w1:1']
    """
    abstract = jax.tree.map(_abstract, params)
    arguments = tuple(jax.tree.map(_abstract, i) for i in inputs)
    closed = jax.make_jaxpr(apply)(abstract, *arguments)
    named = tree.flatten(abstract)
    roles: dict[str, Role] = {n: _role(n, a, frozen, statistics) for n, a in named.items()}
    _check_reach(closed, list(named), unused)
    walk, leaves = walk_jaxpr(closed, named, roles, unused, arguments)
    spec = build_spec(walk, leaves, roles)
    count = sum(int(np.prod(a.shape)) for a in named.values())
    if verify is True or (verify == "auto" and count <= VERIFY_LIMIT):
        bound = min(walk.looked_up, default=None)
        spec = verify_spec(apply, params, spec, *inputs, seed=seed, on_failure=on_failure, bound=bound)
    return spec


def walk_jaxpr(closed, named, roles, unused, arguments) -> tuple[Walk, dict[str, Value]]:
    """Walk a closed jaxpr whose first inputs are the named leaves; inputs, outputs and constants are pinned."""
    walk = Walk()
    leaves = {name: walk.fresh(a.shape) for name, a in named.items()}
    for name, value in leaves.items():
        if any(fnmatch(name, pattern) for pattern in unused):
            walk.pin_value(value, "listed as unused")
        elif roles[name] == "frozen":
            walk.pin_value(value, "frozen by name, or not a floating-point leaf")
    given = [walk.fresh(a.shape, "an input of the function") for a in jax.tree.leaves(arguments)]
    for value in walk.run(closed, closed.consts, [*leaves.values(), *given]):
        walk.pin_value(value, "an output of the function")
    return walk, leaves


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _role(name: str, leaf: Any, frozen: Sequence[str], statistics: Sequence[str]) -> Role:
    if any(fnmatch(name, p) for p in frozen) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return "frozen"
    return "statistic" if any(fnmatch(name, p) for p in statistics) else "weight"


def _check_reach(closed: Any, names: list[str], unused: Sequence[str]) -> None:
    inner = getattr(closed, "jaxpr", closed)
    used = reaching(closed, [True] * len(inner.outvars))
    lost = [n for n, u in zip(names, used, strict=False) if not u and not any(fnmatch(n, p) for p in unused)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(
            f"leaf '{lost[0]}'{more} has no effect on the output, so it carries no symmetry to find; "
            f"check `apply`, or list it: unused={lost[:3]!r}."
        )


def reaching(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Return for every input of a jaxpr whether it can reach one of the wanted outputs."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    live = {v for v, w in zip(inner.outvars, wanted, strict=True) if w and not isinstance(v, JaxprLiteral)}
    for eqn in reversed(inner.eqns):
        flags = [v in live for v in eqn.outvars]
        if any(flags) or eqn.effects:
            needed = _needed(eqn, flags)
            live |= {v for v, n in zip(eqn.invars, needed, strict=True) if n and not isinstance(v, JaxprLiteral)}
    return [v in live for v in inner.invars]


def _needed(eqn: Any, flags: list[bool]) -> list[bool]:
    body = body_of(eqn)
    if eqn.primitive.name == "scan":
        return _needed_by_scan(eqn, flags)
    if body is None or len(getattr(body, "jaxpr", body).invars) != len(eqn.invars):
        return [True] * len(eqn.invars)
    return reaching(body, flags)


def _needed_by_scan(eqn: Any, flags: list[bool]) -> list[bool]:
    consts, carries = scan_split(eqn)
    while True:
        needed = reaching(eqn.params["jaxpr"], flags)
        grown = [f or n for f, n in zip(flags[:carries], needed[consts : consts + carries], strict=True)]
        if grown == flags[:carries]:
            return needed
        flags = [*grown, *flags[carries:]]
