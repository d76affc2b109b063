"""Weight matching: the order of units that brings one model's weights nearest to another's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from permjax.match.ascent import Trace, ascend
from permjax.match.assignment import Solver
from permjax.match.compiled import best_ends
from permjax.match.models import are_local, check_models, counted_names, entries, reordered
from permjax.match.problem import DEVICE, HOST, Problem, State, audited, distance, exceeds, moved, pose, start
from permjax.permutation import Permutations, identity, validate
from permjax.plan import Plan
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec


class WeightInfo(NamedTuple):
    """Diagnostics of `weight_matching`, with one entry for every model but the anchor.

    Attributes:
        objective: inner product with the anchor over leaves of role weight, float64, before the first and after every
            sweep of the best run; shorter runs repeat their last value.
        sweeps: sweeps of the best run.
        converged: whether a run ended because no group could improve.
        solves: groups solved in all runs.
        skipped: groups passed over because nothing near them had moved since their last solve.
        l2_before: distance to the anchor over leaves of role weight.
        l2_after: the same after matching.
    """

    objective: Float[np.ndarray, "models sweeps"]
    sweeps: Int[np.ndarray, " models"]
    converged: Bool[np.ndarray, " models"]
    solves: Int[np.ndarray, " models"]
    skipped: Int[np.ndarray, " models"]
    l2_before: Float[np.ndarray, " models"]
    l2_after: Float[np.ndarray, " models"]


def weight_matching(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    key: jax.Array,
    solver: Solver = "auto",
    max_sweeps: int = 100,
    restarts: int = 1,
    init: Sequence[Mapping[str, Any]] | None = None,
    vectorized: bool | None = None,
) -> Result:
    """Align models to the first one by their weights: `max_p sum_l <a_l, permute(p, b)_l>` over leaves of role weight.

    Block coordinate ascent: one group at a time, with all groups that it indexes, gets the best assignment under the
    Gram matrix of its entries. Where a group stands twice in a leaf the objective is linearised. Only gains of the
    true objective in float64 are accepted, and ties keep the old order. The first sweep of a run without `init` places
    one group after the other, each by the entries whose other axes are placed or fixed.

    Args:
        spec: the symmetry.
        models: two or more pytrees; the first is the anchor. NumPy and CPU leaves are handled in NumPy, without
            compilation and without wider copies; lazy ones are read leaf by leaf; leaves on an accelerator stay there.
        key: draws the order of the groups from the second sweep on, and the restarts.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.
        max_sweeps: upper limit for every run.
        restarts: number of runs for each model; the first starts as given, the others at random.
        init: permutations to start from, for every model but the anchor; by default the first sweep finds a start.
        vectorized: whether the random starts of all models run side by side in one compiled program, in float32, after
            which the best one of each model is finished like the first; by default on an accelerator only, because a
            CPU is quicker with one after the other.

    Returns:
        The anchor as it is and the other models in its order, the plan, and a `WeightInfo`.

    Raises:
        ValueError: fewer than two models, models that differ in structure from each other or from the spec, weights
            that are not finite, or hyper-parameters out of range.

    Example:
        >>> result = weight_matching(spec, [a, b], key=jax.random.key(0))
        >>> merged = average(result.models)

    Source:
        Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, algorithm 1; here also for groups that stand twice in a
        leaf or index each other, and with a start built from the outside in.
    """
    models = tuple(models)
    check_models(spec, models)
    starts = _starts(spec, len(models) - 1, max_sweeps, restarts, init)
    local = are_local(models)
    found = [entries(model, f"model {index}", local) for index, model in enumerate(models)]
    counted = counted_names(spec, found[0])
    problem = pose(spec, counted, found[0], HOST if local else DEVICE, solver)
    seed = np.asarray(jax.random.key_data(key)).ravel()
    rngs = [np.random.default_rng([index, *seed]) for index in range(1, len(models))]
    more = [[_random(spec, rng) for _ in range(restarts - 1)] for rng in rngs]
    if restarts > 1 and (not local if vectorized is None else vectorized):
        traced = "optax" if solver == "optax" else "auction"  # what works in a compiled program
        options: dict[str, Any] = {"leaves": counted, "solver": traced, "max_sweeps": max_sweeps}
        more = [[best] for best in best_ends(spec, found[0], found[1:], more, **options)]
    aligned, permutations, records = [models[0]], [identity(spec)], []
    for model, other, rng, first, rest in zip(models[1:], found[1:], rngs, starts, more, strict=True):
        before = start(problem, other)
        after, traces = _align(problem, before, rng, [first, *rest], max_sweeps)
        permutations.append(identity(spec) | after.permutations)
        aligned.append(reordered(spec, permutations[-1], model, other))
        records.append(_Record(distance(problem, before), distance(problem, after), traces))
    return Result(tuple(aligned), Plan.from_permutations(spec, permutations), _info(records))


@dataclass(frozen=True)
class WeightMatching:
    """Step form of `weight_matching`: aligns the models of a state to the first and keeps the plan."""

    solver: str = "auto"
    max_sweeps: int = 100
    restarts: int = 1
    vectorized: bool | None = None

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and a `WeightInfo`."""
        state, key = state.split()
        return state.after(weight_matching(state.spec, state.models, key=key, **vars(self)))


def _align(
    problem: Problem, state: State, rng: np.random.Generator, begins: Sequence[Permutations | None], max_sweeps: int
) -> tuple[State, list[Trace]]:
    """Return the best state found from all starts, and the traces of all runs, the best one first."""
    runs: list[tuple[State, Trace]] = []
    for begin in begins:
        first = state if begin is None else audited(problem, moved(problem, state, begin))
        found = ascend(problem, first, rng, max_sweeps, grow=begin is None)
        runs.insert(0 if not runs or exceeds(found[0], runs[0][0]) else len(runs), found)
    return runs[0][0], [trace for _, trace in runs]


def _random(spec: PermutationSpec, rng: np.random.Generator) -> Permutations:
    return {g: rng.permuted(p, axis=-1) for g, p in identity(spec).items()}


def _starts(
    spec: PermutationSpec, others: int, max_sweeps: int, restarts: int, init: Sequence[Mapping[str, Any]] | None
) -> list[Permutations | None]:
    if max_sweeps < 1 or restarts < 1:
        raise ValueError(f"max_sweeps and restarts must be at least 1, not {max_sweeps} and {restarts}.")
    if init is None:
        return [None] * others
    if len(init) != others:
        raise ValueError(
            f"init must hold permutations for each of the {others} models after the anchor, not {len(init)}."
        )
    for permutations in init:
        validate(spec, permutations)
    return [{g: np.asarray(p) for g, p in permutations.items()} for permutations in init]


class _Record(NamedTuple):
    before: float
    after: float
    traces: list[Trace]


def _info(records: list[_Record]) -> WeightInfo:
    best = [record.traces[0] for record in records]
    length = max(len(trace.objective) for trace in best)
    return WeightInfo(
        objective=np.array([np.pad(t.objective, (0, length - len(t.objective)), "edge") for t in best]),
        sweeps=np.array([len(t.objective) - 1 for t in best]),
        converged=np.array([t.converged for t in best]),
        solves=np.array([sum(t.solves for t in record.traces) for record in records]),
        skipped=np.array([sum(t.skipped for t in record.traces) for record in records]),
        l2_before=np.array([record.before for record in records]),
        l2_after=np.array([record.after for record in records]),
    )
