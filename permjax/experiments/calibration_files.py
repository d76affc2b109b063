"""Calibration inputs for models in files: read from a file or generated, checked, shuffled and cut into batches."""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.data.dataset import to_unit
from permjax.experiments.architectures import Architecture, FilesError
from permjax.io.checkpoint import open_checkpoint

_OWNER, _INPUT = "owner", "x"
_GENERATED = re.compile(r"generated:(?P<kind>\w+)(:(?P<count>\d+))?")
_NOISE = "white_noise"
_DEFAULT = 1000  # generated samples
_BAD_FILE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class Calibration(NamedTuple):
    """Inputs without labels.

    Attributes:
        batches: tuples of inputs, of nearly equal numbers of samples.
        owners: for every batch the number of the model in whose domain each sample is; None where it is not known.
        samples: how many there are.
        source: what they are, in words.
        generated: whether nothing in them is data.
    """

    batches: list[tuple[Any, ...]]
    owners: list[np.ndarray] | None
    samples: int
    source: str
    generated: bool


def read_calibration(
    given: str, architecture: Architecture, *, models: int, samples: int | None, batch_size: int, seed: int
) -> Calibration:
    """Read or make calibration inputs for an architecture.

    Args:
        given: a `.npz`, `.npy` or `.safetensors` file, or `generated:white_noise[:N]`.
        architecture: what takes them. Shapes are those of its example inputs, but for the number of samples and, where
            inputs are whole numbers (tokens), their lengths. Bytes in place of floats are scaled to [0, 1].
        models: how many there are, for owners.
        samples: how many to take, drawn at random; all by default.
        batch_size: at most so many at a time.
        seed: of the order, of the choice and of noise.

    Raises:
        FilesError: the inputs cannot be had or do not fit; names the file and the array.
    """
    if batch_size < 1:
        raise FilesError(f"batch_size must be at least 1, not {batch_size}.")
    rng = np.random.default_rng((seed, 2))
    owner = None
    if is_generated := given.startswith("generated:"):
        arrays, source = _generated(given, architecture.inputs, rng)
    else:
        arrays, owner, source = _from_file(Path(given), architecture.inputs, models)
    total = len(arrays[0])
    count = total if samples is None else samples
    if not 1 <= count <= total:
        raise FilesError(f"--samples {samples} cannot be drawn from the {total} of {given}; ask for 1 to {total}.")
    order = np.array_split(rng.permutation(total)[:count], -(-count // batch_size))
    batches = [tuple(jnp.asarray(x[rows]) for x in arrays) for rows in order]
    _check_taken(given, architecture, batches)
    owners = None if owner is None else [owner[rows] for rows in order]
    return Calibration(batches, owners, count, f"{count:,} {source}", is_generated)


# noise


def _generated(given: str, inputs: Sequence[Any], rng: np.random.Generator) -> tuple[list[np.ndarray], str]:
    found = _GENERATED.fullmatch(given)
    if found is None or found["kind"] != _NOISE:
        raise FilesError(f"--calibration {given} is not known; what can be generated is generated:{_NOISE}[:N].")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in inputs):
        raise FilesError(f"--calibration {given}: the network takes whole numbers, which no noise stands for.")
    count = int(found["count"] or _DEFAULT)
    arrays = [rng.random((count, *x.shape[1:]), np.float32).astype(x.dtype) for x in inputs]
    return arrays, "samples of white noise, independent uniform numbers from 0 to 1"


# files


def _from_file(path: Path, inputs: Sequence[Any], models: int) -> tuple[list[np.ndarray], np.ndarray | None, str]:
    arrays, read = _opened(path)
    names = _chosen(path, [name for name in arrays if name != _OWNER], len(inputs))
    found = [_fitting(f"{path}: {_called(name)}", read(name), x) for name, x in zip(names, inputs, strict=True)]
    lengths = {len(x) for x in found}
    if len(lengths) > 1:
        shown = ", ".join(f"{len(x)} in {_called(name)}" for name, x in zip(names, found, strict=True))
        raise FilesError(f"--calibration {path} has unlike numbers of samples: {shown}; give as many of each.")
    given = [x for name, x in zip(names, inputs, strict=True) if arrays[name] == np.uint8]
    scaled = any(jnp.issubdtype(x.dtype, jnp.floating) for x in given)
    owner = _checked_owner(path, read(_OWNER), len(found[0]), models) if _OWNER in arrays else None
    return found, owner, f"samples of {path}" + (", whose bytes were scaled to [0, 1]" if scaled else "")


def _opened(path: Path) -> tuple[Mapping[str, Any], Callable[[str], np.ndarray]]:
    """The dtypes of the arrays in a file by name, in the order of the inputs, and the function that reads one."""
    try:
        if path.suffix == ".safetensors":
            checkpoint = open_checkpoint(path)
            return {name: checkpoint[name].dtype for name in sorted(checkpoint)}, lambda name: checkpoint[name].read()
        if path.suffix == ".npy":
            arrays = {"": np.load(path, allow_pickle=False)}
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive}
        else:
            arrays = {}
    except _BAD_FILE as error:
        raise FilesError(f"--calibration {path} cannot be read ({error}); give a file of plain arrays.") from None
    if not arrays:
        message = f"--calibration {path} is no .npz, .npy or .safetensors file with arrays, nor generated:{_NOISE}[:N]"
        raise FilesError(message + "; give inputs like those that the models were trained on.")
    return {name: array.dtype for name, array in arrays.items()}, arrays.__getitem__


def _chosen(path: Path, names: list[str], count: int) -> list[str]:
    """The names of the arrays that are the inputs."""
    if count == 1 and _INPUT in names:
        return [_INPUT]
    if len(names) == count:
        return names
    listed = ", ".join(names) or "no arrays"
    wanted = f"one input: call it {_INPUT!r}" if count == 1 else f"{count} inputs: give one array for each, in order"
    raise FilesError(f"--calibration {path} holds {listed}, but the network takes {wanted}.")


def _called(name: str) -> str:
    return f"the array {name!r}" if name else "its array"


def _fitting(what: str, array: np.ndarray, example: Any) -> np.ndarray:
    """An array of samples that fits an example input, in its dtype."""
    shape, tokens = example.shape[1:], jnp.issubdtype(example.dtype, jnp.integer)
    if array.ndim != len(example.shape) or (not tokens and array.shape[1:] != shape) or not array.size:
        sizes = ", ".join(("samples", *map(str, shape)))
        raise FilesError(f"--calibration {what} has shape {array.shape}, but the network takes [{sizes}].")
    if array.dtype == np.uint8 and not tokens:
        return to_unit(array).astype(example.dtype)
    kind = jnp.integer if tokens else jnp.floating
    if not jnp.issubdtype(array.dtype, kind):
        message = f"--calibration {what} holds {array.dtype}, but the network takes {example.dtype}; convert it."
        raise FilesError(message)
    with np.errstate(over="ignore"):
        array = array.astype(example.dtype)
    _check_finite(what, array)
    return array


def _check_finite(what: str, array: np.ndarray) -> None:
    if bad := int(array.size - np.isfinite(array).sum()):
        raise FilesError(f"--calibration {what} holds {bad} numbers that are NaN or infinite; leave those samples out.")


def _checked_owner(path: Path, owner: np.ndarray, samples: int, models: int) -> np.ndarray:
    whole = np.issubdtype(owner.dtype, np.integer)
    if owner.shape != (samples,) or not whole or owner.min() < 0 or owner.max() >= models:
        message = f"--calibration {path}: the array 'owner' must hold one whole number from 0 to {models - 1} for each "
        raise FilesError(message + f"of the {samples} samples, not {owner.dtype} of shape {owner.shape}.")
    return owner.astype(np.int32)


# what the network makes of them


def _check_taken(given: str, architecture: Architecture, batches: Sequence[tuple]) -> None:
    """Check that the network takes the inputs; only lengths of tokens can still be wrong."""
    try:
        jax.eval_shape(architecture.apply, architecture.like, *batches[0])
    except Exception as error:
        shapes = ", ".join(str(x.shape[1:]) for x in batches[0])
        message = f"--calibration {given}: the network does not take inputs of shape {shapes}"
        raise FilesError(f"{message} ({next(iter(str(error).splitlines()), '')}); cut or pad them.") from None


def check_outputs(calibration: Calibration, apply: Callable, models: Sequence[Any], names: Sequence[str]) -> None:
    """Check that every model gives numbers for all inputs.

    Raises:
        ValueError: names the model; tokens that it does not know are the usual reason.
    """
    run = jax.jit(apply)
    for name, model in zip(names, models, strict=True):
        for batch in calibration.batches:
            outputs = {str(i): np.asarray(y) for i, y in enumerate(jax.tree.leaves(run(model, *batch)))}
            tree.check_finite(outputs, f"the outputs of {name} on the calibration data")
