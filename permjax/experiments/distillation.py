"""Distillation: a network fitted by gradient steps to given outputs, as a control for the closed form."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from permjax import tree


def distill(
    apply: Callable[..., Any],
    params: PyTree,
    targets: Sequence[PyTree],
    batches: Sequence[Any],
    *,
    key: jax.Array,
    steps: int = 400,
    learning_rate: float = 5e-4,
    weights: Sequence[PyTree] | None = None,
    frozen: str | Iterable[str] = (),
    stateful: bool = False,
) -> tuple[PyTree, Float[np.ndarray, " steps"]]:
    """Adam on the mean squared error between a network's outputs and given ones: sum w (f(x) - t)^2 / sum w.

    One batch per step, in a fresh random order every time all have been used; the learning rate falls to zero along a
    cosine. Steps are compiled one by one: inside a loop, XLA is many times slower on gradients of convolutions.

    Args:
        apply: `apply(params, *inputs) -> outputs`, any pytree of arrays `[batch, ...]`, such as one for every head.
        params: where to start.
        targets: for every batch a pytree like the outputs.
        batches: inputs; a batch is an array or a tuple or list of inputs.
        key: decides the order.
        steps: number of batches used.
        learning_rate: of the first step.
        weights: for every batch a pytree like the outputs, of arrays `[batch]` (or longer beginnings of the outputs'
            shapes) of numbers >= 0. Entries of weight zero count for nothing, whatever their targets hold, so that a
            teacher can be left out where a sample is not of its domain. Equal ones by default.
        frozen: patterns of names (`fnmatch`) of leaves that stay, such as running statistics. Leaves of no floating
            type stay in any case.
        stateful: `apply` returns `(outputs, params)`, and what stays takes its values from there: a network in training
            mode, whose normalisation works from the first step.

    Returns:
        The fitted parameters (JAX arrays) and the loss of every step before it was made.

    Raises:
        ValueError: not as many targets or weights as batches, none of them, outputs of another structure or shape than
            the targets, a pattern that matches no leaf, no leaf to fit, or a loss that is not finite.

    Example:
        >>> targets = [(apply(a, x), apply(b, x)) for x in batches]
        >>> student, losses = distill(heads, start, targets, batches, key=jax.random.key(0))
    """
    _check(batches, targets, weights, steps)
    named = tree.flatten(params)
    stays = _frozen(named, (frozen,) if isinstance(frozen, str) else tuple(frozen))
    state = jax.tree.map(jnp.asarray, params)
    rule, losses = (learning_rate, steps), []
    moments = _optimizer(rule).init(_split(state, stays)[0])
    shares = [None] * len(batches) if weights is None else weights
    for row in _order(key, len(batches), steps):
        inputs = tuple(batches[row]) if isinstance(batches[row], tuple | list) else (batches[row],)
        lesson = (inputs, targets[row], shares[row])
        state, moments, loss = _step(apply, rule, stays, stateful, state, moments, lesson)
        losses.append(loss)
    found = np.asarray(jnp.stack(losses))
    if not np.isfinite(found).all():
        step = int(np.argmin(np.isfinite(found)))
        raise ValueError(f"The loss is {found[step]} at step {step}; lower the learning rate, or look at the targets.")
    return state, found


def _check(batches: Sequence[Any], targets: Sequence[Any], weights: Sequence[Any] | None, steps: int) -> None:
    if not len(batches) or steps < 1:
        raise ValueError(f"There are {len(batches)} batches and {steps} steps; give at least one of both.")
    for what, given in (("targets", targets), ("weights", weights)):
        if given is not None and len(given) != len(batches):
            raise ValueError(f"There are {len(batches)} batches but {what} for {len(given)}; give one for each batch.")


def _frozen(named: dict[str, Any], patterns: tuple[str, ...]) -> frozenset[str]:
    """Return the names of the leaves that stay."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"No leaf matches {pattern!r}, which should be frozen{tree.nearest(pattern, named)}.")
    stays = {name for name, leaf in named.items() if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}
    stays |= {name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if len(stays) == len(named):
        raise ValueError("Every leaf is frozen or of no floating type, so there is nothing to fit.")
    return frozenset(stays)


def _order(key: jax.Array, count: int, steps: int) -> list[int]:
    """Return the batch of every step: one permutation after the other."""
    rounds = range(-(-steps // count))
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, number), count)) for number in rounds]
    return np.concatenate(orders)[:steps].tolist()


def _optimizer(rule: tuple[float, int]) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(*rule))


def _split(params: PyTree, stays: frozenset[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the named leaves that are fitted and those that stay."""
    named = tree.flatten(params)
    return {n: a for n, a in named.items() if n not in stays}, {n: a for n, a in named.items() if n in stays}


@partial(jax.jit, static_argnames=("apply", "rule", "stays", "stateful"))
def _step(
    apply: Callable,
    rule: tuple[float, int],
    stays: frozenset[str],
    stateful: bool,
    params: PyTree,
    moments: PyTree,
    lesson: tuple[tuple, PyTree, PyTree | None],
) -> tuple[PyTree, PyTree, Array]:
    """One step on one batch of (inputs, targets, weights)."""
    inputs, targets, weights = lesson
    fitted, rest = _split(params, stays)

    def objective(fitted: dict[str, Array]) -> tuple[Array, PyTree]:
        model = tree.unflatten(params, fitted | rest)
        outputs, after = apply(model, *inputs) if stateful else (apply(model, *inputs), model)
        return weighted_error(outputs, targets, weights), _split(after, stays)[1]

    (loss, rest), gradient = jax.value_and_grad(objective, has_aux=True)(fitted)
    updates, moments = _optimizer(rule).update(gradient, moments, fitted)
    stepped: Any = optax.apply_updates(fitted, updates)
    return tree.unflatten(params, stepped | rest), moments, loss


def weighted_error(outputs: PyTree, targets: PyTree, weights: PyTree | None = None) -> Float[Array, ""]:
    """The mean over all entries of all outputs of the squared error, each entry counted by its weight; see `distill`.

    Raises:
        ValueError: pytrees of different structure, or arrays whose shapes do not fit.
    """
    if weights is None:
        weights = jax.tree.map(lambda t: jnp.ones(jnp.shape(t)[:1]), targets)
    for what, given in (("outputs", outputs), ("weights", weights)):
        if jax.tree.structure(given) != jax.tree.structure(targets):
            message = f"The {what} are {jax.tree.structure(given)} but the targets {jax.tree.structure(targets)}; "
            raise ValueError(message + "give pytrees of one structure.")
    leaves = zip(*map(jax.tree.leaves, (outputs, targets, weights)), strict=True)
    sums = [_sums(*map(jnp.asarray, each)) for each in leaves]
    error, count = (sum(column, jnp.zeros(())) for column in zip(*sums, strict=True))
    return error / jnp.where(count > 0, count, 1.0)


def _sums(output: Array, target: Array, weight: Array) -> tuple[Array, Array]:
    """Return the weighted squared error of one output and the weight of its entries."""
    if output.shape != target.shape or weight.shape != output.shape[: weight.ndim]:
        message = f"An output of shape {output.shape} has a target of shape {target.shape} and weights of shape "
        raise ValueError(message + f"{weight.shape}; give the shape of the output, and a beginning of it.")
    share = jnp.broadcast_to(weight.reshape((*weight.shape, *[1] * (output.ndim - weight.ndim))), output.shape)
    gap = jnp.where(share > 0, output - target, 0.0)
    return (share * gap**2).sum(), share.sum()
