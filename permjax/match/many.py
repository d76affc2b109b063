"""Many models: a common order for all of them by repeated matching to the mean, and measures of what pairs agree on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from permjax.lmc.barrier import Metrics, barrier
from permjax.match.assignment import Solver
from permjax.match.joint import aligned_to_first, compared, gauged, settle
from permjax.match.models import are_local, check_models, entries
from permjax.permutation import Permutations, compose, invert, validate
from permjax.plan import Plan
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec


class MergeManyInfo(NamedTuple):
    """Diagnostics of `merge_many`.

    Attributes:
        objective: sum over all pairs of models of their inner product over leaves of role weight, float64, at the start
            and after every sweep.
        sweeps: sweeps over all models.
        converged: whether it ended because no model could improve.
    """

    objective: Float[np.ndarray, " sweeps"]
    sweeps: int
    converged: bool


def merge_many(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    key: jax.Array,
    max_sweeps: int = 100,
    solver: Solver = "auto",
    init: Sequence[Mapping[str, Any]] | None = None,
) -> Result:
    """Align many models to each other: `max_P sum_{m<k} <P_m theta_m, P_k theta_k>` over leaves of role weight.

    One model at a time, in random order, is matched to the mean of all others, from the order that it has; the anchor
    too, so that all count alike. At the end all are turned so that the anchor has its own order again. The maps between
    any two models agree around every cycle, because all go through one common order.

    Args:
        spec: the symmetry.
        models: two or more pytrees; the first is the anchor.
        key: draws the order of models and groups.
        max_sweeps: upper limit.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.
        init: permutations to start from, for every model with the anchor; by default `weight_matching` to the anchor.

    Returns:
        The anchor as it is and the other models in its order, the plan, and a `MergeManyInfo`.

    Raises:
        ValueError: fewer than two models, models that differ in structure or are not finite, or hyper-parameters out of
            range.

    Example:
        >>> result = merge_many(spec, [a, b, c], key=jax.random.key(0))
        >>> merged = average(result.models)

    Source:
        Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, algorithm 3; there the models start as they are.
    """
    models = tuple(models)
    check_models(spec, models)
    if max_sweeps < 1:
        raise ValueError(f"max_sweeps must be at least 1, not {max_sweeps}.")
    leaves = [entries(model, f"model {m}", are_local(models)) for m, model in enumerate(models)]
    own, wide = compared(spec, leaves)
    keys = jax.random.split(key)
    start = aligned_to_first(own, wide, keys[0], solver) if init is None else _given(spec, own, init, len(models))
    found, trace, converged = settle(own, wide, start, keys[1], max_sweeps, solver)
    return gauged(spec, models, leaves, found, MergeManyInfo(np.array(trace), len(trace) - 1, converged))


@dataclass(frozen=True)
class MergeMany:
    """Step form of `merge_many`: aligns all models of a state to each other and keeps the plan."""

    max_sweeps: int = 100
    solver: str = "auto"

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and a `MergeManyInfo`."""
        state, key = state.split()
        hyper = {"max_sweeps": self.max_sweeps, "solver": self.solver}
        return state.after(merge_many(state.spec, state.models, key=key, **hyper))


def pairwise_matching(
    spec: PermutationSpec, models: Sequence[Any], method: Callable[..., Result]
) -> dict[tuple[int, int], Permutations]:
    """Match every pair of models by itself.

    Args:
        spec: the symmetry.
        models: two or more pytrees.
        method: `method(spec, [a, b]) -> Result`, such as `partial(weight_matching, key=key)`.

    Returns:
        `(i, j)` with `i < j` -> the permutation that brings model `j` into the order of model `i`.
    """
    results = {(i, j): method(spec, [models[i], models[j]]) for i, j in combinations(range(len(models)), 2)}
    return {pair: found.plan.permutations(1) for pair, found in results.items() if found.plan is not None}


def pairwise_maps(spec: PermutationSpec, plan: Plan) -> dict[tuple[int, int], Permutations]:
    """Return what `pairwise_matching` does, from a plan of one order for all: `P_i^-1 P_j`."""
    found = [plan.permutations(m) for m in range(plan.models)]
    return {(i, j): compose(spec, invert(spec, p), q) for (i, p), (j, q) in combinations(enumerate(found), 2)}


def cycle_error(spec: PermutationSpec, pairwise: Mapping[tuple[int, int], Permutations]) -> float:
    """Return the mean share of units that going around a triangle of models does not bring back.

    It is zero for maps through one common order, and above zero for pairs matched by themselves.

    Args:
        spec: the symmetry.
        pairwise: `(i, j)` with `i < j` -> permutation, for all pairs of three models or more.

    Raises:
        ValueError: fewer than three models, or a pair that is missing.
    """
    models = sorted({model for pair in pairwise for model in pair})
    if missing := [pair for pair in combinations(models, 2) if pair not in pairwise]:
        raise ValueError(f"the pair {missing[0]} is missing; a cycle error needs all pairs of models {models}.")
    if len(models) < 3:
        raise ValueError(f"a cycle error needs three models or more, not {len(models)}.")
    return float(np.mean([_astray(spec, pairwise, *triple) for triple in combinations(models, 3)]))


class BarrierMatrix(NamedTuple):
    """Barriers between all pairs of models, zero on the diagonal; see `permjax.lmc.barrier.barrier`."""

    mid: Float[np.ndarray, "models models"]
    max: Float[np.ndarray, "models models"]


def barrier_matrix(
    metrics: Metrics, models: Sequence[PyTree], data: Sequence[Any], *, points: int = 25, batch_size: int = 1000
) -> BarrierMatrix:
    """Measure the barrier between every two models as they are; the arguments are those of `barrier`."""
    found = BarrierMatrix(*np.zeros((2, len(models), len(models))))
    for (i, a), (j, b) in combinations(enumerate(models), 2):
        line = barrier(metrics, a, b, data, points=points, batch_size=batch_size)
        found.mid[[i, j], [j, i]], found.max[[i, j], [j, i]] = line.barrier_mid, line.barrier_max
    return found


def _astray(spec: PermutationSpec, pairwise: Mapping[tuple[int, int], Permutations], i: int, j: int, k: int) -> float:
    around, straight = compose(spec, pairwise[i, j], pairwise[j, k]), pairwise[i, k]
    return float(np.mean(np.concatenate([np.not_equal(around[g], straight[g]).ravel() for g in around])))


def _given(
    spec: PermutationSpec, own: PermutationSpec, init: Sequence[Mapping[str, Any]], models: int
) -> list[Permutations]:
    """Return given permutations of the groups that count."""
    if len(init) != models:
        raise ValueError(f"init must hold permutations for each of the {models} models, not {len(init)}.")
    for permutations in init:
        validate(spec, permutations)
    return [{g.name: np.asarray(permutations[g.name]) for g in own.groups} for permutations in init]
