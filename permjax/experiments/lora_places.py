"""Which leaf of a model in files a module of an adapter updates, and in which layout."""

from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple

from permjax import tree
from permjax.experiments.architectures import FilesError
from permjax.io.checkpoint import Checkpoint
from permjax.lora.keys import ModuleInfo

_PREFIXES = ("transformer.", "model.")
"""What some files of one model have before the names of leaves, and others have not."""
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
    """The leaf that a module of an adapter updates, whose name may have another prefix.

    Raises:
        FilesError: there is none, or none of its shape; names both.
    """
    bare = next((module.removeprefix(p) for p in _PREFIXES if module.startswith(p)), module)
    leaf = next(
        (n for p in ("", *_PREFIXES) for n in (f"{p}{module}.weight", f"{p}{bare}.weight") if n in checkpoint), ""
    )
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
