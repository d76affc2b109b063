"""The architecture of checkpoint files: from `config.json` beside them, from a given file, or from a function."""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.io.checkpoint import Checkpoint
from permjax.nets.linen import batch_statistics
from permjax.nets.registry import ConfigError, build, config_from_dict, config_to_dict

_CONSTANTS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq")
"""Masks and tables that older Hugging Face files of GPT-2 and Llama hold beside the weights."""


class FilesError(ValueError):
    """A request about checkpoint files that cannot be carried out; the message names the file and what to do."""


class Architecture(NamedTuple):
    """What the leaves of some checkpoints mean.

    Attributes:
        apply: `apply(params, *inputs) -> outputs`.
        inputs: example inputs.
        like: the parameters as a tree of `jax.ShapeDtypeStruct`, named as in the files.
        source: what to call it in messages.
        config: the configuration that it comes from, if any.
        statistics: `statistics(params, *inputs) -> params` with BatchNorm's running statistics of the inputs, where it
            is known how to get them.
    """

    apply: Callable[..., Any]
    inputs: tuple[Any, ...]
    like: Any
    source: str
    config: Mapping[str, Any] | None = None
    statistics: Callable[..., Any] | None = None


def find_architecture(checkpoints: Sequence[Checkpoint], config: str | None, arch: str | None) -> Architecture:
    """The one architecture of some checkpoints, whose names, shapes and kinds of numbers all fit it.

    Args:
        checkpoints: one or more.
        config: a JSON file with `model_type` and the fields of that type; else the `config.json` beside the files.
        arch: `module:function`, returning `(apply, example_inputs)`; names are split at `/` into nested dicts.

    Raises:
        FilesError: there is no architecture or not just one, it cannot be had, or a file does not fit it.
    """
    if config and arch:
        raise FilesError("Both --config and --arch give an architecture; give only one of them.")
    found = _from_function(arch, checkpoints[0]) if arch else _from_config(checkpoints, config)
    for checkpoint in checkpoints:
        _check_leaves(found, checkpoint)
    return found


# from a configuration


def _from_config(checkpoints: Sequence[Checkpoint], given: str | None) -> Architecture:
    """The architecture of the given configuration, or of the configurations beside the files, which must be equal."""
    values = None if given is None else _read_json(Path(given))
    found = [(c, *_configured(given, values, c)) for c in checkpoints if given or c.config is not None]
    if not found:
        message = (
            f"The architecture of {checkpoints[0].path} is not known: put its config.json beside it, name one with "
            "--config FILE, or give --arch module:function, which returns (apply, example_inputs)."
        )
        raise FilesError(message)
    (first, config, read), *others = found
    for other, value, _ in others:
        _check_equal(config_to_dict(config), config_to_dict(value), first.path, other.path)
    net = build(config)
    like = jax.eval_shape(net.init, jax.random.key(0))
    source = f"the {config.model_type} of {given or _beside(first)}"
    return Architecture(net.apply, net.example_inputs(2), like, source, read, partial(batch_statistics, net))


def _configured(
    given: str | None, values: Mapping[str, Any] | None, checkpoint: Checkpoint
) -> tuple[Any, Mapping[str, Any]]:
    """The configuration of a file, and what it was made from.

    For GPT-2 that is with the prefix of its names, which its `config.json` does not tell.
    """
    values = values or checkpoint.config or {}
    if values.get("model_type") == "gpt2" and any(name.startswith("transformer.") for name in checkpoint):
        values = {"prefix": "transformer.", **values}
    try:
        return config_from_dict(values), values
    except ConfigError as error:
        raise FilesError(f"{given or _beside(checkpoint)}: {error}") from None


def _beside(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.parent / "config.json"


def _check_equal(here: dict[str, Any], there: dict[str, Any], first: Path, other: Path) -> None:
    """Check that two configurations are one; weights of equal shapes may still differ in, say, the number of heads."""
    for key in here | there:
        if here.get(key) != there.get(key):
            message = (
                f"The models have different structure: {key!r} is {here.get(key)!r} for {first} but "
                f"{there.get(key)!r} for {other}; give models of one architecture."
            )
            raise FilesError(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FilesError(f"--config {path} cannot be read as JSON ({error}); give a file like config.json.") from None
    if not isinstance(values, dict):
        raise FilesError(f"--config {path} holds a JSON {type(values).__name__}, not an object with a 'model_type'.")
    return values


# from a function


def _from_function(arch: str, checkpoint: Checkpoint) -> Architecture:
    """The architecture that a function of the user gives to the leaves of the first file."""
    like = tree.nest({name: _abstract(lazy) for name, lazy in checkpoint.items()})
    with _importable(Path.cwd()):
        apply, inputs = _returned(arch)
        try:
            jax.eval_shape(apply, like, *inputs)
        except KeyError as error:
            name = str(error.args[0]) if error.args else "?"
            message = f"The function of --arch {arch} asks for {name!r}, which {checkpoint.path} lacks"
            raise FilesError(f"{message}{tree.nearest(name, checkpoint)}; check the function or the file.") from None
        except Exception as error:
            message = f"The function of --arch {arch} does not run on the shapes of {checkpoint.path}"
            raise FilesError(f"{message} ({_line(error)}); check the function or the file.") from None
    return Architecture(apply, inputs, like, f"the first model, {checkpoint.path}")


def _returned(arch: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What the function that `module:function` names returns, checked."""
    function = _named(arch)
    try:
        found = function()
    except Exception as error:
        raise FilesError(f"--arch {arch} failed when it was called without arguments ({_line(error)}).") from None
    if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0])):
        message = f"--arch {arch} must return (apply, example_inputs) with a function `apply`, not {_kind(found)}."
        raise FilesError(message)
    apply, inputs = found
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    for leaf in jax.tree.leaves(inputs, is_leaf=lambda x: x is None):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            message = (
                f"--arch {arch} must return example inputs that are arrays, or a tuple of them, not {_kind(leaf)}."
            )
            raise FilesError(message)
    return apply, inputs


def _named(arch: str) -> Callable[[], Any]:
    module, _, name = arch.partition(":")
    if not (module and name):
        message = f"--arch is {arch!r}, but must be module:function, as in my_model:build for build() in my_model.py."
        raise FilesError(message)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        message = f"--arch {arch}: the module {module!r} cannot be imported ({_line(error)}); "
        raise FilesError(f"{message}run permjax in the folder of {module}.py, or install it.") from None
    if not callable(getattr(found, name, None)):
        functions = [key for key, value in vars(found).items() if callable(value)]
        raise FilesError(
            f"--arch {arch}: the module {module!r} has no function {name!r}{tree.nearest(name, functions)}."
        )
    return getattr(found, name)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, os.fspath(folder))
    try:
        yield
    finally:
        sys.path.remove(os.fspath(folder))


def _line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _kind(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"{type(value).__name__}"


# the leaves


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = np.result_type(np.float32, leaf.dtype) if _is_floating(leaf) else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(dtype))


def _check_leaves(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Check that a file has the leaves of the architecture, and besides them only known constants."""
    expected, source, path = tree.flatten(architecture.like), architecture.source, checkpoint.path
    extra = [n for n in checkpoint if n not in expected and not any(fnmatchcase(n, p) for p in _CONSTANTS)]
    for name, leaf in expected.items():
        if name not in checkpoint:
            hint = tree.nearest(name, extra)
            message = f"{path} lacks the leaf {name!r} of {source}{hint}; give models of this architecture."
            raise FilesError(message)
        _check_leaf(name, checkpoint[name], leaf, f"{path}", source)
    if extra:
        hint = tree.nearest(extra[0], expected)
        message = f"{path} has the leaf {extra[0]!r}, which {source} lacks{hint}; give models of this architecture."
        raise FilesError(message)


def _check_leaf(name: str, leaf: Any, expected: jax.ShapeDtypeStruct, path: str, source: str) -> None:
    here, there = leaf.shape, expected.shape
    axis = next((i for i, sizes in enumerate(zip(here, there, strict=False)) if sizes[0] != sizes[1]), None)
    if len(here) != len(there) or axis is not None:
        place = "" if len(here) != len(there) else f", axis {axis},"
        message = f"Leaf {name!r}{place} has shape {here} in {path} but {there} in {source}; the structure differs."
        raise FilesError(message)
    if _is_floating(leaf) != _is_floating(expected):
        message = f"Leaf {name!r} has dtype {leaf.dtype} in {path} but {expected.dtype} in {source}; convert the file."
        raise FilesError(message)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
