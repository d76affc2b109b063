"""Which leaf of a model in files a module of an adapter updates, and in which layout."""

import re
from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple

from permjax import tree
from permjax.experiments.architectures import FilesError
from permjax.io.checkpoint import Checkpoint
from permjax.lora.keys import ModuleInfo
from permjax.lora.kohya import is_kohya

_PREFIXES = ("transformer.", "model.")
"""What some files of one model have before the names of leaves, and others have not."""
_KOHYA = re.compile(r"lora_(unet|te\d?|transformer)_")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("*.c_attn.weight", "*.q_attn.weight", "*.c_proj.weight", "*.c_fc.weight")


class Place(NamedTuple):
    """The leaf that a module of an adapter updates, and whether it is stored `[in, out]`."""

    leaf: str
    transposed: bool


def is_transposed(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a weight is stored `[in, out]`, as in GPT-2."""
    known = (checkpoint.config or {}).get("model_type") in _CONV1D_MODELS
    return known and len(checkpoint[name].shape) == 2 and any(fnmatchcase(f".{name}", end) for end in _CONV1D)


def place_of(module: str, info: ModuleInfo, checkpoint: Checkpoint) -> Place:
    """The leaf that a module of an adapter updates, whose name may have another prefix, or be one of kohya's.

    Raises:
        FilesError: there is none, several, or none of its shape; names both.
    """
    leaf = _spelled(module, checkpoint) if is_kohya(module) else _named(module, checkpoint)
    if not leaf:
        hint = tree.nearest(f"{module}.weight", checkpoint)
        message = f"{checkpoint.path} has no weight for the module {module!r} of the adapters{hint}; "
        raise FilesError(message + "give the model that they were trained for.")
    transposed = info.kind == "embedding" or is_transposed(leaf, checkpoint)
    update = (info.size_in, info.size_out) if transposed else (info.size_out, info.size_in)
    shape = checkpoint[leaf].shape
    if (shape[0], prod(shape[1:])) != update:
        message = f"Module {module!r} of the adapters updates a weight of {update[0]} x {update[1]}, but {leaf!r} of "
        raise FilesError(f"{message}{checkpoint.path} has shape {shape}; give the model that they were trained for.")
    return Place(leaf, transposed)


def _named(module: str, checkpoint: Checkpoint) -> str:
    """The leaf of a module, or nothing."""
    bare = _bare(module)
    names = (name for p in ("", *_PREFIXES) for name in (f"{p}{module}.weight", f"{p}{bare}.weight"))
    return next((name for name in names if name in checkpoint), "")


def _spelled(module: str, checkpoint: Checkpoint) -> str:
    """The leaf of a module whose name has underscores where the dots were, or nothing.

    Raises:
        FilesError: several leaves are spelled like this.
    """
    wanted = _KOHYA.sub("", module, count=1)
    stems = {name: name.removesuffix(".weight") for name in checkpoint if name.endswith(".weight")}
    found = [
        name
        for name, stem in stems.items()
        if wanted in {f"{p}{_bare(stem)}".replace(".", "_") for p in ("", *_PREFIXES)}
    ]
    if len(found) > 1:
        message = f"The module {module!r} of the adapters may stand for any of {found} of {checkpoint.path}; "
        raise FilesError(message + "give an adapter with dots in its names, such as a PEFT folder.")
    return next(iter(found), "")


def _bare(name: str) -> str:
    return next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
