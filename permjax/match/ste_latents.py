"""The two things that a straight-through search may move: matrices for every group, or weights for every model.

Both are hardened to permutations on the host, and both move along the gradient of the loss at the hard point.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from permjax import tree
from permjax.action import permute
from permjax.match.assignment import Solver
from permjax.match.sinkhorn import balance
from permjax.match.soft import Soft, from_permutations, rounded, soft_permute, soft_shape
from permjax.match.weights import weight_matching
from permjax.permutation import Permutations
from permjax.symmetry.spec import PermutationSpec

Tensors: TypeAlias = dict[str, Array]
_FLOOR = 1e-12  # what is left of a matrix entry that falls below zero, so that every row and column has a sum


class Task(NamedTuple):
    """What stays the same during a search; the first model is the anchor."""

    spec: PermutationSpec
    models: tuple[Any, ...]
    loss: Callable
    learning_rate: float
    solver: Solver


class Latent(NamedTuple):
    """A kind of latent, as functions for one model.

    Attributes:
        start: `start(spec, anchor, key)` -> the latent to begin with.
        harden: `harden(task, model, latent, last, key)` -> the permutations that the latent stands for; `last` are
            those of the step before, or None.
        point: `point(spec, permutations, model)` -> the value of the latent there.
        place: `place(spec, permutations, model, point)` -> the aligned model, differentiable in the point.
        project: back to where a latent may be.
    """

    start: Callable[[PermutationSpec, Any, Array], Tensors]
    harden: Callable[[Task, Any, Tensors, Permutations | None, Array], Permutations]
    point: Callable[[PermutationSpec, Permutations, Any], Tensors]
    place: Callable[[PermutationSpec, Permutations, Any, Tensors], Any]
    project: Callable[[Tensors], Tensors]


class Moving(NamedTuple):
    """Latents, one for every model but the anchor, and the optimizer's moments of them."""

    latents: list[Tensors]
    moments: Any


def begin(latent: Latent, task: Task, key: Array) -> Moving:
    """Return the latents to begin with."""
    keys = jax.random.split(key, len(task.models) - 1)
    latents = [latent.start(task.spec, task.models[0], k) for k in keys]
    return Moving(latents, _adam(task.learning_rate).init(latents))


def hardened(
    latent: Latent, task: Task, moving: Moving, last: Sequence[Permutations] | None, key: Array
) -> list[Permutations]:
    """Return the permutations for which the latents stand, one for every model but the anchor."""
    starts = last or [None] * len(moving.latents)
    keys = jax.random.split(key, len(starts))
    parts = zip(task.models[1:], moving.latents, starts, keys, strict=True)
    return [latent.harden(task, *part) for part in parts]


def advance(
    latent: Latent, task: Task, moving: Moving, hard: Sequence[Permutations], mixture: Array, batch: Any
) -> tuple[Moving, Array]:
    """Move the latents along the gradient at the hard point, and return the loss there."""
    return _advance(latent, task.spec, task.loss, task.learning_rate, moving, task.models, hard, mixture, batch)


def mixed_loss(loss: Callable, models: Sequence[Any], mixture: Float[Array, " models"], batch: Any) -> Array:
    """Return the loss of the weighted mean of models."""
    return jnp.asarray(loss(tree.average(models, mixture), batch), jnp.float32)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _advance(
    latent: Latent,
    spec: PermutationSpec,
    loss: Callable,
    learning_rate: float,
    moving: Moving,
    models: tuple[Any, ...],
    hard: Sequence[Permutations],
    mixture: Array,
    batch: Any,
) -> tuple[Moving, Array]:
    pairs = list(zip(hard, models[1:], strict=True))

    def objective(points: Sequence[Tensors]) -> Array:
        aligned = [latent.place(spec, *pair, point) for pair, point in zip(pairs, points, strict=True)]
        return mixed_loss(loss, (models[0], *aligned), mixture, batch)

    points = [latent.point(spec, *pair) for pair in pairs]
    value, slope = jax.value_and_grad(objective)(points)
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = _adam(learning_rate).update(slope, moving.moments)
        latents: Any = optax.apply_updates(moving.latents, updates)
    return Moving([latent.project(x) for x in latents], moments), value


@lru_cache(maxsize=16)
def _adam(learning_rate: float) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


# -- matrices ------------------------------------------------------------------------------------------------------


def _nearly_uniform(spec: PermutationSpec, _anchor: Any, key: Array) -> Soft:
    keys = jax.random.split(key, len(spec.groups))
    noise = {g.name: jax.random.uniform(k, soft_shape(spec, g.name)) for g, k in zip(spec.groups, keys, strict=True)}
    return {name: balance(10 + x) for name, x in noise.items()}


def _nearest(task: Task, _model: Any, matrices: Soft, _last: Permutations | None, _key: Array) -> Permutations:
    return rounded(task.spec, matrices, task.solver)


def _matrices(spec: PermutationSpec, permutations: Permutations, _model: Any) -> Soft:
    return from_permutations(spec, permutations)


def _mixed(spec: PermutationSpec, _permutations: Permutations, model: Any, matrices: Soft) -> Any:
    return soft_permute(spec, matrices, model)


def _balanced(matrices: Soft) -> Soft:
    return {name: balance(jnp.maximum(x, _FLOOR)) for name, x in matrices.items()}


# -- weights -------------------------------------------------------------------------------------------------------


def _weights(spec: PermutationSpec, model: Any) -> Tensors:
    """Return the floating leaves of role weight by name, in float32 or wider."""
    leaves = {name: jnp.asarray(leaf) for name, leaf in tree.flatten(model).items() if spec.leaf(name).role == "weight"}
    floating = {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return {name: leaf.astype(np.result_type(np.float32, leaf.dtype)) for name, leaf in floating.items()}


def _of_anchor(spec: PermutationSpec, anchor: Any, _key: Array) -> Tensors:
    return {name: jnp.array(leaf) for name, leaf in _weights(spec, anchor).items()}


def _matched(task: Task, model: Any, weights: Tensors, last: Permutations | None, key: Array) -> Permutations:
    pair = [tree.flatten(model) | w for w in (weights, _weights(task.spec, model))]
    init = None if last is None else [last]
    result = weight_matching(task.spec, pair, key=key, solver=task.solver, init=init)
    return Permutations(result.plan.permutations(1)) if result.plan else {}


def _permuted_weights(spec: PermutationSpec, permutations: Permutations, model: Any) -> Tensors:
    return _weights(spec, permute(spec, permutations, model))


def _replaced(spec: PermutationSpec, permutations: Permutations, model: Any, weights: Tensors) -> Any:
    def chosen(name: str, leaf: Any) -> Any:
        return weights[name].astype(leaf.dtype) if name in weights else leaf

    return tree.map_named(chosen, permute(spec, permutations, model))


def _unchanged(weights: Tensors) -> Tensors:
    return weights


LATENTS = {
    "permutation": Latent(_nearly_uniform, _nearest, _matrices, _mixed, _balanced),
    "weights": Latent(_of_anchor, _matched, _permuted_weights, _replaced, _unchanged),
}
