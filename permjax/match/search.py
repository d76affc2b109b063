"""Search by relaxed ascents: where they start, and the permutations that they end at.

A matching that no group can improve is stationary for Frank-Wolfe too, so that a start at the matching itself would end
there. From a mixture with a small share of it, the ascent finds better ones nearby.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp

from permjax import tree
from permjax.match.assignment import Solver
from permjax.match.relaxation import Course, ascend, relax
from permjax.match.sinkhorn import balance
from permjax.match.soft import Soft, barycentre, from_permutations, rounded, soft_shape
from permjax.permutation import Permutations, identity
from permjax.symmetry.spec import PermutationSpec

RUNS = {
    "weights": (("near centre", "centre"), ("near random", "random")),
    "identity": (("identity",), ("random",)),
    "barycentre": (("centre",), ("random",)),
    "random": ((), ("random",)),
}
"""Init -> where the first runs start, and where later ones do in turn; `near` is a mixture with a matching."""

_SHARE_OF_ONE, _SHARE_OF_MANY = 0.2, 0.3  # of the matching in a start near it


@dataclass(frozen=True)
class Search:
    """Hyper-parameters of a search.

    Attributes:
        init: where the first run starts, a key of `RUNS`.
        restarts: number of runs.
        max_iterations: upper limit for every run.
        tolerance: a step that would gain less than this share of the problem's scale ends a run.
        solver: the assignment solver.
    """

    init: str
    restarts: int
    max_iterations: int
    tolerance: float
    solver: Solver

    def __post_init__(self) -> None:
        if self.init not in RUNS:
            hint = tree.nearest(self.init, RUNS)
            raise ValueError(f"there is no init '{self.init}'{hint}; choose from {list(RUNS)}.")
        if self.restarts < 1 or self.max_iterations < 1:
            message = f"restarts and max_iterations must be at least 1, not {self.restarts} and {self.max_iterations}."
            raise ValueError(message)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, not {self.tolerance}.")


def explore(
    search: Search,
    spec: PermutationSpec,
    fixed: Mapping[str, Any] | None,
    moving: Sequence[Mapping[str, Any]],
    bases: Sequence[Mapping[str, Any]],
    key: jax.Array,
) -> tuple[list[list[Permutations]], Course]:
    """Return the permutations of the moving models at the end of every run, and how the runs went.

    Args:
        search: hyper-parameters.
        spec: the symmetry, with only the leaves that count.
        fixed: leaves of the model that stays, if there is one.
        moving: leaves of the models that move.
        bases: a matching to start near, for every model that moves.
        key: draws the restarts.
    """
    problem = relax(spec, fixed, moving, search.solver)
    first = _starts(search, spec, bases, key, is_free=fixed is None)
    soft, course = ascend(problem, first, search.max_iterations, search.tolerance)

    def ended(run: int, model: int) -> Permutations:
        return rounded(spec, {g: x[run, model] for g, x in soft.items()}, search.solver)

    return [[ended(run, model) for model in range(len(moving))] for run in range(search.restarts)], course


def _starts(
    search: Search, spec: PermutationSpec, bases: Sequence[Mapping[str, Any]], key: jax.Array, is_free: bool
) -> Soft:
    """Return soft permutations to start from, group -> `[runs, models, *outer, n, n]`.

    Where no model is fixed, centres of all models would be alike and stationary, so the first model has the identity.
    """
    keys = jax.random.split(key, (search.restarts, len(bases)))
    share = _SHARE_OF_MANY if is_free else _SHARE_OF_ONE

    def one(run: int, model: int) -> Soft:
        first, later = RUNS[search.init]
        kind = first[run] if run < len(first) else later[(run - len(first)) % len(later)]
        if kind == "identity" or (kind == "centre" and is_free and model == 0):
            return from_permutations(spec, identity(spec))
        inside = barycentre(spec) if kind in ("centre", "near centre") else _random(spec, keys[run, model])
        if kind in ("centre", "random"):
            return inside
        return jax.tree.map(lambda x, y: share * x + (1 - share) * y, from_permutations(spec, bases[model]), inside)

    runs = [tree.stack([one(run, model) for model in range(len(bases))]) for run in range(search.restarts)]
    return tree.stack(runs)


def _random(spec: PermutationSpec, key: jax.Array) -> Soft:
    """Return random doubly stochastic matrices; the draw of a group depends on the key and its name only."""
    keys = {g.name: jax.random.fold_in(key, crc32(g.name.encode())) for g in spec.groups}
    return {name: _doubly_stochastic(own, soft_shape(spec, name)) for name, own in keys.items()}


@partial(jax.jit, static_argnums=1)
def _doubly_stochastic(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uniform numbers, normalised by rows and columns in turn."""
    return balance(jax.random.uniform(key, shape, jnp.float32, minval=1e-3))
