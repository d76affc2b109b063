"""Linear mode connectivity: loss and accuracy on the line between two models, barriers, controls, distances."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from permjax import tree
from permjax.action import permute
from permjax.lmc.batches import cut, each_batch, over_batches
from permjax.permutation import random_permutations
from permjax.symmetry.spec import PermutationSpec

Metrics = Callable[..., Any]
"""`metrics(params, *batch) -> tree of scalars`, each a mean over the batch."""

_LOG_BETA = 7.0  # inverse temperatures are sought between exp(-7) and exp(7)
_BISECTIONS = 40


class Barrier(NamedTuple):
    """Metrics on the line (1 - t) a + t b and the barriers B(t) = L(t) - [(1 - t) L(0) + t L(1)].

    Of several pairs, every field but `t` and `pairs` is the mean over the pairs.

    Attributes:
        t: the grid, both ends and the middle included.
        loss: mean loss at every point.
        accuracy: mean accuracy at every point.
        barrier_mid: B(1/2); may be negative.
        barrier_max: the largest B on the grid, which is never negative because B is zero at the ends.
        pairs: number of pairs.
        inverse_temperature: factor on the logits at every point, or None where the loss was not calibrated.
    """

    t: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    accuracy: Float[np.ndarray, " points"]
    barrier_mid: float
    barrier_max: float
    pairs: int = 1
    inverse_temperature: Float[np.ndarray, " points"] | None = None


def interpolate(
    metrics: Metrics, a: PyTree, b: PyTree, data: Sequence[Any], *, points: int = 25, batch_size: int = 1000
) -> PyTree:
    """Metrics at `points` evenly spaced points of the line from `a` to `b`, in one compiled scan.

    Args:
        metrics: `metrics(params, *batch) -> tree of scalars`, each a mean over the batch. Give the same function
            object for every pair, so that it is compiled once.
        a: the model at t = 0.
        b: the model at t = 1, of the same structure.
        data: arrays of equal length n, such as (x, y), cut into batches; a shorter last batch counts by its size.
        points: number of points, both ends included.
        batch_size: examples at a time.

    Returns:
        The tree of `metrics` with a float64 array `[points]` for every scalar.

    Raises:
        ValueError: models of different structure or not finite, arrays of unequal length, fewer than two points.
    """
    _check_line(a, b)
    if points < 2:
        raise ValueError(f"A line needs its two ends, so points must be at least 2, not {points}.")
    parts, sizes = cut(data, batch_size)
    found = _metrics_along(metrics, a, b, jnp.linspace(0, 1, points), parts)
    return jax.tree.map(partial(over_batches, sizes), found)


def barrier(
    metrics: Metrics, a: PyTree, b: PyTree, data: Sequence[Any], *, points: int = 25, batch_size: int = 1000
) -> Barrier:
    """The barrier between two models.

    Args:
        metrics: `metrics(params, *batch) -> {"loss": mean, "accuracy": mean}`; see `interpolate`.
        a: the first model.
        b: the second model, aligned to the first or not.
        data: arrays of equal length, such as (x, y).
        points: an odd number, so that the middle is on the grid.
        batch_size: examples at a time.

    Raises:
        ValueError: an even number of points, or what `interpolate` refuses.

    Example:
        >>> naive, matched = (barrier(metrics, a, model, (x, y)) for model in (b, aligned_b))
        >>> naive.barrier_mid - matched.barrier_mid

    Source:
        Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020; with the ends' mean
        instead of their maximum as in Entezari et al., ICLR 2022, definition 2.
    """
    _check_odd(points)
    found = interpolate(metrics, a, b, data, points=points, batch_size=batch_size)
    return _barrier(found["loss"], found["accuracy"])


def barrier_of_pairs(
    metrics: Metrics, models: Sequence[PyTree], data: Sequence[Any], *, points: int = 25, batch_size: int = 1000
) -> Barrier:
    """The mean over all pairs of models of what `barrier` gives for one."""
    if len(models) < 2:
        raise ValueError(f"A barrier lies between two models or more, not {len(models)}.")
    pairs = combinations(models, 2)
    return mean_barrier([barrier(metrics, a, b, data, points=points, batch_size=batch_size) for a, b in pairs])


def random_barrier(
    spec: PermutationSpec,
    metrics: Metrics,
    a: PyTree,
    b: PyTree,
    data: Sequence[Any],
    *,
    key: jax.Array,
    points: int = 25,
    batch_size: int = 1000,
) -> Barrier:
    """Control: the barrier between `a` and `b` with its units in random order."""
    shuffled = permute(spec, random_permutations(spec, key), b)
    return barrier(metrics, a, shuffled, data, points=points, batch_size=batch_size)


def calibrated_barrier(
    apply: Callable[..., Any],
    a: PyTree,
    b: PyTree,
    data: Sequence[Any],
    calibration: Sequence[Any],
    *,
    points: int = 25,
    batch_size: int = 1000,
) -> Barrier:
    """Control: the barrier in cross-entropy when every point of the line gets its best softmax temperature.

    At each t, ends included, the inverse temperature beta minimises the mean cross-entropy of beta z on the
    calibration data; the loss is that of beta z on `data`. Accuracies do not depend on it.

    Args:
        apply: `apply(params, x) -> logits [batch, ..., classes]`; give the same function object for every pair.
        a: the first model.
        b: the second model.
        data: (x, y) to measure on, y integer classes [n, ...].
        calibration: (x, y) to fit the temperature on, held out from both training and measuring. Where the model makes
            no mistake on them, beta runs to its limit exp(7) and the loss means nothing.
        points: an odd number of points.
        batch_size: examples at a time.

    Raises:
        ValueError: an even number of points, or what `interpolate` refuses.

    Source:
        "Do we really need permutations?", arXiv 2510.08023; Guo et al., "On calibration of modern neural networks",
        ICML 2017.
    """
    _check_odd(points)
    _check_line(a, b)
    parts, sizes = cut(data, batch_size)
    fitted, _ = cut(calibration, batch_size)
    loss, accuracy, beta = _calibrated_along(apply, a, b, jnp.linspace(0, 1, points), parts, fitted)
    found = _barrier(over_batches(sizes, loss), over_batches(sizes, accuracy))
    return found._replace(inverse_temperature=np.asarray(beta, np.float64))


def mean_barrier(barriers: Sequence[Barrier]) -> Barrier:
    """The mean of several barriers over their pairs, field by field.

    Raises:
        ValueError: no barrier is given, they have different grids, or only some are calibrated.
    """
    if not barriers or len({(len(b.t), b.inverse_temperature is None) for b in barriers}) > 1:
        raise ValueError("A mean needs one barrier or more, all with the same points and all calibrated or none.")
    pairs = [b.pairs for b in barriers]

    def mean(name: str) -> Any:
        return np.average([getattr(b, name) for b in barriers], axis=0, weights=pairs)

    beta = None if barriers[0].inverse_temperature is None else mean("inverse_temperature")
    heights = float(mean("barrier_mid")), float(mean("barrier_max"))
    return Barrier(barriers[0].t, mean("loss"), mean("accuracy"), *heights, sum(pairs), beta)


def l2_distance(spec: PermutationSpec, a: PyTree, b: PyTree) -> float:
    """The Euclidean distance of two models over floating leaves of role weight, accumulated in float64 on the host."""
    tree.check_same_structure([a, b])
    named = tree.flatten(a), tree.flatten(b)
    spec.validate({name: np.shape(leaf) for name, leaf in named[0].items()}, "model 0")
    total = 0.0
    for leaf in spec.leaves:
        pair = [np.asarray(leaves[leaf.name]) for leaves in named]
        if leaf.role == "weight" and jnp.issubdtype(pair[0].dtype, jnp.floating):
            step = np.subtract(*(x.astype(np.float64).ravel() for x in pair))
            total += float(step @ step)
    return total**0.5


def l2_reduction_percent(spec: PermutationSpec, a: PyTree, b: PyTree, b_aligned: PyTree) -> float:
    """How much nearer to `a` the aligned model is: 100 (|a - b| - |a - pi(b)|) / |a - b|.

    Raises:
        ValueError: the models have no distance to reduce.
    """
    before = l2_distance(spec, a, b)
    if before == 0:
        raise ValueError("The two models have equal weights, so there is no distance that matching could reduce.")
    return 100 * (before - l2_distance(spec, a, b_aligned)) / before


def _barrier(loss: np.ndarray, accuracy: np.ndarray) -> Barrier:
    t = np.linspace(0, 1, len(loss))
    height = loss - ((1 - t) * loss[0] + t * loss[-1])
    return Barrier(t, loss, accuracy, float(height[len(t) // 2]), float(height.max()))


def _check_line(a: PyTree, b: PyTree) -> None:
    tree.check_same_structure([a, b])
    tree.check_finite(a, "model 0")
    tree.check_finite(b, "model 1")


def _check_odd(points: int) -> None:
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, so that the grid has a middle, not {points}.")


@partial(jax.jit, static_argnums=0)
def _metrics_along(metrics: Metrics, a: PyTree, b: PyTree, t: Float[Array, " points"], parts: list[tuple]) -> PyTree:
    return jax.lax.map(lambda t: each_batch(partial(metrics, tree.lerp(a, b, t)), parts), t)


@partial(jax.jit, static_argnums=0)
def _calibrated_along(apply, a, b, t, parts, calibration):
    """Return losses and accuracies [points, batches] at the best inverse temperature of each point, and that."""

    def at(t):
        params = tree.lerp(a, b, t)
        margins = partial(_margins, apply, params)
        fitted = [jax.lax.map(lambda batch: margins(*batch), part) for part in calibration]
        beta = _best_beta(jnp.concatenate([m.reshape(-1, m.shape[-1]) for m in fitted]))

        def measure(x, y):
            m = margins(x, y)
            right = jnp.argmax(m, axis=-1) == y.reshape(-1)
            return _cross_entropy(m, beta), jnp.mean(right.astype(m.dtype))

        return *each_batch(measure, parts), beta

    return jax.lax.map(at, t)


def _margins(apply: Callable, params: PyTree, x: Array, y: Int[Array, "..."]) -> Float[Array, "samples classes"]:
    """Return logits minus the logit of the true class."""
    logits = apply(params, x)
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits - jnp.take_along_axis(logits, y.reshape(-1, 1), axis=-1)


def _cross_entropy(margins: Float[Array, "samples classes"], beta: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.mean(jax.nn.logsumexp(beta * margins, axis=-1))


def _best_beta(margins: Float[Array, "samples classes"]) -> Float[Array, ""]:
    """Return the inverse temperature of least cross-entropy: the zero of its slope, which never falls with beta."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        slope = jnp.mean(jnp.sum(jax.nn.softmax(jnp.exp(middle) * margins, axis=-1) * margins, axis=-1))
        return jnp.where(slope > 0, low, middle), jnp.where(slope > 0, middle, high)

    ends = jnp.asarray(-_LOG_BETA, margins.dtype), jnp.asarray(_LOG_BETA, margins.dtype)
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
    return jnp.exp((low + high) / 2)
