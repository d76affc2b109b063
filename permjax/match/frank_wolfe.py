"""Frank-Wolfe matching: all groups move at once, through doubly stochastic matrices, with exact line search."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from permjax.action import permute
from permjax.lmc.barrier import l2_distance
from permjax.match.assignment import Solver
from permjax.match.joint import aligned_to_first, compared, gauged
from permjax.match.models import are_local, check_models, entries
from permjax.match.objective import joint_objective
from permjax.match.relaxation import Course
from permjax.match.search import Search, explore
from permjax.match.weights import weight_matching
from permjax.permutation import Permutations, identity
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec


class FrankWolfeInfo(NamedTuple):
    """Diagnostics of `frank_wolfe`, with one entry for every model but the anchor.

    Attributes:
        objective: relaxed inner product with the anchor, at the start and after every iteration of the best run;
            shorter ones repeat their last value.
        gap: Frank-Wolfe gap where that run ended, in the objective's unit; zero certifies a stationary point.
        iterations: steps of that run.
        converged: whether it ended because nothing was left to gain.
        rounded: objective of the permutations nearest to its end, float64.
        polished: objective of the result, float64.
        runs: objective of every run after polish; the result is better if its start was better than all of them.
        l2_before: distance to the anchor over leaves of role weight.
        l2_after: the same after matching.
    """

    objective: Float[np.ndarray, "models iterations"]
    gap: Float[np.ndarray, " models"]
    iterations: Int[np.ndarray, " models"]
    converged: Bool[np.ndarray, " models"]
    rounded: Float[np.ndarray, " models"]
    polished: Float[np.ndarray, " models"]
    runs: Float[np.ndarray, "models runs"]
    l2_before: Float[np.ndarray, " models"]
    l2_after: Float[np.ndarray, " models"]


def frank_wolfe(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    key: jax.Array,
    init: str = "weights",
    restarts: int = 1,
    max_iterations: int = 200,
    tolerance: float = 1e-7,
    polish: bool = True,
    solver: Solver = "auto",
) -> Result:
    """Align models to the first one: `max_X sum_l <a_l, X(b)_l>` over doubly stochastic matrices of all groups at once.

    Every iteration assigns all groups by the gradient and goes to the best point of the line to there: the objective is
    a polynomial on it, so the step is exact. The end is rounded to the nearest permutations and, since that can lose,
    improved by coordinate ascent. Of several runs the best counts; the result is never worse than what it started from.

    Args:
        spec: the symmetry.
        models: two or more pytrees; the first is the anchor.
        key: draws the restarts, and the order of groups in the coordinate ascents.
        init: where the first run starts: `"weights"` (one part of `weight_matching` with the same key and four of the
            barycentre), `"identity"`, `"barycentre"` or `"random"`. Of `"weights"` the second run starts at the
            barycentre, and later ones near the matching and far from it in turn; other runs start at random.
        restarts: number of runs, side by side; the line search holds a few copies of a model for each.
        max_iterations: upper limit for every run.
        tolerance: a run ends where a step would gain less than this share of `|a| |b|`.
        polish: whether to end with coordinate ascent.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.

    Returns:
        The anchor as it is and the other models in its order, the plan, and a `FrankWolfeInfo`.

    Raises:
        ValueError: fewer than two models, models that differ in structure or are not finite, an unknown init or solver,
            or hyper-parameters out of range.

    Example:
        >>> result = frank_wolfe(spec, [a, b], key=jax.random.key(0), restarts=4)
        >>> result.info.polished, result.info.gap

    Source:
        Crisostomi et al., "C2M3: Cycle-consistent multi-model merging", NeurIPS 2024, section 3; there with a bounded
        search for the step. Groups within groups take, besides the gradient's vertex, a two-level assignment.
    """
    models, search = tuple(models), Search(init, restarts, max_iterations, tolerance, solver)
    check_models(spec, models)
    leaves = [entries(model, f"model {m}", are_local(models)) for m, model in enumerate(models)]
    own, (anchor, *others) = compared(spec, leaves)
    still = [identity(own)] * len(models)
    bases = aligned_to_first(own, [anchor, *others], key, solver) if init == "weights" else still
    keys = jax.random.split(key, len(models))
    tasks = zip(others, bases[1:], keys[1:], strict=True)
    found = [_match(search, own, anchor, other, base, k, polish) for other, base, k in tasks]
    return gauged(spec, models, leaves, [still[0], *(r.permutations for r in found)], _info(found))


@dataclass(frozen=True)
class FrankWolfe:
    """Step form of `frank_wolfe`: aligns the models of a state to the first and keeps the plan."""

    init: str = "weights"
    restarts: int = 1
    max_iterations: int = 200
    tolerance: float = 1e-7
    polish: bool = True
    solver: str = "auto"

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and a `FrankWolfeInfo`."""
        state, key = state.split()
        return state.after(frank_wolfe(state.spec, state.models, key=key, **asdict(self)))


class _Record(NamedTuple):
    """What was found for one model: the result, the best run, and the objective of all."""

    permutations: Permutations
    course: Course
    best: int
    rounded: float
    polished: float
    runs: list[float]
    l2_before: float
    l2_after: float


def _match(
    search: Search, spec: PermutationSpec, anchor: dict, other: dict, base: Permutations, key: jax.Array, polish: bool
) -> _Record:
    keys = jax.random.split(key)

    def valued(permutations: Permutations) -> tuple[Permutations, float]:
        return permutations, joint_objective([anchor, permute(spec, permutations, other)])

    def improved(permutations: Permutations) -> tuple[Permutations, float]:
        hyper = {"key": keys[0], "solver": search.solver, "init": [permutations]}
        _, plan, _ = weight_matching(spec, [anchor, other], **hyper)
        return valued(plan.permutations(1) if plan else permutations)

    ends, course = explore(search, spec, anchor, [other], [base], keys[1])
    hard = [valued(end) for (end,) in ends]
    runs = [improved(end) for end, _ in hard] if polish else hard
    best = int(np.argmax([value for _, value in runs]))
    permutations, value = max(valued(base), runs[best], key=lambda found: found[1])
    distances = [l2_distance(spec, anchor, permute(spec, p, other)) for p in (identity(spec), permutations)]
    return _Record(permutations, course, best, hard[best][1], value, [value for _, value in runs], *distances)


def _info(found: list[_Record]) -> FrankWolfeInfo:
    traces = [record.course.objective[:, record.best] for record in found]
    length = max(map(len, traces))
    return FrankWolfeInfo(
        objective=np.array([np.pad(trace, (0, length - len(trace)), "edge") for trace in traces]),
        gap=np.array([record.course.gap[record.best] for record in found]),
        iterations=np.array([record.course.iterations[record.best] for record in found]),
        converged=np.array([record.course.converged[record.best] for record in found]),
        rounded=np.array([record.rounded for record in found]),
        polished=np.array([record.polished for record in found]),
        runs=np.array([record.runs for record in found]),
        l2_before=np.array([record.l2_before for record in found]),
        l2_after=np.array([record.l2_after for record in found]),
    )
