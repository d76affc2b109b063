"""Several models as one problem: start in the anchor's order, improve in turn, end in the anchor's own order."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from permjax import tree
from permjax.action import permute
from permjax.match.assignment import Solver
from permjax.match.models import reordered
from permjax.match.objective import counted, joint_objective, scale
from permjax.match.weights import weight_matching
from permjax.permutation import Permutations, compose, identity, invert
from permjax.plan import Plan
from permjax.steps import Result
from permjax.symmetry.spec import PermutationSpec

_RTOL = 1e-12  # smallest gain that float64 can tell from none, in units of the problem's scale


def compared(
    spec: PermutationSpec, leaves: Sequence[Mapping[str, Any]]
) -> tuple[PermutationSpec, list[dict[str, Any]]]:
    """Return the leaves of every model that count, in float32 or wider, and their spec."""
    own = counted(spec, leaves[0])

    def widened(leaf: Any) -> Any:
        array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        return array.astype(np.result_type(np.float32, array.dtype), copy=False)

    return own, [{leaf.name: widened(model[leaf.name]) for leaf in own.leaves} for model in leaves]


def aligned_to_first(
    spec: PermutationSpec, leaves: Sequence[Mapping[str, Any]], key: jax.Array, solver: Solver
) -> list[Permutations]:
    """Return the permutations of `weight_matching` to the first model."""
    _, plan, _ = weight_matching(spec, leaves, key=key, solver=solver)
    return [identity(spec), *(plan.permutations(m) for m in range(1, len(leaves)))] if plan else []


def settle(
    spec: PermutationSpec,
    leaves: Sequence[Mapping[str, Any]],
    start: Sequence[Mapping[str, Any]],
    key: jax.Array,
    max_sweeps: int,
    solver: Solver,
) -> tuple[list[Permutations], list[float], bool]:
    """Match one model after the other to the mean of all others until none improves.

    Args:
        spec: the symmetry, with only the leaves that count.
        leaves: models by leaf name.
        start: a permutation for every model.
        key: draws the order of models and groups.
        max_sweeps: upper limit.
        solver: the assignment solver.

    Returns:
        The permutations, the joint objective at the start and after every sweep, and whether it settled.
    """
    found = [dict(p) for p in start]
    models = [permute(spec, p, model) for p, model in zip(found, leaves, strict=True)]
    least, trace = _RTOL * scale(leaves), [joint_objective(models)]
    for sweep in range(max_sweeps):
        key, order = jax.random.split(jax.random.fold_in(key, sweep))
        trace.append(trace[-1])
        for m in jax.random.permutation(order, len(models)).tolist():
            others = tree.average([model for k, model in enumerate(models) if k != m])
            (_, moved), plan, _ = weight_matching(
                spec, [others, models[m]], key=jax.random.fold_in(key, m), solver=solver, init=[identity(spec)]
            )
            value = joint_objective([*models[:m], moved, *models[m + 1 :]])
            if plan and value > trace[-1] + least:
                found[m], models[m], trace[-1] = compose(spec, plan.permutations(1), found[m]), moved, value
        if trace[-1] == trace[-2]:
            return found, trace, True
    return found, trace, False


def gauged(
    spec: PermutationSpec,
    models: tuple,
    leaves: Sequence[Mapping[str, Any]],
    permutations: Sequence[Permutations],
    info: Any,
) -> Result:
    """Return the models in a common order that is the first one's own; groups without a permutation stay."""
    still = identity(spec)
    back = invert(spec, still | permutations[0])
    turned = [compose(spec, back, still | p) for p in permutations]
    rest = [reordered(spec, *found) for found in zip(turned[1:], models[1:], leaves[1:], strict=True)]
    return Result((models[0], *rest), Plan.from_permutations(spec, turned), info)
