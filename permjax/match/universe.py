"""Many models in one common order, found by Frank-Wolfe over all groups of all models at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from permjax.action import permute
from permjax.match.assignment import Solver
from permjax.match.joint import aligned_to_first, compared, gauged, settle
from permjax.match.models import are_local, check_models, entries
from permjax.match.objective import joint_objective, pair_objectives
from permjax.match.search import Search, explore
from permjax.permutation import Permutations, identity
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec

_SWEEPS = 100


class UniverseInfo(NamedTuple):
    """Diagnostics of `universe_matching`; objectives are sums over all pairs of models.

    Attributes:
        objective: relaxed, at the start and after every iteration of the best run.
        gap: Frank-Wolfe gap where that run ended, in the objective's unit; zero certifies a stationary point.
        iterations: steps of that run.
        converged: whether it ended because nothing was left to gain.
        start: objective of the matching that the search starts near, float64.
        rounded: objective of the permutations nearest to the best run's end, float64.
        polished: objective of the result, float64.
        runs: objective of every run after polish; the result is better if its start was better than all of them.
        pairs: inner products of all pairs of aligned models, squared norms on the diagonal, float64.
    """

    objective: Float[np.ndarray, " iterations"]
    gap: float
    iterations: int
    converged: bool
    start: float
    rounded: float
    polished: float
    runs: Float[np.ndarray, " runs"]
    pairs: Float[np.ndarray, "models models"]


def universe_matching(
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
    """Align many models to each other: `max_X sum_{m<k} <X_m theta_m, X_k theta_k>`, all groups and models at once.

    Every model has its own soft permutation into one common order, the universe. The maps `P_k^-1 P_m` between any two
    models therefore agree around every cycle. The end is rounded to the nearest permutations and improved by matching
    one model after the other to the mean of the others (`merge_many`). At the end all are turned so that the anchor has
    its own order again; the result is never worse than what it started from.

    Args:
        spec: the symmetry.
        models: two or more pytrees; the first is the anchor.
        key: draws the restarts, and the order of models and groups in the polish.
        init: where the first run starts: `"weights"` (three parts of `merge_many` with the same key and seven of the
            barycentre), `"identity"`, `"barycentre"` (but for the anchor) or `"random"`. Of `"weights"` the second run
            starts at the barycentre, later ones near the matching and far from it in turn; other runs at random.
        restarts: number of runs, side by side.
        max_iterations: upper limit for every run.
        tolerance: a run ends where a step would gain less than this share of `sum_{m<k} |theta_m| |theta_k|`.
        polish: whether to improve the start and the ends one model at a time.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.

    Returns:
        The anchor as it is and the other models in its order, the plan, and a `UniverseInfo`.

    Raises:
        ValueError: fewer than two models, models that differ in structure or are not finite, an unknown init or solver,
            or hyper-parameters out of range.

    Example:
        >>> result = universe_matching(spec, [a, b, c], key=jax.random.key(0))
        >>> cycle_error(spec, pairwise_maps(spec, result.plan))
        0.0

    Source:
        Crisostomi et al., "C2M3: Cycle-consistent multi-model merging", NeurIPS 2024, sections 3 and 4; there with a
        bounded search for the step and without polish.
    """
    models, search = tuple(models), Search(init, restarts, max_iterations, tolerance, solver)
    check_models(spec, models)
    leaves = [entries(model, f"model {m}", are_local(models)) for m, model in enumerate(models)]
    found, info = _search(search, *compared(spec, leaves), key, polish)
    return gauged(spec, models, leaves, found, info)


@dataclass(frozen=True)
class UniverseMatching:
    """Step form of `universe_matching`: aligns all models of a state to each other and keeps the plan."""

    init: str = "weights"
    restarts: int = 1
    max_iterations: int = 200
    tolerance: float = 1e-7
    polish: bool = True
    solver: str = "auto"

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and a `UniverseInfo`."""
        state, key = state.split()
        return state.after(universe_matching(state.spec, state.models, key=key, **asdict(self)))


def _search(
    search: Search, spec: PermutationSpec, leaves: list[dict[str, Any]], key: jax.Array, polish: bool
) -> tuple[list[Permutations], UniverseInfo]:
    keys = jax.random.split(key)  # as in `merge_many`, whose result is the start
    still = [identity(spec)] * len(leaves)
    first = aligned_to_first(spec, leaves, keys[0], search.solver) if search.init == "weights" else still

    def improved(permutations: list[Permutations]) -> tuple[list[Permutations], float]:
        if not polish:
            return permutations, _objective(spec, leaves, permutations)
        found, trace, _ = settle(spec, leaves, permutations, keys[1], _SWEEPS, search.solver)
        return found, trace[-1]

    base = improved(first) if search.init == "weights" else (still, joint_objective(leaves))
    ends, course = explore(search, spec, None, leaves, base[0], jax.random.fold_in(key, 1))
    runs = [improved(end) for end in ends]
    best = int(np.argmax([value for _, value in runs]))
    winner = max(base, runs[best], key=lambda x: x[1])
    moved = [permute(spec, p, model) for p, model in zip(winner[0], leaves, strict=True)]
    return winner[0], UniverseInfo(
        objective=course.objective[:, best],
        gap=float(course.gap[best]),
        iterations=int(course.iterations[best]),
        converged=bool(course.converged[best]),
        start=base[1],
        rounded=_objective(spec, leaves, ends[best]),
        polished=winner[1],
        runs=np.array([value for _, value in runs]),
        pairs=pair_objectives(moved),
    )


def _objective(spec: PermutationSpec, leaves: Sequence[dict[str, Any]], permutations: Sequence[Permutations]) -> float:
    return joint_objective([permute(spec, p, model) for p, model in zip(permutations, leaves, strict=True)])
