"""Loss over the simplex and the plane of several models, and the curvature at one.

Along lines, `permjax.lmc.barrier` has the curves: `barrier` with the loss as it is, and `calibrated_barrier` with the
best softmax temperature of every point.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from permjax import tree
from permjax.lmc.barrier import Metrics
from permjax.lmc.batches import cut, each_batch, over_batches
from permjax.lmc.taylor import Loss, along, floating


class Simplex(NamedTuple):
    """Metrics of all weighted means of some models on an even grid.

    Attributes:
        weights: the weights of the models at every point: non-negative, of sum one.
        loss: mean loss at every point.
        accuracy: mean accuracy at every point.
        barrier: loss less the mean loss of the models with the same weights.
        centre: index of the point at which all models weigh the same.
    """

    weights: Float[np.ndarray, "points models"]
    loss: Float[np.ndarray, " points"]
    accuracy: Float[np.ndarray, " points"]
    barrier: Float[np.ndarray, " points"]
    centre: int


class Plane(NamedTuple):
    """Metrics on a rectangle of the plane through three models.

    Distances in it are distances of weights. The first model is the origin, the second lies on the first axis.

    Attributes:
        x: coordinates along the first axis.
        y: coordinates along the second axis.
        loss: mean loss.
        accuracy: mean accuracy.
        models: where the three models lie.
    """

    x: Float[np.ndarray, " x"]
    y: Float[np.ndarray, " y"]
    loss: Float[np.ndarray, "y x"]
    accuracy: Float[np.ndarray, "y x"]
    models: Float[np.ndarray, "3 2"]


class Trace(NamedTuple):
    """An estimate of the trace of a Hessian.

    Attributes:
        mean: the estimate.
        standard_error: of the mean over probes; NaN for a single one.
        probes: d . H d of every probe.
    """

    mean: float
    standard_error: float
    probes: Float[np.ndarray, " probes"]


def simplex(
    metrics: Metrics,
    models: Sequence[PyTree],
    data: Sequence[Any],
    *,
    points: int = 13,
    batch_size: int = 1000,
    at_once: int = 1,
) -> Simplex:
    """Metrics over all convex combinations of models, on a grid with every model and their mean, in one compiled call.

    Args:
        metrics: `metrics(params, *batch) -> {"loss": mean, "accuracy": mean}`; give the same function object each
            time, so that it is compiled once.
        models: two or more models of one structure, aligned or not.
        data: arrays of equal length, such as (x, y), cut into batches.
        points: points on every edge, both ends included; points - 1 is a multiple of the number of models.
        batch_size: examples at a time.
        at_once: grid points computed side by side (`vmap`), each with its own copy of a model.

    Raises:
        ValueError: fewer than two models, models that differ in structure or are not finite, a grid without centre, or
            arrays of unequal length.

    Example:
        >>> found = simplex(metrics, [a, aligned_b, aligned_c], (x, y))
        >>> found.barrier[found.centre], found.barrier.max()
    """
    _check(models)
    count = len(models)
    if points < 2 or (points - 1) % count:
        raise ValueError(
            f"The mean of {count} models is on the grid where points - 1 is a multiple of {count}, not for {points} "
            f"points; take {count * max(round((points - 1) / count), 1) + 1}."
        )
    steps = np.array([*_compositions(points - 1, count)])
    weights = steps / (points - 1)
    loss, accuracy = _measure(metrics, models, weights, data, batch_size, at_once)
    ends = loss[[int(np.argmax(column)) for column in weights.T]]
    centre = int(np.flatnonzero((steps == steps[:, :1]).all(axis=1))[0])
    return Simplex(weights, loss, accuracy, loss - weights @ ends, centre)


def triangle(weights: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 2"]:
    """Where points of the simplex of three models lie in a triangle with sides of length one, the third on top."""
    return weights @ np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])


def plane(
    metrics: Metrics,
    models: Sequence[PyTree],
    data: Sequence[Any],
    *,
    points: int = 21,
    margin: float = 0.25,
    batch_size: int = 1000,
    at_once: int = 1,
) -> Plane:
    """Metrics on the plane through three models, beyond their triangle too, in one compiled call.

    With orthonormal e_1 along b - a and e_2 along what is left of c - a (Gram-Schmidt over all floating leaves), the
    point (x, y) is the model a + x e_1 + y e_2, which is a weighted mean of the three with weights of sum one.

    Args:
        metrics: `metrics(params, *batch) -> {"loss": mean, "accuracy": mean}`.
        models: three models of one structure.
        data: arrays of equal length, such as (x, y), cut into batches.
        points: points along either side of the rectangle.
        margin: how far the rectangle goes beyond the models, as a share of their extent.
        batch_size: examples at a time.
        at_once: grid points computed side by side (`vmap`), each with its own copy of a model.

    Raises:
        ValueError: not three models, models on one line, fewer than two points, or what `simplex` refuses of data.

    Source:
        Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", NeurIPS 2018, section 3.
    """
    _check(models)
    if len(models) != 3 or points < 2:
        raise ValueError(
            f"A plane goes through 3 models and has at least 2 points a side, not {len(models)} and {points}."
        )
    places = _places(models)
    low, high = places.min(axis=0), places.max(axis=0)
    reach = margin * (high - low)
    x, y = np.linspace(low - reach, high + reach, points).T
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    others = grid @ np.linalg.inv(places[1:])
    weights = np.concatenate([1 - others.sum(axis=-1, keepdims=True), others], axis=-1)
    loss, accuracy = _measure(metrics, models, weights.reshape(-1, 3), data, batch_size, at_once)
    return Plane(x, y, loss.reshape(points, points), accuracy.reshape(points, points), places)


def hessian_trace(
    loss: Loss,
    params: PyTree,
    data: Sequence[Any],
    *,
    key: jax.Array,
    probes: int = 32,
    weighted: bool = False,
    batch_size: int = 1000,
) -> Trace:
    """Hutchinson's estimate of the trace of the Hessian of the loss: the mean of d . H d over random signs d.

    Args:
        loss: `loss(params, *batch) -> scalar`, a mean over the batch.
        params: the model; all floating leaves count.
        data: arrays of equal length, such as (x, y), cut into batches.
        key: draws the signs.
        probes: number of them.
        weighted: estimate sum_i |w_i| H_ii instead, by signs times sqrt |w_i|.
        batch_size: examples at a time.

    Raises:
        ValueError: no probe, a model that is not finite, or arrays of unequal length.

    Source:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990; the weighting as in
        "Linear mode connectivity between multiple models", ICML 2025.
    """
    tree.check_finite(params, "the model")
    if probes < 1:
        raise ValueError(f"A trace is estimated from one probe or more, not {probes}.")
    parts, sizes = cut(data, batch_size)
    named = floating(params)
    scale = {name: jnp.sqrt(jnp.abs(w)) if weighted else jnp.ones_like(w) for name, w in named.items()}
    curvature = over_batches(sizes, _curvatures(loss, params, scale, jax.random.split(key, probes), parts))
    error = curvature.std(ddof=1) / np.sqrt(probes) if probes > 1 else np.nan
    return Trace(float(curvature.mean()), float(error), curvature)


def _check(models: Sequence[PyTree]) -> None:
    if len(models) < 2:
        raise ValueError(f"A landscape lies between two models or more, not {len(models)}.")
    tree.check_same_structure(models)
    for index, model in enumerate(models):
        tree.check_finite(model, f"model {index}")


def _compositions(total: int, parts: int) -> Iterator[np.ndarray]:
    """Yield every way to write `total` as a sum of `parts` whole numbers in order, none negative."""
    for bars in combinations(range(total + parts - 1), parts - 1):
        yield np.diff([-1, *bars, total + parts - 1]) - 1


def _places(models: Sequence[PyTree]) -> Float[np.ndarray, "3 2"]:
    """Return the coordinates of three models in the plane that they span."""
    a, b, c = ({n: np.asarray(x, np.float64) for n, x in floating(model).items()} for model in models)
    to_b, to_c = ({name: other[name] - a[name] for name in a} for other in (b, c))
    length, whole = tree.norm(to_b), tree.dot(to_c, to_c)
    along_b = tree.dot(to_b, to_c) / length if length > 0 else 0.0
    height = np.sqrt(max(whole - along_b**2, 0.0))
    if length == 0 or height <= 1e-6 * np.sqrt(whole):
        raise ValueError("The three models lie on one line, so they span no plane; use `barrier` for the line.")
    return np.array([[0, 0], [length, 0], [along_b, height]])


def _measure(
    metrics: Metrics,
    models: Sequence[PyTree],
    weights: Float[np.ndarray, "points models"],
    data: Sequence[Any],
    batch_size: int,
    at_once: int,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    parts, sizes = cut(data, batch_size)
    found = _metrics_at(metrics, tuple(models), jnp.asarray(weights, jnp.float32), parts, at_once)
    return over_batches(sizes, found["loss"]), over_batches(sizes, found["accuracy"])


@partial(jax.jit, static_argnums=(0, 4))
def _metrics_at(
    metrics: Metrics, models: tuple, weights: Float[Array, "points models"], parts: list[tuple], at_once: int
) -> PyTree:
    def at(weights: Float[Array, " models"]) -> PyTree:
        return each_batch(partial(metrics, tree.average(models, weights)), parts)

    return jax.lax.map(at, weights, batch_size=at_once if at_once > 1 else None)


@partial(jax.jit, static_argnums=0)
def _curvatures(
    loss: Loss, params: PyTree, scale: dict[str, Array], keys: Array, parts: list[tuple]
) -> Float[Array, "probes batches"]:
    def of_probe(key: Array) -> Array:
        draws = dict(zip(scale, jax.random.split(key, len(scale)), strict=True))
        probe = {n: w * jax.random.rademacher(draws[n], w.shape, w.dtype) for n, w in scale.items()}
        return along(loss, params, probe, parts)[1]

    return jax.lax.map(of_probe, keys)
