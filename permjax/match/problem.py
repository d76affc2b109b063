"""The alignment of one model to another as a problem on blocks, and its state during a search.

A state keeps permutations only. Blocks are views of the models, and one at a time is gathered and widened when its Gram
matrix or its inner product is asked for. Every move is relative to the current order: the identity means no move.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from permjax.match import costs
from permjax.match.assignment import Solver
from permjax.match.costs import Term
from permjax.match.nested import Named, stays
from permjax.permutation import namespace
from permjax.symmetry.blocks import Block, Layout, extract, gather, leaf_blocks, move, unfold, view
from permjax.symmetry.spec import Leaf, Of, PermutationSpec

_RTOL = 1e-12  # smallest gain that float64 can tell from none, in units of the squared norms
_NEAR = 1e-4  # squared distances below this, in the same units, are taken from differences
_LESSON = (1 << 25) - (1 << 16)  # bytes: the largest piece of memory from which glibc learns, see mallopt(3)


class Arithmetic(NamedTuple):
    """The operations on blocks, on the host or on a device; see `costs` and `blocks`."""

    view: Callable[..., Any]
    gather: Callable[..., Any]
    gram: Callable[..., Any]
    bend: Callable[..., Any]
    inner: Callable[..., Any]
    gap: Callable[..., Any]


def _view_on_host(layout: Layout, leaf: Any) -> np.ndarray:
    """The entries of a block; a leaf that lies in a file is read for it."""
    return view(layout, np.asarray(leaf))


def _in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = jax.jit(function)

    def run(a: Any, b: Any) -> Any:
        with jax.enable_x64(True):
            return np.float64(compiled(a, b))

    return run


HOST = Arithmetic(_view_on_host, gather, costs.gram, costs.bend, costs.inner, costs.gap)
DEVICE = Arithmetic(
    jax.jit(view, static_argnums=0),
    jax.jit(gather, static_argnums=0),
    jax.jit(costs.gram, static_argnums=(2, 3)),
    jax.jit(costs.bend, static_argnums=(2, 3)),
    _in_float64(costs.inner),
    _in_float64(costs.gap),
)


class Structure(NamedTuple):
    """What follows from the spec alone.

    Attributes:
        per: group -> the groups that index it.
        parts: the parts of leaves that make each block: one, or several vectors side by side.
        blocks: all blocks that count.
        terms: root group -> its places in the blocks.
        near: root group -> root groups whose solution depends on it.
        order: root groups, each after those that determine it best.
        indices: group -> block that describes its own index array.
    """

    per: Mapping[str, tuple[str, ...]]
    parts: tuple[tuple[Block, ...], ...]
    blocks: tuple[Block, ...]
    terms: Mapping[str, tuple[Term, ...]]
    near: Mapping[str, frozenset[str]]
    order: tuple[str, ...]
    indices: Mapping[str, Block]


@dataclass(frozen=True, eq=False)
class Problem:
    """What stays the same during an ascent.

    Attributes:
        spec: the symmetry.
        structure: what follows from it.
        anchor: the anchor's leaf for every block.
        mass: squared norm of its blocks.
        arithmetic: where to compute.
        solver: the assignment solver.
    """

    spec: PermutationSpec
    structure: Structure
    anchor: tuple[Any, ...]
    mass: float
    arithmetic: Arithmetic
    solver: Solver


@dataclass(frozen=True, eq=False)
class State:
    """The other model in its current order.

    Attributes:
        other: its leaf for every block, as it came.
        values: inner product with the anchor, by block, float64; NaN where not yet known.
        permutations: how it came into this order, for the groups that have moved.
        mass: squared norm of the anchor and the other model, the unit of gains and distances.
        lasting: for every root that has been solved, the Gram matrices that no other group can change.
    """

    other: tuple[Any, ...]
    values: np.ndarray
    permutations: dict[str, Any]
    mass: float
    lasting: dict[str, list[Named]]

    @property
    def objective(self) -> float:
        """Sum of the inner products."""
        return float(self.values.sum())


@lru_cache(maxsize=16)
def structure(spec: PermutationSpec, leaves: tuple[str, ...]) -> Structure:
    """Return what an ascent over the named leaves needs to know of the spec."""
    parts = _gathered(unfold(spec, leaves))
    blocks = tuple(_joined(alike) for alike in parts)
    tops = [g.name for g in spec.groups if costs.is_root(spec, g.name)]
    terms = {root: found for root in tops if (found := tuple(costs.terms(spec, blocks, root)))}
    near = {r: frozenset(q for q, found in terms.items() if any(r in t.held for t in found)) for r in terms}
    order = costs.growth([(t.size, t.held | {root}) for root, found in terms.items() for t in found])
    indices = {g.name: _index_block(spec, g.name) for g in spec.groups}
    return Structure({g.name: g.per for g in spec.groups}, parts, blocks, terms, near, tuple(order), indices)


def pose(
    spec: PermutationSpec, leaves: tuple[str, ...], anchor: Mapping[str, Any], arithmetic: Arithmetic, solver: Solver
) -> Problem:
    """Return the problem of aligning other models to the anchor over the named leaves."""
    np.empty(_LESSON, np.uint8)  # once freed, later pieces up to this size are kept for reuse, not faulted in anew
    known = structure(spec, leaves)
    found = leaves_of(known, anchor)
    return Problem(spec, known, found, _mass(known, arithmetic, found), arithmetic, solver)


def start(problem: Problem, other: Mapping[str, Any]) -> State:
    """Return the state of another model in its own order."""
    found = leaves_of(problem.structure, other)
    mass = problem.mass + _mass(problem.structure, problem.arithmetic, found)
    return audited(problem, State(found, np.full(len(found), np.nan), {}, mass, {}))


def fixed(problem: Problem, block: int) -> Any:
    """Return the anchor's entries of a block, as they are stored."""
    return problem.arithmetic.view(problem.structure.blocks[block].layout, problem.anchor[block])


def lying(problem: Problem, state: State, block: int, loose: tuple[int, ...] = ()) -> Any:
    """Return the other model's entries of a block in their current order; those of `loose` axes as they came."""
    found = problem.structure.blocks[block]
    rows = [None if i in loose else row for i, row in enumerate(found.rows(state.permutations))]
    value = problem.arithmetic.view(found.layout, state.other[block])
    return problem.arithmetic.gather(found.layout.outer, tuple(rows), value)


def exceeds(state: State, other: State) -> bool:
    """Tell whether the objective of a state is larger than another's by more than rounding."""
    return state.objective > other.objective + _RTOL * state.mass


def distance(problem: Problem, state: State) -> float:
    """Return the Euclidean distance between the anchor and the other model as it now lies."""
    squared = state.mass - 2 * state.objective
    if squared < _NEAR * state.mass:
        blocks = range(len(state.other))
        squared = sum(problem.arithmetic.gap(fixed(problem, i), lying(problem, state, i)) for i in blocks)
    return float(squared**0.5)


def moved(problem: Problem, state: State, permutations: Mapping[str, np.ndarray]) -> State:
    """Return the state after a further permutation of some groups; see `audited` for its values."""
    rows = {g: p for g, p in permutations.items() if not stays(p)}
    values, now = state.values.copy(), dict(state.permutations)
    values[[not rows.keys().isdisjoint(block.names) for block in problem.structure.blocks]] = np.nan
    for g, block in problem.structure.indices.items():
        if g in now:
            now[g] = move(block, rows, now[g])
        elif g in rows:
            now[g] = rows[g]
    return replace(state, values=values, permutations=now)


def audited(problem: Problem, state: State) -> State:
    """Return the state with the values that were unknown."""
    values = state.values.copy()
    for i in np.flatnonzero(np.isnan(values)).tolist():
        values[i] = problem.arithmetic.inner(fixed(problem, i), lying(problem, state, i))
    return replace(state, values=values)


def _mass(known: Structure, arithmetic: Arithmetic, leaves: Sequence[Any]) -> float:
    views = (arithmetic.view(block.layout, leaf) for block, leaf in zip(known.blocks, leaves, strict=True))
    return float(sum(arithmetic.inner(x, x) for x in views))


def _gathered(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], ...]:
    """Put the vectors of each group together, so that many small parts become one block."""
    alike: dict[Any, list[Block]] = {}
    for index, block in enumerate(blocks):
        alike.setdefault((block.names, block.shape) if len(block.shape) == 1 else index, []).append(block)
    return tuple(tuple(found) for found in alike.values())


def _joined(alike: tuple[Block, ...]) -> Block:
    """Return one block for parts of the same kind, which lie along a new last axis if they are several."""
    first = alike[0]
    if len(alike) == 1:
        return first
    shape = (*first.shape, len(alike))
    names, beside = (*first.names, ""), (*first.beside, ())
    return replace(first, picks=tuple(map(range, shape)), shape=shape, names=names, beside=beside)


def leaves_of(known: Structure, leaves: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the leaf from which each block is read; vectors that lie side by side are put together here."""
    return tuple(leaves[alike[0].leaf] if len(alike) == 1 else _stacked(alike, leaves) for alike in known.parts)


def _stacked(alike: tuple[Block, ...], leaves: Mapping[str, Any]) -> Any:
    found = [leaves[part.leaf] for part in alike]
    found = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in found]
    parts = [extract(part, leaf) for part, leaf in zip(alike, found, strict=True)]
    return namespace(*parts).stack(parts, -1)


def _index_block(spec: PermutationSpec, group: str) -> Block:
    """Return the block that describes the index array `[*per, n]` of a group, which moves like any other."""
    axes = tuple(Of(name) for name in (*spec.group(group).per, group))
    (block,) = leaf_blocks(spec, Leaf(f"index of {group}", spec.shape(group), axes))
    return block
