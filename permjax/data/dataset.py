"""What a data set is, and how one is split."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped


class MissingData(FileNotFoundError):
    """A data file that is not where it should be; the message says where to get it and which setting names it."""


def data_root(root: str | Path | None) -> Path:
    """The folder of real data: the given one, else that of PERMJAX_DATA, else `data`."""
    return Path(root or os.environ.get("PERMJAX_DATA") or "data")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels on the host, split into train and test.

    Attributes:
        x_train: inputs, shape [n, ...].
        y_train: labels, shape [n].
        x_test: inputs, shape [m, ...].
        y_test: labels, shape [m].
        classes: the names of the labels.
        name: what to call the set in a report.
    """

    x_train: Shaped[np.ndarray, "n ..."]
    y_train: Int[np.ndarray, " n"]
    x_test: Shaped[np.ndarray, "m ..."]
    y_test: Int[np.ndarray, " m"]
    classes: tuple[str, ...]
    name: str


def to_unit(images: Shaped[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Images as float32 in [0, 1]; bytes are divided by 255, floats are left alone."""
    if np.issubdtype(images.dtype, np.integer):
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32)


def split(
    x: Shaped[np.ndarray, "n ..."],
    y: Shaped[np.ndarray, " labels"],
    *,
    train_size: int,
    seed: int | None,
    classes: tuple[str, ...],
    name: str,
) -> Dataset:
    """The first `train_size` examples after a seeded shuffle are for training, the others for testing.

    Without a seed they keep their order.

    Raises:
        ValueError: inputs and labels differ in number, or one side of the split would be empty.
    """
    if len(x) != len(y):
        raise ValueError(f"The data set {name} has {len(x)} inputs but {len(y)} labels; they must be equally many.")
    if not 0 < train_size < len(x):
        message = f"The data set {name} has {len(x)} examples, so train_size must lie in 1..{len(x) - 1}, "
        raise ValueError(message + f"not {train_size}.")
    order = np.arange(len(x)) if seed is None else np.random.default_rng(seed).permutation(len(x))
    train, test = order[:train_size], order[train_size:]
    labels = y.astype(np.int32)
    return Dataset(x[train], labels[train], x[test], labels[test], classes, name)
