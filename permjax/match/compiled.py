"""Weight matching as one compiled program: many starts and many models side by side, on the devices they lie on.

A program knows no skipping and no float64, so what it finds is a start for the audited ascent of `weight_matching`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax import tree
from permjax.match.ascent import kernels_of
from permjax.match.assignment import Solver, solve
from permjax.match.nested import Nest, solve_nested, total
from permjax.match.problem import DEVICE, Problem, State, leaves_of, lying, structure
from permjax.parallel import model_mesh, pmap_models
from permjax.permutation import Permutations
from permjax.symmetry.blocks import move
from permjax.symmetry.spec import PermutationSpec

_RTOL = 1e-6  # smallest gain that float32 can tell from none, as a share of the squared norms


class Ascent(NamedTuple):
    """Where a compiled ascent ended.

    Attributes:
        permutations: group -> int32 `[*per, n]`.
        objective: inner product with the anchor, float32.
        sweeps: sweeps made.
        converged: whether no group could improve in the last one.
    """

    permutations: Permutations
    objective: Float[Array, ""]
    sweeps: Int[Array, ""]
    converged: Bool[Array, ""]


def compiled_ascent(
    spec: PermutationSpec,
    anchor: Mapping[str, Any],
    other: Mapping[str, Any],
    start: Mapping[str, Any],
    *,
    leaves: Sequence[str],
    solver: Solver = "auction",
    max_sweeps: int = 100,
) -> Ascent:
    """Block coordinate ascent on `<a, permute(p, b)>` from a start, for use under `jit` and `vmap`.

    Args:
        spec: the symmetry.
        anchor: named leaves of the anchor.
        other: named leaves of the other model.
        start: permutations to start from, group -> int array `[*per, n]`.
        leaves: names of the leaves that count.
        solver: `"auction"` or `"optax"`, which work under a trace, or such a function.
        max_sweeps: upper limit.

    Example:
        >>> best = jax.vmap(lambda start: compiled_ascent(spec, a, b, start, leaves=names))(starts)
    """
    known = structure(spec, tuple(leaves))
    values = (leaves_of(known, anchor), leaves_of(known, other))
    problem = Problem(spec, known, values[0], 0.0, DEVICE, solver)
    views = [[DEVICE.view(b.layout, leaf) for b, leaf in zip(known.blocks, side, strict=True)] for side in values]
    mass = sum(_dot(x, x) for side in views for x in side)
    nest = Nest(known.per, partial(solve, solver=solver))

    def state(permutations: Permutations) -> State:
        return State(values[1], np.zeros(len(values[1])), permutations, 0.0, {})

    def objective(permutations: Permutations) -> Float[Array, ""]:
        blocks = [lying(problem, state(permutations), i) for i in range(len(known.blocks))]
        return jnp.stack([_dot(x, y) for x, y in zip(views[0], blocks, strict=True)]).sum()

    def improve(root: str, permutations: Permutations, value: Array) -> tuple[Permutations, Array]:
        kernels = kernels_of(problem, state(permutations), root, known.terms[root])
        found = solve_nested(nest, kernels, root)
        rows = {g: total(row, tuple((h, 0) for h in (*known.per[g], g))) for g, row in found.items()}
        after = {g: move(known.indices[g], rows, p) for g, p in permutations.items()}
        gained = objective(after)
        better = gained > value + _RTOL * mass
        return jax.tree.map(partial(jnp.where, better), after, permutations), jnp.where(better, gained, value)

    def sweep(carry: Ascent) -> Ascent:
        permutations, value = carry.permutations, carry.objective
        for root in known.order:
            permutations, value = improve(root, permutations, value)
        return Ascent(permutations, value, carry.sweeps + 1, value <= carry.objective)

    begin = {g: jnp.asarray(p, jnp.int32) for g, p in start.items()}
    first = Ascent(begin, objective(begin), jnp.int32(0), jnp.bool_(False))
    return jax.lax.while_loop(lambda x: ~x.converged & (x.sweeps < max_sweeps), sweep, first)


def best_ends(
    spec: PermutationSpec,
    anchor: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    starts: Sequence[Sequence[Mapping[str, Any]]],
    *,
    leaves: Sequence[str],
    solver: Solver = "auction",
    max_sweeps: int = 100,
) -> list[Permutations]:
    """The best end of several compiled ascents for each model: models over devices, starts side by side.

    Args:
        spec: the symmetry.
        anchor: named leaves of the anchor.
        others: named leaves of each other model.
        starts: for each of them equally many permutations to start from.
        leaves: names of the leaves that count.
        solver: see `compiled_ascent`.
        max_sweeps: upper limit for every ascent.
    """
    mesh = model_mesh(jax.devices()[: len(others)])
    stacked = tree.stack([{n: jnp.asarray(leaf[n]) for n in leaves} for leaf in others])
    begun = tree.stack([tree.stack([{g: jnp.asarray(p) for g, p in s.items()} for s in row]) for row in starts])
    run = _search(spec, tuple(leaves), solver, max_sweeps, mesh)
    found = jax.device_get(run((stacked, begun), {n: jnp.asarray(anchor[n]) for n in leaves}))
    best = found.objective.argmax(axis=1)
    return [{g: p[m, i] for g, p in found.permutations.items()} for m, i in enumerate(best)]


@lru_cache(maxsize=16)
def _search(spec: PermutationSpec, leaves: tuple[str, ...], solver: Solver, max_sweeps: int, mesh: Any) -> Any:
    def search(model: tuple[Mapping[str, Any], Mapping[str, Any]], anchor: Mapping[str, Any]) -> Ascent:
        other, starts = model
        run = partial(compiled_ascent, spec, anchor, other, leaves=leaves, solver=solver, max_sweeps=max_sweeps)
        return jax.vmap(run)(starts)

    return pmap_models(search, mesh)


def _dot(x: Any, y: Any) -> Float[Array, ""]:
    x, y = (v.astype(np.result_type(np.float32, v.dtype)).reshape(-1) for v in (x, y))
    return jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)
