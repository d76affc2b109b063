"""The search behind straight-through matching: harden, measure, move, and keep the best candidate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from permjax.action import permute
from permjax.match.ste_latents import Latent, Task, advance, begin, hardened, mixed_loss
from permjax.permutation import Permutations, identity
from permjax.symmetry.spec import PermutationSpec

_HELD_BACK = 5  # one batch in so many is held back where no validation data is given


class Limits(NamedTuple):
    """When a search ends, and how often it measures a candidate."""

    steps: int
    every: int
    patience: int


class Search(NamedTuple):
    """The best permutations of one search, for every model but the anchor, and its record; see `SteInfo`."""

    permutations: list[Permutations]
    loss: np.ndarray
    changed: np.ndarray
    validation: np.ndarray
    best: int
    steps: int
    converged: bool


class Batches(NamedTuple):
    """Data that can be read again, in two parts."""

    data: Iterable
    validation: Iterable | None

    def steps(self) -> Iterator[Any]:
        """Yield batches for steps, from the start again when they end."""
        while True:
            yield from (b for i, b in enumerate(self.data) if self.validation is not None or i % _HELD_BACK)

    def held(self) -> Iterator[Any]:
        """Yield the batches that choose."""
        return islice(self.data, 0, None, _HELD_BACK) if self.validation is None else iter(self.validation)


def search(latent: Latent, task: Task, batches: Batches, limits: Limits, key: jax.Array) -> Search:
    """Move the latents until the permutations rest or the steps run out; the start order is the first candidate."""
    key, begin_key, end_key = jax.random.split(key, 3)
    moving, last, rest, step = begin(latent, task, begin_key), None, 0, 0
    loss, changed = np.full((2, limits.steps), np.nan)
    candidates = _Candidates(partial(_held_loss, task, batches), limits.steps + 2)
    candidates.consider(0, [identity(task.spec) for _ in task.models[1:]])
    for step, batch in enumerate(islice(batches.steps(), limits.steps), 1):
        harden_key, mix_key = jax.random.split(jax.random.fold_in(key, step))
        hard = hardened(latent, task, moving, last, harden_key)
        if (step - 1) % limits.every == 0:
            candidates.consider(step, hard)
        changed[step - 1] = _moved(hard, last) if last else np.nan
        rest = rest + 1 if changed[step - 1] == 0 else 0
        moving, value = advance(latent, task, moving, hard, _mixture(mix_key, len(task.models)), batch)
        loss[step - 1], last = _finite(value, f"at step {step}"), hard
        if rest == limits.patience:
            break
    candidates.consider(step + 1, hardened(latent, task, moving, last, end_key))
    ends = candidates.best, step, rest == limits.patience
    return Search(candidates.chosen, loss, changed, candidates.losses, *ends)


class _Candidates:
    """The losses of candidates on the data held back, and the best candidate so far."""

    def __init__(self, measure: Callable, count: int) -> None:
        self.losses = np.full(count, np.nan)
        self.best, self.chosen = 0, []
        self._measure, self._last = measure, []

    def consider(self, column: int, permutations: list[Permutations]) -> None:
        """Measure permutations, unless they are those measured last."""
        if self._last and not _moved(permutations, self._last):
            return
        self._last, self.losses[column] = permutations, self._measure(permutations)
        if not self.chosen or self.losses[column] < self.losses[self.best]:
            self.best, self.chosen = column, permutations


def _held_loss(task: Task, batches: Batches, permutations: Sequence[Permutations]) -> float:
    """Return the loss on the data held back at the mean of all models, and of all pairs, averaged."""
    count = len(task.models)
    corners = [list(range(count)), *(combinations(range(count), 2) if count > 2 else ())]
    mixtures = np.array([[(m in corner) / len(corner) for m in range(count)] for corner in corners], np.float32)
    aligned = _aligned(task.spec, task.models, permutations)
    values = [_losses(task.loss, aligned, mixtures, batch).mean() for batch in batches.held()]
    return float(np.mean([_finite(value, "on the data held back") for value in values]))


@partial(jax.jit, static_argnums=0)
def _aligned(spec: PermutationSpec, models: tuple, permutations: Sequence[Permutations]) -> tuple:
    return (models[0], *(permute(spec, p, model) for p, model in zip(permutations, models[1:], strict=True)))


@partial(jax.jit, static_argnums=0)
def _losses(loss: Callable, models: tuple, mixtures: Float[Array, "points models"], batch: Any) -> Array:
    return jax.lax.map(lambda mixture: mixed_loss(loss, models, mixture, batch), mixtures)


def _mixture(key: jax.Array, count: int) -> Float[Array, " models"]:
    if count == 2:
        return jnp.full(2, 0.5, jnp.float32)
    parts = jax.random.uniform(key, (count,), jnp.float32)
    return parts / parts.sum()


def _moved(one: Sequence[Permutations], two: Sequence[Permutations]) -> float:
    """Return the share of units that lie elsewhere."""
    differs = [(p[g] != q[g]).ravel() for p, q in zip(one, two, strict=True) for g in p]
    return float(np.concatenate(differs).mean()) if differs else 0.0


def _finite(value: Any, where: str) -> float:
    if not np.isfinite(value):
        raise ValueError(
            f"the loss {where} is {value}; look for batches with NaN or Inf, or a loss that overflows between models "
            "that are far apart."
        )
    return float(value)
