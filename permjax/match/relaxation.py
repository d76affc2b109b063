"""Matching relaxed to doubly stochastic matrices, and Frank-Wolfe ascent on it: all groups of all models move at once.

With a fixed model `c` (zero if there is none) and soft permutations `X_m` of the others, the objective is
`sum_m <c + sum_{k<m} X_k b_k, X_m b_m>`: every pair once. Where the matrices are hard it is that of weight matching.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from permjax.match.assignment import Solver, solve
from permjax.match.line_search import best_step, degree, samples, slope
from permjax.match.objective import scale
from permjax.match.soft import Soft, mix
from permjax.permutation import Permutations, as_matrix
from permjax.symmetry.blocks import Block, extract, unfold
from permjax.symmetry.spec import PermutationSpec


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What stays the same during an ascent.

    Attributes:
        levels: group names by the number of groups that index them, deepest first.
        kinds: one block for every kind of block; blocks of a kind are stacked.
        fixed: entries of the model that does not move, by kind, `[blocks, *shape]`.
        moving: entries of the models that move, by kind, `[models, blocks, *shape]`.
        order: degree of the objective along a line.
        scale: the unit of objective, gains and gap: `sum_{m<k} |b_m| |b_k|` over all models.
        solver: the assignment solver.
    """

    levels: tuple[tuple[str, ...], ...]
    kinds: tuple[Block, ...]
    fixed: tuple[Array, ...]
    moving: tuple[Array, ...]
    order: int
    scale: float
    solver: Solver


class Course(NamedTuple):
    """How an ascent went, for every run.

    Attributes:
        objective: at the start and after every iteration, float64.
        gap: the Frank-Wolfe gap `max_S <gradient, S - X>` at the end, which is zero only where `X` is stationary.
        iterations: steps taken.
        converged: whether it ended because no step could gain, and not at the upper limit.
    """

    objective: Float[np.ndarray, "iterations runs"]
    gap: Float[np.ndarray, " runs"]
    iterations: Int[np.ndarray, " runs"]
    converged: Bool[np.ndarray, " runs"]


def relax(
    spec: PermutationSpec, fixed: Mapping[str, Any] | None, moving: Sequence[Mapping[str, Any]], solver: Solver
) -> Relaxation:
    """Return the problem of moving some models onto a fixed one, if there is one, and onto each other.

    Args:
        spec: the symmetry, with only the leaves that count; see `counted`.
        fixed: leaves of the model that stays, by name.
        moving: leaves of the models that move.
        solver: the assignment solver.
    """
    alike: dict[Any, list[Block]] = {}
    for block in unfold(spec, tuple(leaf.name for leaf in spec.leaves)):
        alike.setdefault((block.shape, block.names, block.beside), []).append(block)
    kinds = tuple(blocks[0] for blocks in alike.values())
    entries = [_entries(alike.values(), leaves) for leaves in moving]
    stacked = tuple(jnp.stack(values) for values in zip(*entries, strict=True))
    still = _entries(alike.values(), fixed) if fixed else tuple(jnp.zeros_like(x[0]) for x in stacked)
    depth = {g.name: sum(outer in spec for outer in g.per) for g in spec.groups}
    levels = tuple(tuple(g for g in depth if depth[g] == d) for d in sorted(set(depth.values()), reverse=True))
    order = degree(kinds, depth) * min(len(moving), 2)
    return Relaxation(levels, kinds, still, stacked, order, scale([*moving, *([fixed] if fixed else [])]), solver)


def ascend(problem: Relaxation, soft: Soft, max_iterations: int, tolerance: float) -> tuple[Soft, Course]:
    """Move to the best point on the line to the vertex that the gradient points at, until there is nothing to gain.

    Args:
        problem: what stays the same.
        soft: where to start, group -> `[runs, models, *outer, n, n]`.
        max_iterations: upper limit for every run.
        tolerance: gains below this, in units of the problem's scale, count as none.
    """
    live = np.ones(len(next(iter(soft.values()))), bool)
    gap, iterations, trace = np.zeros(len(live)), np.zeros(len(live), int), []
    while True:
        line = _best_line(problem, soft, live)
        steps, gains = np.transpose([best_step(values) for values in line.values])
        trace.append(line.values[:, 0])
        gap, rises = np.where(live, line.slope, gap), gains > tolerance * problem.scale
        live = live & rises & (iterations < max_iterations)
        if not live.any():
            return soft, Course(np.array(trace), gap, iterations, ~rises)
        soft = _blend(soft, line.target, np.where(live, steps, 0).astype(np.float32))
        iterations = iterations + live


class _Line(NamedTuple):
    """Where the line from a point leads, the objective on it, and the gap at its start; for every run."""

    target: Soft
    values: np.ndarray
    slope: np.ndarray


def _best_line(problem: Relaxation, soft: Soft, live: np.ndarray) -> _Line:
    """Return the line to the vertex that maximises the linearised objective, or to a better one.

    Where groups lie below others, the other candidate gives every pair of outer units its best inner order first, and
    then assigns the outer units; that is no maximum of the linear objective, so it is taken only where it gains more.
    """
    plain = _line(problem, soft, _vertex(problem, soft, live, [g for level in problem.levels for g in level]))
    if len(problem.levels) == 1:
        return plain
    target = soft
    for level in problem.levels:
        target = target | _vertex(problem, target, live, level)
    nested = _line(problem, soft, target)
    wins = np.array([best_step(y)[1] > best_step(x)[1] for x, y in zip(plain.values, nested.values, strict=True)])
    target = {g: jnp.where(wins.reshape(-1, *[1] * (x.ndim - 1)), nested.target[g], x) for g, x in plain.target.items()}
    return _Line(target, np.where(wins[:, None], nested.values, plain.values), plain.slope)


def _vertex(problem: Relaxation, soft: Soft, live: np.ndarray, groups: Sequence[str]) -> Soft:
    """Return hard matrices of some groups that maximise the objective linearised at `soft`; runs that ended stay."""
    slopes, rows = _slopes(problem.kinds, soft, problem.fixed, problem.moving), {}
    for g in groups:
        cost = np.asarray(slopes[g])
        rows[g] = np.zeros(cost.shape[:-1], np.int32)
        rows[g][live] = solve(cost[live], solver=problem.solver, what=f"the slope of group '{g}'")
    return _hardened({g: soft[g] for g in groups}, rows, live)


def _line(problem: Relaxation, soft: Soft, target: Soft) -> _Line:
    points = samples(problem.order).astype(np.float32)
    with jax.enable_x64(True):
        values = np.asarray(_along(problem.kinds, soft, target, points, problem.fixed, problem.moving))
    return _Line(target, values, np.array([slope(row) for row in values]))


def value(kinds: tuple[Block, ...], soft: Soft, fixed: Sequence[Array], moving: Sequence[Array]) -> Array:
    """Return the relaxed objective of one run, summed in float64 where that is on."""
    wide = jnp.result_type(float)
    total = jnp.zeros((), wide)
    for still, moved in zip(fixed, _moved(kinds, soft, moving), strict=True):
        before = jnp.cumsum(jnp.concatenate([still[None], moved[:-1]]), axis=0)
        total += jnp.sum(before.astype(wide) * moved.astype(wide))
    return total


def _moved(kinds: tuple[Block, ...], soft: Soft, moving: Sequence[Array]) -> list[Array]:
    def one(block: Block, soft: Soft, blocks: Array) -> Array:
        return jax.vmap(partial(mix, block, soft))(blocks)

    return [jax.vmap(partial(one, block))(soft, x) for block, x in zip(kinds, moving, strict=True)]


def _toward(soft: Soft, target: Soft, step: Array) -> Soft:
    return jax.tree.map(lambda x, y: (1 - step) * x + step * y, soft, target)


_blend = jax.jit(jax.vmap(_toward))


@jax.jit
@jax.vmap
def _hardened(soft: Soft, rows: Permutations, live: Array) -> Soft:
    return jax.tree.map(lambda x, p: jnp.where(live, as_matrix(p, x.dtype), x), soft, rows)


@partial(jax.jit, static_argnums=0)
def _along(
    kinds: tuple[Block, ...], soft: Soft, target: Soft, points: Array, fixed: Sequence[Array], moving: Sequence[Array]
) -> Float[Array, "runs points"]:
    """Return the objective at points of the line, for every run."""

    def at(soft: Soft, target: Soft, step: Array) -> Array:
        return value(kinds, _toward(soft, target, step), fixed, moving)

    return jax.vmap(jax.vmap(at, (None, None, 0)), (0, 0, None))(soft, target, points)


@partial(jax.jit, static_argnums=0)
def _slopes(kinds: tuple[Block, ...], soft: Soft, fixed: Sequence[Array], moving: Sequence[Array]) -> Soft:
    """Return, for every run, the gradient, in which every pair of outer units counts as if it were matched.

    The gradient with respect to the matrices of a pair is this slope times the weight of the pair, so both have the
    same best vertex where the weight is not zero; where it is, this one tells what the pair would be worth.
    """

    def total(soft: Soft) -> Array:
        held = jax.lax.stop_gradient(soft)
        found = jnp.zeros(())
        for block, still, blocks, moved in zip(kinds, fixed, moving, _moved(kinds, held, moving), strict=True):
            others = still[None] if len(moved) == 1 else (still + moved.sum(0))[None] - moved
            found += jnp.sum(jax.vmap(partial(_places, block))(soft, held, others, blocks))
        return found

    return jax.vmap(jax.grad(total))(soft)


def _places(block: Block, soft: Soft, held: Soft, others: Array, blocks: Array) -> Array:
    """Return the sum over all places of the inner product in which this place moves and places that index it are one.

    Args:
        block: the kind of block; each of its axes is a place.
        soft: matrices of the place that moves.
        held: matrices of the other places.
        others: what the blocks are compared with.
        blocks: entries, `[blocks, *shape]`.
    """
    names = tuple(f"{axis} {name}" for axis, name in enumerate(block.names))
    beside = tuple(tuple((names[j], j) for _, j in pairs) for pairs in block.beside)
    split, found = replace(block, names=names, beside=beside), jnp.zeros(())
    for axis, name in enumerate(block.names):
        if name in soft:
            rest = {names[i]: held[other] for i, other in enumerate(block.names) if other in soft}
            ones = {names[j]: jnp.ones_like(held[outer]) for outer, j in block.beside[axis] if outer in soft}
            moved = jax.vmap(partial(mix, split, rest | ones | {names[axis]: soft[name]}))(blocks)
            found += jnp.sum(others * moved)
    return found


def _entries(alike: Iterable[list[Block]], leaves: Mapping[str, Any]) -> tuple[Array, ...]:
    return tuple(jnp.stack([jnp.asarray(extract(b, leaves[b.leaf])) for b in blocks]) for blocks in alike)
