"""Checkpoints as safetensors, one file or shards with an index, opened without reading their tensors.

Pickles are recognised and never opened.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from permjax import tree

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
}

StrPath = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and what to do."""


@dataclass(frozen=True)
class LazyArray:
    """A tensor in a file, of known shape and dtype, whose values are read by `read()` or `np.asarray`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    _handle: Any = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, read from the file at every call."""
        try:
            return self._handle.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            message = f"Tensor {self.name!r} of {self.file} cannot be read ({error}); copy the file again."
            raise CheckpointError(message) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"Tensor {self.name!r} lies in a file and cannot become an array without a copy.")
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)


class Checkpoint(Mapping[str, LazyArray]):
    """A read-only mapping of tensor names to lazy arrays; made by `open_checkpoint`.

    Attributes:
        path: the safetensors file or index that was opened.
        metadata: the free text of the safetensors headers, such as `{"format": "pt"}`.
        config: the `config.json` beside the file, or None.
        shards: the names of the tensors in each file, by file name.
    """

    def __init__(self, path: Path, places: Mapping[str, str] | None = None):
        """Open the file at `path`, or the files beside it that `places` names for each tensor."""
        files = [path.name] if places is None else dict.fromkeys(places.values())
        opened = {file: _open_file(path.parent / file) for file in files}
        places = dict.fromkeys(opened[path.name][0], path.name) if places is None else places
        self.path = path
        self.config = _read_config(path.parent)
        self.metadata: dict[str, str] = {k: v for _, found in opened.values() for k, v in found.items()}
        self.shards: dict[str, tuple[str, ...]] = {
            file: tuple(name for name, place in places.items() if place == file) for file in opened
        }
        self._arrays = {n: tensor_of(opened[file][0], n, path.parent / file) for n, file in places.items()}

    def __getitem__(self, name: str) -> LazyArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def load(self, names: Iterable[str] | None = None, dtype: Any = None) -> dict[str, np.ndarray]:
        """Read tensors into memory.

        Args:
            names: which ones; all by default.
            dtype: the dtype to give to floating tensors; integer and bool tensors keep theirs.

        Raises:
            CheckpointError: there is no tensor of a given name.
        """
        chosen = [tensor_of(self, name, self.path) for name in (self if names is None else names)]
        keep = [dtype is None or not jnp.issubdtype(lazy.dtype, jnp.floating) for lazy in chosen]
        return {x.name: np.asarray(x, None if kept else dtype) for x, kept in zip(chosen, keep, strict=True)}


def open_checkpoint(path: StrPath) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a safetensors file, the index JSON of a sharded checkpoint, or a folder with `model.safetensors` or
            `model.safetensors.index.json` (the single file is taken if there are both).

    Raises:
        CheckpointError: there is none, it is truncated or corrupt, a shard or a tensor of the index is missing,
            a tensor has a dtype without a NumPy counterpart, or it is a pickle.

    Example:
        >>> checkpoint = open_checkpoint("gpt2")  # doctest: +SKIP
        >>> checkpoint["wte.weight"].shape  # doctest: +SKIP
        (50257, 768)
    """
    source = _find(Path(path))
    return Checkpoint(source, read_index(source) if source.suffix == ".json" else None)


def _find(path: Path) -> Path:
    """The safetensors file or index that `path` stands for."""
    if not os.path.exists(path):
        raise CheckpointError(f"There is no checkpoint at {path}: no such file or folder; check the path.")
    if not path.is_dir():
        if path.suffix in PICKLES:
            raise _pickle_error(path)
        return path
    for name in (SINGLE, INDEX):
        if (path / name).is_file():
            return path / name
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLES:
            raise _pickle_error(file)
    others = ", ".join(file.name for file in sorted(path.glob("*.safetensors")))
    hint = f"; give one of its files instead: {others}." if others else "; give a folder or file with a model."
    raise CheckpointError(f"Folder {path} holds neither {SINGLE} nor {INDEX}{hint}")


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle or an archive with one, and opening a pickle can run any code; convert it with "
        f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), "
        f"{path.stem + '.safetensors'!r}) and give the new file."
    )


def _looks_pickled(path: Path) -> bool:
    """Whether the content is that of a pickle (protocols 2 to 5) or of a zip archive, as `torch.save` writes."""
    with path.open("rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _open_file(path: Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """The lazy arrays of one safetensors file in file order, and its metadata."""
    try:
        handle = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        if path.is_file() and _looks_pickled(path):
            raise _pickle_error(path) from None
        message = f"{path} cannot be opened as a whole safetensors file ({error}); copy or download it again."
        raise CheckpointError(message) from error
    arrays = {}
    for name in handle.offset_keys():
        info = handle.get_slice(name)
        if info.get_dtype() not in DTYPES:
            message = (
                f"Tensor {name!r} of {path} has dtype {info.get_dtype()}, which cannot be read into NumPy; "
                "convert the file to bfloat16 or float16 first."
            )
            raise CheckpointError(message)
        arrays[name] = LazyArray(name, tuple(info.get_shape()), DTYPES[info.get_dtype()], path, handle)
    return arrays, handle.metadata() or {}


def tensor_of(arrays: Mapping[str, LazyArray], name: str, path: Path) -> LazyArray:
    """The tensor of a name in the file at `path`, or an error with the nearest name."""
    if name not in arrays:
        hint = tree.nearest(name, arrays)
        raise CheckpointError(f"There is no tensor {name!r} in {path}{hint}; check the name, or the index.")
    return arrays[name]


def read_index(path: Path) -> dict[str, str]:
    """The file name of the shard of each tensor, in the order of the index."""
    places = _read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        message = f"{path} is no index of a sharded checkpoint: it has no 'weight_map' of tensors to files."
        raise CheckpointError(message)
    for file in dict.fromkeys(map(str, places.values())):
        if file != Path(file).name:
            message = f"{path} names the shard {file!r}, which is no plain file name; shards lie beside the index."
            raise CheckpointError(message)
        if not (path.parent / file).is_file():
            message = f"{path} names the shard {file}, which is not in its folder; copy or download that file."
            raise CheckpointError(message)
    return {name: str(file) for name, file in places.items()}


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} where an object is needed.")
    return content
