"""Extracting an adapter from two checkpoints: one weight of each in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from permjax.experiments.architectures import FilesError
from permjax.experiments.lora_files import Dtype, check_target
from permjax.experiments.lora_places import is_transposed
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import Checkpoint, open_checkpoint
from permjax.lora.extract import extract_lora
from permjax.lora.formats import save_adapter
from permjax.lora.pool import Factors
from permjax.tree import nearest

_SUFFIX = ".weight"
_EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "shared.weight")


@dataclass(frozen=True)
class LoraExtractOptions:
    """What to extract.

    Attributes:
        base: the checkpoint before training: a safetensors file, an index, or a folder.
        tuned: the checkpoint after training.
        out: the folder of the PEFT adapter.
        rank: of all modules.
        targets: names of weights to take, with `*`; by default all matrices and kernels that have changed, but for
            embeddings, whose updates are left out in any case.
        dtype: of the factors.
    """

    base: str
    tuned: str
    out: str
    rank: int
    targets: tuple[str, ...] = ()
    dtype: Dtype = "float32"


class ExtractedModule(NamedTuple):
    """One module of an extracted adapter.

    Attributes:
        shape: of the weight.
        norm: of the change.
        relative: norm of the change over that of the weight before.
        kept: the share of the change's energy in the factors.
        transposed: whether the weight is stored `[in, out]`, as in GPT-2.
    """

    shape: tuple[int, ...]
    norm: float
    relative: float
    kept: float
    transposed: bool


class ExtractedFiles(NamedTuple):
    """What was extracted, and the tensors that have changed, but are not part of it."""

    found: dict[str, ExtractedModule]
    left_out: list[str]


def extract(options: LoraExtractOptions, progress: Progress) -> ExtractedFiles:
    """Write the adapter of some rank that takes one checkpoint nearest to another.

    Raises:
        ValueError: options or files that do not fit; names the option, or the file and the tensor. Nothing is written.
    """
    if options.rank < 1:
        raise FilesError(f"--rank {options.rank} is no rank; give a whole number above 0.")
    base, tuned = open_checkpoint(options.base), open_checkpoint(options.tuned)
    check_target(options.out, "peft", [base.path, tuned.path])
    _check_same(base, tuned)
    chosen = set(_chosen(base, options.targets))
    modules: dict[str, Factors] = {}
    found: dict[str, ExtractedModule] = {}
    left_out: list[str] = []
    progress.start("extracting", len(base))
    for name in base:
        old, new = _floats(base, name), _floats(tuned, name)
        if name in chosen and (old != new).any():
            module = name.removesuffix(_SUFFIX)
            modules[module], found[module] = _extracted(name, old, new, base, options.rank)
        elif (old != new).any():
            left_out.append(name)
        progress.step(1)
    progress.done()
    if not modules:
        raise FilesError(f"No target weight differs between {options.base} and {options.tuned}; nothing was written.")
    save_adapter(options.out, modules, like=(), dtype=options.dtype)
    return ExtractedFiles(found, left_out)


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    """Check that two checkpoints have the same tensors."""
    for one, other in ((base, tuned), (tuned, base)):
        for name in one:
            if name not in other:
                message = f"{other.path} has no tensor {name!r}, which {one.path} has{nearest(name, other)}; "
                raise FilesError(message + "give two checkpoints of one model.")
            if one[name].shape != other[name].shape:
                message = f"{other.path}: tensor {name!r} has shape {other[name].shape}, but {one[name].shape} in "
                raise FilesError(f"{message}{one.path}; give two checkpoints of one model.")


def _chosen(base: Checkpoint, targets: Sequence[str]) -> Iterator[str]:
    """The weights that a LoRA can stand for, among those that are asked for."""
    fit = [n for n in base if n.endswith(_SUFFIX) and len(base[n].shape) in (2, 4) and not _like(n, _EMBEDDINGS)]
    for pattern in targets:
        if not any(_asked(name, pattern) for name in fit):
            message = f"--targets {pattern} fits no matrix or kernel of {base.path}{nearest(pattern, fit)}; it is "
            raise FilesError(f"{message}compared with whole names and with their ends, such as q_proj or *.mlp.*.")
    yield from (name for name in fit if not targets or any(_asked(name, pattern) for pattern in targets))


def _asked(name: str, pattern: str) -> bool:
    module = name.removesuffix(_SUFFIX)
    return _like(name, (pattern,)) or _like(module, (pattern, f"*.{pattern}"))


def _like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The values of a tensor in float32 if it is a floating one.

    Raises:
        FilesError: some are not finite.
    """
    values = checkpoint[name].read()
    values = values.astype(np.float32) if jnp.issubdtype(values.dtype, jnp.floating) else values
    if not np.isfinite(values).all():
        raise FilesError(f"{checkpoint.path}: tensor {name!r} has values that are not finite; save or copy it again.")
    return values


def _extracted(
    name: str, old: np.ndarray, new: np.ndarray, base: Checkpoint, rank: int
) -> tuple[Factors, ExtractedModule]:
    transposed = is_transposed(name, base)
    found = extract_lora(*((old.T, new.T) if transposed else (old, new)), rank)
    a, b = found.factors
    if old.ndim == 4:  # as PEFT stores kernels
        a, b = a.reshape(rank, *old.shape[1:]), b[:, :, None, None]
    size = float(np.linalg.norm(old))
    relative = found.norm / size if size > 0 else float("inf")
    return Factors(a, b), ExtractedModule(old.shape, found.norm, relative, found.kept, transposed)
