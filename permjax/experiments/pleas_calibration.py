"""Unlabelled inputs to calibrate a merge with: the parents' own, or for PLeaS-free others."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import ndimage

from permjax.data.registry import load
from permjax.experiments.pleas_tasks import Task


class Calibration(NamedTuple):
    """Unlabelled inputs to match, fit and calibrate with.

    Attributes:
        x: inputs, shape [n, ...].
        owner: for every input the parent whose domain it comes from, [n]; None where it comes from neither.
        source: what they are, in words.
    """

    x: Shaped[np.ndarray, "n ..."]
    owner: Int[np.ndarray, " n"] | None
    source: str


def calibration(task: Task, samples: int, seed: int) -> Calibration:
    """Unlabelled training images, equally many of every parent (one more of the first ones), shuffled.

    Raises:
        ValueError: there are not as many, or not one for every parent.
    """
    parents = len(task.train)
    counts = [len(part) for part in np.array_split(np.arange(samples), parents)]
    if samples < parents or any(n > len(part.x) for n, part in zip(counts, task.train, strict=True)):
        have = " and ".join(str(len(part.x)) for part in task.train)
        message = f"{samples} calibration images, equally many of each parent, cannot be drawn from {have} training "
        raise ValueError(message + "images; ask for at least one and at most all of each.")
    rng = np.random.default_rng((seed, 1))
    x = [part.x[rng.choice(len(part.x), n, replace=False)] for n, part in zip(counts, task.train, strict=True)]
    order = rng.permutation(samples)
    owner = np.repeat(np.arange(parents, dtype=np.int32), counts)
    source = f"{samples} unlabelled training images of {task.data}, equally many from each parent's own"
    return Calibration(np.concatenate(x)[order], owner[order], source)


def foreign_calibration(task: Task, name: str, samples: int, seed: int, root: str | None = None) -> Calibration:
    """Inputs that are not the task's, for PLeaS-free: noise, or another data set brought to the task's shape.

    Args:
        task: says which shape inputs have.
        name: `white_noise` (independent uniform numbers in [0, 1]), `smooth_noise` (the same, blurred and stretched to
            [0, 1]), or a data set such as `digits` or `blobs`; images are resized.
        samples: how many.
        seed: of the noise, or of the choice of images.
        root: folder of real data; the environment variable PERMJAX_DATA by default.

    Raises:
        ValueError: the name is that of the task's own data set or of none, the set has too few images, or its inputs
            cannot be brought to the shape.
    """
    shape = task.train[0].x.shape[1:]
    rng = np.random.default_rng((seed, 2))
    if name in _NOISE:
        return Calibration(_NOISE[name](rng, (samples, *shape)), None, f"{samples} images of {name.replace('_', ' ')}")
    x = _foreign_images(task, name, root)
    if not 0 < samples <= len(x):
        raise ValueError(f"{samples} calibration images cannot be drawn from the {len(x)} of {name}; ask for fewer.")
    chosen = x[rng.choice(len(x), samples, replace=False)]
    return Calibration(_resized(chosen, shape, name), None, f"{samples} images of {name}, resized to the task's shape")


def _white_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "n ..."]:
    return rng.random(shape, np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "n ..."]:
    """Blur within every image, by an eighth of its height, and stretch it to [0, 1]."""
    axes = (1,) if len(shape) == 2 else (1, 2)
    x = ndimage.gaussian_filter(rng.random(shape, np.float32), shape[1] / 8, axes=axes, mode="wrap")
    return _stretched(x)


_NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "white_noise": _white_noise,
    "smooth_noise": _smooth_noise,
}


def _stretched(x: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Each input with its own least value at 0 and its largest at 1."""
    rest = tuple(range(1, x.ndim))
    low, high = x.min(rest, keepdims=True), x.max(rest, keepdims=True)
    return ((x - low) / np.maximum(high - low, np.finfo(x.dtype).tiny)).astype(np.float32)


def _foreign_images(task: Task, name: str, root: str | None) -> Shaped[np.ndarray, "n ..."]:
    if name == task.data:
        message = f"PLeaS-free takes other data than the task's, which is {name} itself; name another data set, or "
        raise ValueError(message + " or ".join(_NOISE) + ".")
    if name == "blobs":
        shape = task.train[0].x.shape[1:]
        points = load(name, features=prod(shape), examples=5000)
        return _stretched(points.x_train).reshape(-1, *shape)
    data = load(name, root)
    return np.concatenate([data.x_train, data.x_test])


def _resized(x: Shaped[np.ndarray, "n ..."], shape: tuple[int, ...], name: str) -> Float[np.ndarray, "n ..."]:
    """Images in another height and width; colours become grey, and grey is repeated over the colours, as needed."""
    if x.shape[1:] == shape:
        return x.astype(np.float32)
    if x.ndim not in (3, 4) or len(shape) not in (2, 3):
        message = f"Inputs of {name} have shape {x.shape[1:]}, which cannot be resized to the task's {shape}; "
        raise ValueError(message + "only images can.")
    grey = x.mean(-1) if x.ndim == 4 else x
    factors = (1, shape[0] / grey.shape[1], shape[1] / grey.shape[2])
    zoomed = np.asarray(ndimage.zoom(grey, factors, order=1), np.float32)
    return np.repeat(zoomed[..., None], shape[2], axis=-1) if len(shape) == 3 else zoomed
