"""Checkpoints written as safetensors, atomically and a shard at a time; the public names for files of models.

The index (or the single file) is the switch between an old and a new checkpoint: a killed save leaves the one or
the other, and at worst hidden `.*.tmp` files beside it.
"""

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import save_file

from permjax import tree
from permjax.files import staging
from permjax.io.lazy import (
    DTYPES,
    INDEX,
    PICKLES,
    SINGLE,
    Checkpoint,
    CheckpointError,
    LazyArray,
    StrPath,
    open_checkpoint,
    read_index,
    tensor_of,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LazyArray",
    "load_tree",
    "open_checkpoint",
    "save_checkpoint",
    "save_tree",
]

_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer of a Hugging Face folder


def save_checkpoint(
    path: StrPath,
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    like: StrPath | Checkpoint | None = None,
    shard_size: int | None = None,
    extra_files: Iterable[StrPath] = (),
) -> None:
    """Write tensors as safetensors, atomically, with no more than one shard in memory.

    Args:
        path: a `.safetensors` file, or a folder for `model.safetensors` or shards with their index.
        tensors: flat: names to NumPy, JAX or lazy arrays, or to functions without arguments that return one.
        metadata: text for the header; that of `like` or `{"format": "pt"}` by default.
        like: a checkpoint whose names, shapes, dtypes, order and shards are kept; floating tensors are cast to its
            dtypes, and if it is a folder its configuration and tokenizer files are copied to a folder.
        shard_size: the largest size of a shard in bytes; the shards of `like`, or a single file, by default.
        extra_files: more files to copy into the folder.

    Raises:
        CheckpointError: a tensor does not fit `like` or safetensors (names it), the path is not one for a
            checkpoint, or the disk refuses; what was there before is still intact.
    """
    source = like if like is None or isinstance(like, Checkpoint) else open_checkpoint(like)
    folder, single = _target(Path(path), shard_size)
    _check_tensors(tensors, source)
    plan = {single: tuple(source or tensors)} if single else _plan(tensors, source, shard_size, folder)
    text = dict(metadata or (source.metadata if source else None) or {"format": "pt"})
    copied = [*(() if single else companions(source, folder)), *map(Path, extra_files)]
    sizes: dict[str, int] = {}
    with _explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        stale = set() if single else _checkpoint_files(folder) - {*plan, INDEX if len(plan) > 1 else ""}
        with staging(folder) as stage:
            for file in copied:
                stage(file.name, partial(shutil.copyfile, file))
            for file, names in plan.items():
                shard = {name: _materialise(name, tensors[name], source) for name in names}
                sizes |= {name: array.nbytes for name, array in shard.items()}
                stage(file, partial(save_file, shard, metadata=text))
                del shard  # before the next one is computed
            if len(plan) > 1:
                index = _index(plan, sizes, source or tensors)
                stage(INDEX, partial(Path.write_text, data=index, encoding="utf-8"))
        for name in stale:
            (folder / name).unlink()


def save_tree(path: StrPath, values: PyTree, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of arrays to one safetensors file under the names of its leaves (`params/Dense_0/kernel`).

    Raises:
        CheckpointError: see `save_checkpoint`.
    """
    save_checkpoint(path, tree.flatten(values), metadata=metadata)


def load_tree(path: StrPath, like: PyTree | None = None) -> PyTree:
    """Read a tree that `save_tree` wrote, with NumPy leaves.

    Args:
        path: the file.
        like: a tree, abstract or not, that gives structure, shapes and dtypes; nested dicts by default.

    Raises:
        CheckpointError: the file cannot be read or does not fit `like`; names the leaf.
    """
    checkpoint = open_checkpoint(path)
    if like is None:
        return tree.nest(checkpoint.load())
    try:
        lazy = tree.unflatten(like, checkpoint)
        tree.check_same_structure([like, lazy])
    except ValueError as error:
        message = f"{checkpoint.path} (model 1) does not fit the tree that was asked for (model 0): {error}"
        raise CheckpointError(message) from error
    return tree.map_named(lambda _, leaf: leaf.read(), lazy)


def _target(path: Path, shard_size: int | None) -> tuple[Path, str | None]:
    """The folder to write to, and the file name if a single file is asked for."""
    if path.suffix == ".safetensors" and not path.is_dir():
        if shard_size is not None:
            message = f"{path} is one file and cannot take shards; give a folder, or leave out shard_size."
            raise CheckpointError(message)
        return path.parent, path.name
    if path.is_file() or path.suffix in (*PICKLES, ".json"):
        message = f"{path} is no place for a checkpoint; give a folder, or a file name that ends in .safetensors."
        raise CheckpointError(message)
    return path, None


def _check_tensors(tensors: Mapping[str, Any], source: Checkpoint | None) -> None:
    """Check names and known shapes before anything is written."""
    for name, value in tensors.items():
        if name == "__metadata__":
            raise CheckpointError("'__metadata__' is no name for a tensor: safetensors reserves it; rename it.")
        if source is not None:
            expected = tensor_of(source, name, source.path)
            _check_shape(name, getattr(value, "shape", expected.shape), expected)
    missing = [name for name in source or () if name not in tensors]
    if missing:
        hint = tree.nearest(missing[0], tensors)
        message = f"Tensor {missing[0]!r} of `like` is missing from the tensors to write{hint}; add it."
        raise CheckpointError(message)


def _check_shape(name: str, shape: tuple[int, ...], expected: LazyArray) -> None:
    if tuple(shape) != expected.shape:
        message = (
            f"Tensor {name!r} has shape {tuple(shape)} but {expected.shape} in {expected.file}; give tensors of "
            "the same shapes, or leave out `like`."
        )
        raise CheckpointError(message)


def _plan(
    tensors: Mapping[str, Any], source: Checkpoint | None, shard_size: int | None, folder: Path
) -> dict[str, tuple[str, ...]]:
    """The tensors of each file of a folder; shards never take the name of a file that is already there."""
    if shard_size is None:
        groups = list(source.shards.values()) if source else [tuple(tensors)]
    else:
        groups = _groups({name: _size(name, (source or tensors)[name]) for name in source or tensors}, shard_size)
    if len(groups) < 2:
        return {SINGLE: tuple(source or tensors)}
    stems = [f"model-{i:05d}-of-{len(groups):05d}" for i in range(1, len(groups) + 1)]
    files = list(source.shards) if source and shard_size is None else [f"{stem}.safetensors" for stem in stems]
    if any((folder / file).exists() for file in files):
        token = secrets.token_hex(4)
        files = [f"{stem}-{token}.safetensors" for stem in stems]
    return dict(zip(files, groups, strict=True))


def _size(name: str, value: Any) -> int:
    if not hasattr(value, "nbytes"):
        message = f"The size of tensor {name!r} is not known in advance, so shards need a checkpoint as `like`."
        raise CheckpointError(message)
    return value.nbytes


def _groups(sizes: Mapping[str, int], limit: int) -> list[tuple[str, ...]]:
    """Consecutive names of at most `limit` bytes together; a larger tensor is alone."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return [tuple(group) for group in groups]


def _index(plan: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], order: Iterable[str]) -> str:
    places = {name: file for file, names in plan.items() for name in names}
    total = {"total_size": sum(sizes.values())}
    return json.dumps({"metadata": total, "weight_map": {name: places[name] for name in order}}, indent=2) + "\n"


def _materialise(name: str, value: Any, source: Checkpoint | None) -> np.ndarray:
    """The array to write: computed or read, of the shape and dtype of `source`."""
    array = np.asarray(value() if callable(value) else value, order="C")
    if array.dtype not in DTYPES.values():
        message = (
            f"Tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold; write arrays of numbers "
            "under flat names (`save_tree` flattens trees)."
        )
        raise CheckpointError(message)
    if source is None:
        return array
    _check_shape(name, array.shape, source[name])
    return _cast(name, array, source[name].dtype)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == dtype:
        return array
    if not all(jnp.issubdtype(kind, jnp.floating) for kind in (array.dtype, dtype)):
        message = f"Tensor {name!r} has dtype {array.dtype} where `like` has {dtype}; convert it first."
        raise CheckpointError(message)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if np.isfinite(array).all() and not np.isfinite(narrow).all():
        message = f"Tensor {name!r} has values too large for the dtype {dtype} of `like`; leave out `like`."
        raise CheckpointError(message)
    return narrow


def companions(source: Checkpoint | None, folder: Path) -> list[Path]:
    """The configuration and tokenizer files to copy from the folder of `source`."""
    if source is None or source.path.name not in (SINGLE, INDEX):
        return []
    home = source.path.parent
    found = (file for pattern in _COMPANIONS for file in sorted(home.glob(pattern)))
    elsewhere = home.resolve() != folder.resolve()
    return [f for f in found if elsewhere and f.is_file() and not f.name.endswith(".index.json")]


def _checkpoint_files(folder: Path) -> set[str]:
    """The files of the checkpoint in a folder, shards included."""
    files = {name for name in (SINGLE, INDEX) if (folder / name).is_file()}
    if INDEX in files:
        with suppress(CheckpointError):
            files |= set(read_index(folder / INDEX).values())
    return files


@contextmanager
def _explained(path: StrPath) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        message = (
            f"The checkpoint {path} was not written ({error}); an older one is intact. Check the disk and the path."
        )
        raise CheckpointError(message) from error
