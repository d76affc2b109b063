"""Block coordinate ascent on `<a, permute(b)>`: one group, with all groups below it, at a time."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from permjax.match.assignment import solve
from permjax.match.costs import Term
from permjax.match.nested import Label, Named, Nest, assigned, total
from permjax.match.problem import Problem, State, audited, exceeds, fixed, lying, moved
from permjax.permutation import identity


class Trace(NamedTuple):
    """Diagnostics of one ascent."""

    objective: list[float]
    converged: bool
    solves: int
    skipped: int


def ascend(
    problem: Problem, state: State, rng: np.random.Generator, max_sweeps: int, grow: bool
) -> tuple[State, Trace]:
    """Sweep over the groups until none can improve.

    Args:
        problem: what stays the same.
        state: where to start.
        rng: draws the order of the groups from the second sweep on.
        max_sweeps: upper limit.
        grow: whether the first sweep builds a start of its own, kept if it is better than the given one.
    """
    nest = Nest(problem.structure.per, partial(solve, solver=problem.solver))
    objective, dirty, solves, skipped = [state.objective], frozenset(problem.structure.terms), 0, 0
    for sweep in range(max_sweeps):
        if sweep == 0 and grow:
            state, dirty = _grown(problem, nest, state)
            solves += len(problem.structure.order)
        else:
            order = problem.structure.order if sweep == 0 else rng.permutation(problem.structure.order).tolist()
            for root in order:
                solves, skipped = solves + (root in dirty), skipped + (root not in dirty)
                if root in dirty:
                    state, moved_on = improved(problem, nest, state, root)
                    dirty = dirty - {root} | (problem.structure.near[root] if moved_on else frozenset())
        objective.append(state.objective)
        if not dirty:
            break
    return state, Trace(objective, not dirty, solves, skipped)


def improved(problem: Problem, nest: Nest, state: State, root: str) -> tuple[State, bool]:
    """Return the state after the best move of one group, and whether the objective grew.

    Where a group stands twice in a block, the assignment is the best one of the linearised objective and may fail;
    then the best swap of two units is tried, whose gain is known exactly.
    """
    kernels = kernels_of(problem, state, root, problem.structure.terms[root])
    moves = [lambda: assigned(nest, kernels, root)]
    if root in problem.structure.near[root] and all(len(term.free) == 1 for term in problem.structure.terms[root]):
        moves.append(lambda: _swapped(problem, state, kernels, root))
    for find in moves:
        if rows := find():
            after = audited(problem, moved(problem, state, rows))
            if exceeds(after, state):
                return after, True
    return state, False


def _grown(problem: Problem, nest: Nest, state: State) -> tuple[State, frozenset[str]]:
    """Place one group after the other, each by the terms that depend on placed groups only.

    Returns:
        The better of the new and the given state, and the groups that have not seen all their terms.
    """
    grown, placed, unsure = state, frozenset(), set()
    for root in problem.structure.order:
        known = [t for t in problem.structure.terms[root] if t.held <= placed]
        if len(known) < len(problem.structure.terms[root]):
            unsure.add(root)
        kernels = kernels_of(problem, grown, root, known or problem.structure.terms[root])
        grown = moved(problem, grown, assigned(nest, kernels, root))
        placed |= {root}
    grown = audited(problem, grown)
    if exceeds(grown, state):
        return grown, frozenset(unsure)
    return state, frozenset(problem.structure.terms)


def kernels_of(problem: Problem, state: State, root: str, terms: Sequence[Term]) -> list[Named]:
    """Return the Gram matrices of some terms of a root in the current order, added up where they have the same axes.

    Terms that depend on no other group are computed once, and the permutations of free axes are left to the sums.
    """
    if root not in state.lasting:
        state.lasting[root] = _sums(problem, state, [t for t in problem.structure.terms[root] if not t.held])
    together = _sums(problem, state, [t for t in terms if t.apart and t.held], state.lasting[root])
    found = [_placed(problem, state, kernel) for kernel in together]
    return found + _sums(problem, state, [t for t in terms if not t.apart])


def _sums(problem: Problem, state: State, terms: Sequence[Term], more: Sequence[Named] = ()) -> list[Named]:
    """Return the sums of the terms' Gram matrices, and of those that are there already, by their axes."""
    found: dict[tuple[Label, ...], Any] = {}
    for term in terms:
        names = problem.structure.blocks[term.block].names
        batch = tuple(sorted(term.batch, key=names.__getitem__))
        free = tuple(sorted(term.free, key=names.__getitem__))
        other = lying(problem, state, term.block, free if term.apart else ())
        labels = (*((names[i], 0) for i in batch), *((names[i], side) for side in (0, 1) for i in free))
        _accumulate(found, labels, problem.arithmetic.gram(fixed(problem, term.block), other, batch, free))
    for kernel in more:
        _accumulate(found, *kernel)
    return [Named(labels, values) for labels, values in found.items()]


def _accumulate(found: dict[tuple[Label, ...], Any], labels: tuple[Label, ...], values: Any) -> None:
    """Add an array to the one with the same axes, in place where the host allows."""
    if labels in found:
        found[labels] += values
    else:
        found[labels] = values


def _placed(problem: Problem, state: State, kernel: Named) -> Named:
    """Bring the other model's units of a kernel into their current order."""
    labels, per = kernel.labels, problem.structure.per
    rows = tuple(state.permutations.get(name) if side else None for name, side in labels)
    if all(row is None for row in rows):
        return kernel
    outer = [[(g, 1) if side and (g, 1) in labels else (g, 0) for g in per.get(name, ())] for name, side in labels]
    axes = tuple(tuple(labels.index(label) for label in found if label in labels) for found in outer)
    return Named(labels, problem.arithmetic.gather(axes, rows, kernel.values))


def _swapped(problem: Problem, state: State, kernels: list[Named], root: str) -> dict[str, np.ndarray]:
    """The best swap of two units of a group that stands twice in a block."""
    labels = (*((h, 0) for h in problem.spec.group(root).per), (root, 0), (root, 1))
    single = np.sum([np.asarray(total(k, labels), np.float64) for k in kernels], axis=0)
    own = single.diagonal(axis1=-2, axis2=-1)
    gain = single + single.swapaxes(-1, -2) - own[..., :, None] - own[..., None, :]
    for one, two in combinations(problem.structure.terms[root], 2):
        if one.block == two.block:
            batch, pair = one.batch, (*one.free, *two.free)
            bend = problem.arithmetic.bend(fixed(problem, one.block), lying(problem, state, one.block), batch, pair)
            names = problem.structure.blocks[one.block].names
            gain = gain + total(Named((*((names[i], 0) for i in batch), *labels[-2:]), np.asarray(bend)), labels)
    *where, i, j = np.unravel_index(np.argmax(gain), gain.shape)
    rows = identity(problem.spec)[root]
    rows[(*where, [i, j])] = [j, i]
    return {root: rows}
