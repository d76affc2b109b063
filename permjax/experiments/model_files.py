"""Checkpoint files as models of one architecture: checked, traced, read, and kept from being overwritten."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.experiments.architectures import Architecture, FilesError, find_architecture
from permjax.io.checkpoint import Checkpoint, open_checkpoint
from permjax.io.lazy import PICKLES, SINGLE
from permjax.merge.export import is_merged
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec


class ModelFiles(NamedTuple):
    """Models in files.

    Attributes:
        checkpoints: the files, opened.
        architecture: what their leaves mean.
        spec: its symmetry.
    """

    checkpoints: tuple[Checkpoint, ...]
    architecture: Architecture
    spec: PermutationSpec

    @property
    def statistics(self) -> Callable[..., Any] | None:
        """The function that estimates running statistics, if there are any and it is known."""
        has = any(leaf.role == "statistic" for leaf in self.spec.leaves)
        return self.architecture.statistics if has else None

    def load(self) -> tuple[Any, ...]:
        """The models, in float32 or the widest dtype that one of them has for a leaf."""

        def read(checkpoint: Checkpoint) -> Any:
            return tree.map_named(lambda name, _: self._widened(name, checkpoint), self.architecture.like)

        return tuple(map(read, self.checkpoints))

    def _widened(self, name: str, checkpoint: Checkpoint) -> np.ndarray:
        dtypes = [c[name].dtype for c in self.checkpoints]
        floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
        return np.asarray(checkpoint[name], np.result_type(np.float32, *dtypes) if floating else None)


def open_all(paths: Sequence[str]) -> tuple[Checkpoint, ...]:
    """Open two checkpoints or more without reading their tensors; networks of merged widths are refused."""
    if len(paths) < 2:
        raise FilesError(f"Two models or more are needed, the first as the anchor, not {len(paths)}; name more files.")
    found = tuple(open_checkpoint(path) for path in paths)
    for checkpoint in found:
        if is_merged(checkpoint):
            message = f"{checkpoint.path} is a merged network, whose widths are not those of one model; "
            raise FilesError(message + "give the models that it was made of (permjax.load_merged runs it).")
    return found


def examine(checkpoints: Sequence[Checkpoint], config: str | None, arch: str | None) -> ModelFiles:
    """Check that the files hold finite models of one architecture, and trace its symmetry; see `find_architecture`.

    Raises:
        ValueError: names the file and the leaf.
    """
    architecture = find_architecture(checkpoints, config, arch)
    for checkpoint in checkpoints:
        tree.check_finite({n: checkpoint[n] for n in tree.names(architecture.like)}, str(checkpoint.path))
    try:
        spec = trace_spec(architecture.apply, architecture.like, *architecture.inputs)
    except ValueError as error:
        raise FilesError(f"No symmetry can be found in {architecture.source}: {error}") from None
    return ModelFiles(tuple(checkpoints), architecture, spec)


def target_paths(out: str, checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """Where each model goes: `out` itself if it is one, else below `out` under the name it has where it comes from."""
    if len(checkpoints) == 1:
        return [Path(out)]
    if Path(out).suffix == ".safetensors" or Path(out).is_file():
        message = f"{len(checkpoints)} aligned models need a folder, not the file {out}; give a folder."
        raise FilesError(message)
    names = [_name(checkpoint.path) for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{index}-{name}" for index, name in enumerate(names, 1)]
    return [Path(out) / name for name in names]


def _name(path: Path) -> str:
    """The name of a file, or of the folder whose model it is."""
    return path.name if path.suffix == ".safetensors" and path.name != SINGLE else path.parent.resolve().name


def check_place(target: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a target that is no place for a checkpoint, or one of the checkpoints that are read."""
    whole = target.is_dir() or target.suffix != ".safetensors"
    if target.suffix in (*PICKLES, ".json") or (whole and target.is_file()):
        message = f"{target} is no place for a checkpoint; give a folder, or a file name that ends in .safetensors."
        raise FilesError(message)
    for checkpoint in checkpoints:
        files = [checkpoint.path, *(checkpoint.path.parent / name for name in checkpoint.shards)]
        taken = {file.resolve() for file in files} | {file.parent.resolve() / file.name for file in files}
        if target.resolve() in taken or (whole and any(file.parent == target.resolve() for file in taken)):
            message = f"{target} would be written over the model {checkpoint.path}, which is read; give another place."
            raise FilesError(message)


def check_plan(path: str, checkpoints: Sequence[Checkpoint], targets: Sequence[Path]) -> None:
    """Refuse a plan file that is neither JSON nor safetensors, or that is in the way of a model."""
    plan = Path(path)
    if plan.suffix not in (".json", ".safetensors"):
        raise FilesError(f"A plan is kept as .json or .safetensors, not {path}; give a file of such a name.")
    for checkpoint in checkpoints:
        files = ["config.json", checkpoint.path.name, *checkpoint.shards]
        if plan.resolve() in {(checkpoint.path.parent / file).resolve() for file in files}:
            raise FilesError(f"The plan {path} would be written over a file of {checkpoint.path}; give another name.")
    if plan.resolve() in {target.resolve() for target in targets}:
        raise FilesError(f"The plan and a model cannot both be {path}; give two names.")
