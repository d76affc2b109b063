"""Data sets by name."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from permjax.data import images, text
from permjax.data.dataset import Dataset
from permjax.data.digits import digits
from permjax.data.generated import blobs
from permjax.tree import nearest

_LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist10k": images.mnist10k,
    "cifar10": images.cifar10,
    "npz": images.npz,
    "folder": images.folder,
    "blobs": blobs,
    "text": text.text,
    "sentences": text.sentences,
}


def load(name: str, root: str | Path | None = None, **options: Any) -> Dataset:
    """A data set by name: `digits`, `blobs` and `sentences` need no file, the others real data.

    Args:
        name: `digits`, `mnist10k`, `cifar10`, `npz`, `folder`, `blobs`, `text` or `sentences`.
        root: the folder of real data; the environment variable PERMJAX_DATA by default, else `data`. A relative `path`
            of `npz`, `folder` or `text` starts at the first two.
        options: what the reader of that name takes (see `permjax.data.images`, `digits`, `generated` and `text`).

    Raises:
        MissingData: a file is not there; says which, what it is, and which setting names its folder.
        ValueError: an unknown name or option (with the nearest one), or a file that is not what it should be.

    Example:
        >>> load("digits", seed=1).x_train.shape
        (1437, 8, 8)
    """
    if name not in _LOADERS:
        message = f"There is no data set {name!r}{nearest(name, _LOADERS)}; known are {', '.join(_LOADERS)}."
        raise ValueError(message)
    parameters = inspect.signature(_LOADERS[name]).parameters
    allowed = [option for option in parameters if option != "root"]
    for option in options:
        if option not in allowed:
            message = f"The data set {name!r} has no option {option!r}{nearest(option, allowed)}; "
            raise ValueError(message + f"known are {', '.join(allowed)}.")
    folder = root or os.environ.get("PERMJAX_DATA")
    if "root" in parameters:
        options["root"] = Path(folder or "data")
    elif "path" in parameters:
        options["path"] = _path(name, folder, options)
    return _LOADERS[name](**options)


def _path(name: str, folder: str | Path | None, options: dict[str, Any]) -> Path:
    if "path" not in options:
        raise ValueError(f"The data set {name!r} needs the option 'path', the file or folder to read.")
    return Path(folder or "", options["path"])
