"""Activation matching: the order of units whose activations on data are most alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from permjax.match.assignment import Solver, solve
from permjax.match.costs import is_root
from permjax.match.models import are_local, check_models, entries, reordered
from permjax.match.moments import NOTHING, STATISTICS, Moments, Tap, kernel, merge, observe, taps
from permjax.match.nested import Named, Nest, assigned, settle, stays
from permjax.permutation import Permutations, compose, identity
from permjax.plan import Plan
from permjax.steps import MergeState, Result
from permjax.symmetry.capture import capture
from permjax.symmetry.spec import PermutationSpec

_PASSES = 5


class ActivationInfo(NamedTuple):
    """Diagnostics of `activation_matching`, with one row for every model but the anchor.

    Attributes:
        groups: names of the groups.
        before: mean Pearson correlation of the units that lay side by side, by group; NaN without activations.
        after: the same for the units that lie side by side now, as the last pass over the data saw them.
    """

    groups: tuple[str, ...]
    before: Float[np.ndarray, "models groups"]
    after: Float[np.ndarray, "models groups"]


def activation_matching(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    apply: Callable,
    data: Iterable,
    statistic: str = "correlation",
    solver: Solver = "auto",
) -> Result:
    """Align models to the first one by their activations: for every group `max_p sum_i C[i, p(i)]`.

    `C` adds up, over all places that write the group, the statistic of every anchor unit with every other unit, taken
    in one pass over the data. Groups that index others are solved with them: a head's score is that of its best inner
    order. Where two groups share activations but neither indexes the other (queries of grouped attention), each is
    blurred by the other's order, and further passes over the data follow until nothing moves (five in all at most).

    Args:
        spec: the symmetry.
        models: two or more pytrees; the first is the anchor.
        apply: `apply(params, *inputs) -> outputs`.
        data: batches; a batch is an array or a tuple of inputs. A list or loader, so that it can be read again.
        statistic: `"correlation"` (Pearson; units that never vary correlate with nothing), `"covariance"`, or
            `"moment"`, the mean product without centring.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.

    Returns:
        The anchor as it is and the other models in its order, the plan, and an `ActivationInfo`.

    Raises:
        ValueError: fewer than two models, models that differ in structure or are not finite, no data, or an unknown
            statistic.

    Example:
        >>> result = activation_matching(spec, [a, b], apply=apply, data=batches)
        >>> result.info.after.mean()

    Source:
        Li et al., "Convergent Learning", ICLR 2016, section 3; Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023,
        section 3.1 (there without centring).
    """
    models = tuple(models)
    check_models(spec, models)
    if statistic not in STATISTICS:
        raise ValueError(f"there is no statistic '{statistic}'; choose from {list(STATISTICS)}.")
    local = are_local(models)
    found = [entries(model, f"model {index}", local) for index, model in enumerate(models)]

    def permuted(permutations: list[Permutations]) -> tuple:
        others = zip(permutations, models[1:], found[1:], strict=True)
        return (models[0], *(reordered(spec, p, model, leaves) for p, model, leaves in others))

    look, permutations, passes = observer(spec, apply), [identity(spec) for _ in models[1:]], []
    while len(passes) < _PASSES and (not passes or passes[-1].is_blurred):
        passes.append(_match(spec, look, permuted(permutations), data, statistic, solver))
        permutations = [compose(spec, p, q) for p, q in zip(passes[-1].permutations, permutations, strict=True)]
    info = ActivationInfo(tuple(g.name for g in spec.groups), passes[0].before, passes[-1].after)
    return Result(permuted(permutations), Plan.from_permutations(spec, [identity(spec), *permutations]), info)


@dataclass(frozen=True)
class ActivationMatching:
    """Step form of `activation_matching`: aligns the models of a state to the first and keeps the plan."""

    statistic: str = "correlation"
    solver: str = "auto"

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and an `ActivationInfo`; needs `apply` and `data`."""
        apply, data = (state.need(name, "ActivationMatching") for name in ("apply", "data"))
        hyper = {"statistic": self.statistic, "solver": self.solver}
        return state.after(activation_matching(state.spec, state.models, apply=apply, data=data, **hyper))


class _Pass(NamedTuple):
    """What one pass over the data found, for every model but the anchor; blurred if another pass may find more."""

    permutations: list[Permutations]
    before: np.ndarray
    after: np.ndarray
    is_blurred: bool


def _match(
    spec: PermutationSpec, look: Callable, models: tuple, data: Iterable, statistic: str, solver: Solver
) -> _Pass:
    streamed = stream(look, models, data)
    permutations = [_solved(spec, moments, statistic, solver) for moments in streamed]
    before = np.array([_correlations(spec, moments, identity(spec)) for moments in streamed])
    after = np.array([_correlations(spec, moments, p) for moments, p in zip(streamed, permutations, strict=True)])
    still = all(stays(rows) for p in permutations for rows in p.values())
    return _Pass(permutations, before, after, not still and _entangled(spec, streamed[0]))


def observer(spec: PermutationSpec, apply: Callable) -> Callable:
    """Return the compiled function `(models, inputs) -> moments of all taps, for every model but the anchor`."""

    def look(models: tuple, inputs: tuple) -> list[dict[Tap, Moments]]:
        first, *others = (capture(apply, spec, model, *inputs).groups for model in models)
        wanted = [tap for g in spec.groups if is_root(spec, g.name) for tap in taps(spec, g.name, first)]
        return [{t: observe(spec, t, first[t.group][t.name], o[t.group][t.name]) for t in wanted} for o in others]

    return jax.jit(look)


def stream(look: Callable, models: tuple, data: Iterable) -> list[dict[Tap, Moments]]:
    """Return the moments of all taps over all batches, for every model but the anchor; `look` is an `observer`.

    Raises:
        ValueError: `data` has no batches.
    """
    found: list[dict[Tap, Moments]] | None = None
    for batch in data:
        seen = look(models, batch if isinstance(batch, tuple) else (batch,))
        before = found or [{} for _ in seen]
        found = [{t: merge(m.get(t, NOTHING), n[t]) for t in n} for m, n in zip(before, seen, strict=True)]
    if found is None:
        raise ValueError(
            "data gave no batches; give a list or a loader that can be read again, with one batch or more."
        )
    return found


def _nest(spec: PermutationSpec, group: str, solver: Solver = "auto") -> Nest:
    return Nest(
        {g.name: g.per for g in spec.groups}, partial(solve, solver=solver, what=f"the cost of group '{group}'")
    )


def _solved(spec: PermutationSpec, moments: Mapping[Tap, Moments], statistic: str, solver: Solver) -> Permutations:
    """Return the best permutations for the statistic; groups without activations stay."""
    permutations = identity(spec)
    for root in (g.name for g in spec.groups if is_root(spec, g.name)):
        if kernels := [kernel(spec, tap, m, statistic) for tap, m in moments.items() if root in tap.free]:
            permutations |= assigned(_nest(spec, root, solver), kernels, root)
    return permutations


def _correlations(spec: PermutationSpec, moments: Mapping[Tap, Moments], permutations: Permutations) -> list[float]:
    """Return the mean correlation of the units that these permutations put side by side, by group."""
    rows = {g.name: Named(tuple((h, 0) for h in (*g.per, g.name)), permutations[g.name]) for g in spec.groups}
    found: dict[str, list[float]] = {g.name: [] for g in spec.groups}
    for tap, m in moments.items():
        mean = settle(_nest(spec, tap.group), kernel(spec, tap, m, "correlation"), rows).values.mean()
        for group in tap.free:
            found[group].append(float(mean))
    return [float(np.mean(values)) if values else float("nan") for values in found.values()]


def _entangled(spec: PermutationSpec, moments: Mapping[Tap, Moments]) -> bool:
    """Tell whether two groups share activations but neither indexes the other, so that each blurs the other."""
    return any(
        s.name == t.name
        and s.group not in (t.group, *spec.group(t.group).per)
        and t.group not in spec.group(s.group).per
        for s, t in combinations(moments, 2)
    )
