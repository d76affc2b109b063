"""Straight-through matching: the order of units in which the mean of the models has the lowest loss on data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from permjax import tree
from permjax.match.assignment import Solver
from permjax.match.models import are_local, check_models, entries, reordered
from permjax.match.ste_latents import LATENTS, Task
from permjax.match.ste_search import Batches, Limits, Search, search
from permjax.permutation import identity
from permjax.plan import Plan
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec

DEFAULTS = {"permutation": (60, 0.05), "weights": (40, 1e-3)}
"""Kind of latent -> steps and learning rate."""


class SteInfo(NamedTuple):
    """Diagnostics of `ste_matching`, with one row for every search: one in all, or one for every other model.

    Attributes:
        loss: loss at the point of every step, NaN after the last.
        changed: share of units that were elsewhere a step before, NaN for the first step and after the last.
        validation: loss of the candidates on data held back: first the models as they came, then the permutations of
            every step, then those after the last; NaN where not measured.
        best: column of the candidate that was chosen.
        steps: number of steps made.
        converged: whether the search ended because the permutations had come to rest, not because steps ran out.
    """

    loss: Float[np.ndarray, "searches steps"]
    changed: Float[np.ndarray, "searches steps"]
    validation: Float[np.ndarray, "searches candidates"]
    best: Int[np.ndarray, " searches"]
    steps: Int[np.ndarray, " searches"]
    converged: Bool[np.ndarray, " searches"]


def ste_matching(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    loss: Callable,
    data: Iterable,
    key: jax.Array,
    latent: str = "permutation",
    validation: Iterable | None = None,
    together: bool = True,
    steps: int | None = None,
    learning_rate: float | None = None,
    every: int = 5,
    patience: int = 20,
    solver: Solver = "auto",
) -> Result:
    """Align models to the first one by the loss of their mean: `min_p L(sum_m w_m permute(p_m, theta_m))`.

    Permutations are hardened from continuous latents, and the gradient of the loss at the hard point moves the latents
    (straight through). The two kinds of latents find different solutions and bear the same name in the literature:

    - `"permutation"`: a doubly stochastic matrix for every group, hardened by assignment. It starts from noise and may
      end at any order with a low loss, which need not bring like units together.
    - `"weights"`: a copy of the anchor's weights for every other model, hardened by weight matching; its first point is
      the answer of weight matching, from which it departs where the data ask for it.

    Two models are mixed half and half. More are mixed by random weights, uniform numbers divided by their sum, drawn
    anew for every step. Running statistics are mixed like weights; a loss may re-estimate them from the batch. The
    result is the candidate with the lowest loss on data that no step uses, at the mean of all models and of every
    pair; the order in which the models came is one of the candidates.

    Args:
        spec: the symmetry.
        models: two or more pytrees; the first is the anchor.
        loss: `loss(params, batch) -> scalar`. Give the same function object again, so that it is compiled once.
        data: batches as `loss` takes them. A list or loader, so that it can be read again; it gives a batch per step.
        key: draws starts and mixtures.
        latent: `"permutation"` or `"weights"`.
        validation: batches that choose the candidate; by default every fifth of `data`, from the first on. Data that
            comes in a new order at every reading needs validation data of its own.
        together: whether one search aligns all models at once, or every model is aligned to the anchor by a search of
            its own, as the two-model method does.
        steps: upper limit for every search; 60 for permutations and 40 for weights by default.
        learning_rate: of Adam; 0.05 for permutations and 0.001 for weights by default.
        every: steps between candidates; the first and the last point are always candidates.
        patience: a search ends after so many steps in which no unit moved.
        solver: name of an assignment solver, or a function; see `permjax.match.assignment.solve`.

    Returns:
        The anchor as it is and the other models in its order, the plan, and a `SteInfo`.

    Raises:
        ValueError: fewer than two models, models that differ in structure from each other or from the spec or are not
            finite, no data, a loss that is no scalar or not finite, or hyper-parameters out of range.

    Example:
        >>> result = ste_matching(spec, [a, b], loss=loss, data=batches, key=jax.random.key(0), latent="weights")
        >>> merged = average(spec, result.models).models[0]

    Source:
        Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, section 3.3 (weights; matrices in its first version);
        Pena et al., "Re-basin via implicit Sinkhorn differentiation", CVPR 2023 (matrices); "Linear mode connectivity
        between multiple models modulo permutation symmetries", ICML 2025 (weights, many models). Chosen there is the
        iterate with the lowest loss on a batch. That aligned pairs do not align third models (Ito et al., ICLR 2025,
        table 3) is a statement on `latent="permutation"` with `together=False`.
    """
    models = tuple(models)
    check_models(spec, models)
    local = are_local(models)
    found = [entries(model, f"model {index}", local) for index, model in enumerate(models)]
    limits, rate = _hyper(latent, steps, learning_rate, every, patience)
    batches = Batches(data, validation)
    _check_data(batches, loss, models[0])
    placed = tuple(jax.tree.map(jnp.asarray, model) for model in models)
    teams = [placed] if together else [(placed[0], other) for other in placed[1:]]
    tasks = [Task(spec, team, loss, rate, solver) for team in teams]
    searches = [
        search(LATENTS[latent], task, batches, limits, jax.random.fold_in(key, number))
        for number, task in enumerate(tasks)
    ]
    permutations = [p for one in searches for p in one.permutations]
    aligned = [reordered(spec, *one) for one in zip(permutations, models[1:], found[1:], strict=True)]
    return Result((models[0], *aligned), Plan.from_permutations(spec, [identity(spec), *permutations]), _info(searches))


@dataclass(frozen=True)
class SteMatching:
    """Step form of `ste_matching`: aligns the models of a state to the first and keeps the plan."""

    latent: Literal["permutation", "weights"] = "permutation"
    together: bool = True
    steps: int | None = None
    learning_rate: float | None = None
    every: int = 5
    patience: int = 20
    solver: str = "auto"

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and a `SteInfo`; needs `loss` and `labelled`."""
        loss, data = (state.need(name, "SteMatching") for name in ("loss", "labelled"))
        state, key = state.split()
        return state.after(ste_matching(state.spec, state.models, loss=loss, data=data, key=key, **vars(self)))


def _hyper(
    latent: str, steps: int | None, learning_rate: float | None, every: int, patience: int
) -> tuple[Limits, float]:
    if latent not in LATENTS:
        raise ValueError(f"there is no latent '{latent}'{tree.nearest(latent, LATENTS)}; choose from {list(LATENTS)}.")
    usual = DEFAULTS[latent]
    steps, rate = usual[0] if steps is None else steps, usual[1] if learning_rate is None else learning_rate
    if not (min(steps, every, patience) >= 1 and 0 < rate < np.inf):
        raise ValueError(
            f"steps, every and patience must be at least 1, not {steps}, {every} and {patience}, and the learning "
            f"rate positive, not {rate}."
        )
    return Limits(steps, every, patience), rate


def _check_data(batches: Batches, loss: Callable, model: Any) -> None:
    for name, part in (("data", batches.data), ("validation", batches.validation)):
        if part is not None and iter(part) is part:
            raise ValueError(f"{name} can be read only once; give a list or a loader that can be read again.")
    least = 2 if batches.validation is None else 1
    first = list(islice(batches.data, least))
    if len(first) < least or next(batches.held(), None) is None:
        raise ValueError(
            f"data gave {len(first)} batches; it must give one, and `validation` another, or without `validation` two, "
            "of which one is held back."
        )
    result = jax.eval_shape(loss, model, first[0])
    if getattr(result, "shape", None) != ():
        raise ValueError(f"loss(params, batch) must return a scalar, not {result}.")


def _info(searches: Sequence[Search]) -> SteInfo:
    return SteInfo(**{name: np.array([getattr(one, name) for one in searches]) for name in SteInfo._fields})
