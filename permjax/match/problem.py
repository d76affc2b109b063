"""The alignment of one model to another as a problem on blocks, and its state during a search.

The other model's blocks are kept in their current order, so that every move is relative to it: the identity means no
move, and nothing is gathered for a group that stays.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from permjax.match import costs
from permjax.match.assignment import Solver
from permjax.match.costs import Term
from permjax.match.nested import stays
from permjax.permutation import identity, namespace
from permjax.symmetry.blocks import Block, extract, leaf_blocks, move, unfold
from permjax.symmetry.spec import Leaf, Of, PermutationSpec

_RTOL = 1e-12  # smallest gain that float64 can tell from none, in units of the squared norms
_NEAR = 1e-4  # squared distances below this, in the same units, are taken from differences


class Arithmetic(NamedTuple):
    """The operations on blocks, on the host or on a device; see `costs`."""

    gram: Callable[..., Any]
    bend: Callable[..., Any]
    move: Callable[..., Any]
    inner: Callable[..., Any]


def _inner_on_device(a: Any, b: Any) -> Any:
    with jax.enable_x64(True):
        return np.float64(_inner_jit(a, b))


_inner_jit = jax.jit(costs.inner)
HOST = Arithmetic(costs.gram, costs.bend, move, costs.inner)
DEVICE = Arithmetic(
    jax.jit(costs.gram, static_argnums=(2, 3)),
    jax.jit(costs.bend, static_argnums=(2, 3)),
    jax.jit(move, static_argnums=0),
    _inner_on_device,
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
        anchor: the anchor's entries of every block.
        mass: its squared norm.
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
        other: its entries of every block.
        values: inner product with the anchor, by block, float64; NaN where not yet known.
        permutations: how it came into this order.
        mass: squared norm of the anchor and the other model, the unit of gains and distances.
    """

    other: tuple[Any, ...]
    values: np.ndarray
    permutations: dict[str, np.ndarray]
    mass: float

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
    known = structure(spec, leaves)
    entries = _entries(known, anchor)
    return Problem(spec, known, entries, _mass(arithmetic, entries), arithmetic, solver)


def start(problem: Problem, other: Mapping[str, Any]) -> State:
    """Return the state of another model in its own order."""
    entries = _entries(problem.structure, other)
    mass = problem.mass + _mass(problem.arithmetic, entries)
    return audited(problem, State(entries, np.full(len(entries), np.nan), identity(problem.spec), mass))


def exceeds(state: State, other: State) -> bool:
    """Tell whether the objective of a state is larger than another's by more than rounding."""
    return state.objective > other.objective + _RTOL * state.mass


def distance(problem: Problem, state: State) -> float:
    """Return the Euclidean distance between the anchor and the other model as it now lies."""
    squared = state.mass - 2 * state.objective
    if squared < _NEAR * state.mass:
        squared = _mass(problem.arithmetic, [a - b for a, b in zip(problem.anchor, state.other, strict=True)])
    return float(squared**0.5)


def moved(problem: Problem, state: State, permutations: Mapping[str, np.ndarray]) -> State:
    """Return the state after a further permutation of some groups; see `audited` for its values."""
    rows = {g: p for g, p in permutations.items() if not stays(p)}
    other, values, now = list(state.other), state.values.copy(), dict(state.permutations)
    for i, block in enumerate(problem.structure.blocks):
        if mine := {g: p for g, p in rows.items() if g in block.names}:
            other[i], values[i] = problem.arithmetic.move(block, mine, other[i]), np.nan
    for g, block in problem.structure.indices.items():
        if mine := {h: p for h, p in rows.items() if h in block.names}:
            now[g] = move(block, mine, now[g])
    return replace(state, other=tuple(other), values=values, permutations=now)


def audited(problem: Problem, state: State) -> State:
    """Return the state with the values that were unknown."""
    values = state.values.copy()
    for i in np.flatnonzero(np.isnan(values)):
        values[i] = problem.arithmetic.inner(problem.anchor[i], state.other[i])
    return replace(state, values=values)


def _mass(arithmetic: Arithmetic, entries: Iterable[Any]) -> float:
    return float(sum(arithmetic.inner(x, x) for x in entries))


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
    return replace(first, shape=(*first.shape, len(alike)), names=(*first.names, ""), beside=(*first.beside, ()))


def _entries(known: Structure, leaves: Mapping[str, Any]) -> tuple[Any, ...]:
    found = [[extract(part, leaves[part.leaf]) for part in alike] for alike in known.parts]
    return tuple(parts[0] if len(parts) == 1 else namespace(*parts).stack(parts, -1) for parts in found)


def _index_block(spec: PermutationSpec, group: str) -> Block:
    """Return the block that describes the index array `[*per, n]` of a group, which moves like any other."""
    axes = tuple(Of(name) for name in (*spec.group(group).per, group))
    (block,) = leaf_blocks(spec, Leaf(f"index of {group}", spec.shape(group), axes))
    return block
