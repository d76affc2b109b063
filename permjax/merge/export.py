"""Merged networks in files: dense safetensors, with the block structure in their metadata."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from permjax import tree
from permjax.io.checkpoint import Checkpoint, CheckpointError, open_checkpoint, save_checkpoint
from permjax.io.lazy import StrPath
from permjax.merge.block_apply import Apply, BlockApply, block_apply
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.written import spec_from_dict, spec_to_dict

HEADER = "permjax-merged"
"""The key of the metadata under which the block structure stands, as JSON."""
CONFIG_KEY = "permjax_merged"
"""The key that a `config.json` of the models has beside their own ones if the widths of the network differ."""


class Structure(NamedTuple):
    """What the metadata of a merged network say.

    Attributes:
        spec: the symmetry of one model, with its shapes.
        plan: which units of the aligned models are one.
        joined: how the outputs in the views of the models become one; see `block_apply`.
        source: what the architecture of the models is called.
        config: the configuration of the models, if they have one.
    """

    spec: PermutationSpec
    plan: Plan
    joined: str
    source: str
    config: dict[str, Any] | None


def save_merged(
    path: StrPath,
    params: Any,
    network: BlockApply,
    *,
    config: Mapping[str, Any] | None = None,
    source: str = "",
    constants: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_size: int | None = None,
    extra_files: Iterable[StrPath] = (),
) -> None:
    """Write a merged network densely as safetensors, with its block structure in the metadata, atomically.

    Args:
        path: a `.safetensors` file, or a folder for `model.safetensors` or shards with their index.
        params: the wide parameters, a tree of dicts.
        network: the function that takes them, as `block_apply` returns it.
        config: the configuration of the models. It is kept in the metadata; a folder also gets it as `config.json`,
            with the key `permjax_merged` that says which widths differ.
        source: what the architecture of the models is called.
        constants: more tensors to write, of which the network knows nothing.
        metadata: more text for the header; `{"format": "pt"}` by default.
        shard_size: the largest size of a shard in bytes; a single file by default.
        extra_files: more files to copy into a folder.

    Raises:
        ValueError: the parameters do not fit the network.
        CheckpointError: see `save_checkpoint`.

    Example:
        >>> network = block_apply(spec, plan, apply)
        >>> save_merged("merged.safetensors", pleas(spec, aligned, plan, apply=apply, data=data).models[0], network)
        >>> params, network = load_merged("merged.safetensors", apply)
    """
    named = tree.flatten(params)
    network.wide.wide_spec.validate({name: np.shape(leaf) for name, leaf in named.items()}, "the merged model")
    header = {HEADER: json.dumps(_header(network, config, source))}
    text = {**(metadata or {"format": "pt"}), **header}
    with tempfile.TemporaryDirectory() as folder:
        files, single = [*map(Path, extra_files)], Path(path).suffix == ".safetensors" and not Path(path).is_dir()
        if config is not None and not single:
            files.append(Path(folder) / "config.json")
            files[-1].write_text(json.dumps({**config, CONFIG_KEY: _summary(network)}, indent=2) + "\n")
        tensors = {**(constants or {}), **named}
        save_checkpoint(path, tensors, metadata=text, shard_size=shard_size, extra_files=files)


def load_merged(path: StrPath, apply: Apply | Sequence[Apply], *, dtype: Any = None) -> tuple[Any, BlockApply]:
    """Read a merged network and the function that runs it at its block-sparse cost.

    Args:
        path: a file or folder that `save_merged` or `permjax merge --method pleas` wrote.
        apply: `apply(params, *inputs) -> outputs` of the models, or one function for each.
        dtype: the dtype to give to floating leaves; what the file has by default.

    Returns:
        The wide parameters as nested dicts of NumPy arrays, and the function: `network(params, *inputs)`.

    Raises:
        ValueError: the file holds no merged network, or a damaged one; names the file.

    Example:
        >>> params, network = load_merged("merged.safetensors", apply)
        >>> logits = jax.jit(network)(params, x)
    """
    checkpoint = open_checkpoint(path)
    found = read_structure(checkpoint)
    if found is None:
        message = f"{checkpoint.path} holds no merged network: its metadata lack {HEADER!r}. A network with the widths "
        raise CheckpointError(message + "of one model is an ordinary checkpoint: read it with load_tree.")
    network = block_apply(found.spec, found.plan, apply, joined=found.joined)
    named = checkpoint.load([leaf.name for leaf in found.spec.leaves], dtype)
    network.wide.wide_spec.validate({name: leaf.shape for name, leaf in named.items()}, str(checkpoint.path))
    return tree.nest(named), network


def is_merged(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is a merged network whose widths are not those of one model."""
    return HEADER in checkpoint.metadata


def read_structure(checkpoint: Checkpoint) -> Structure | None:
    """Return the block structure of a merged network, or None for an ordinary checkpoint.

    Raises:
        CheckpointError: the metadata are damaged; names the file.
    """
    if not is_merged(checkpoint):
        return None
    try:
        values = json.loads(checkpoint.metadata[HEADER])
        spec, plan = spec_from_dict(values["spec"]), _plan_from(values["plan"])
        return Structure(spec, plan, values["joined"], values["source"], values["config"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        message = f"The block structure in the metadata of {checkpoint.path} cannot be read ({error}); copy it again."
        raise CheckpointError(message) from error


def _header(network: BlockApply, config: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    plan = network.wide.plan
    labels = {group: [rows.tolist() for rows in models] for group, models in plan.labels.items()}
    widths, per = dict(plan.widths), {group: list(outer) for group, outer in plan.per.items()}
    return {
        "plan": {"format": "permjax-plan", "widths": widths, "per": per, "labels": labels},
        "spec": spec_to_dict(network.wide.spec),
        "joined": network.joined,
        "source": source,
        "config": None if config is None else dict(config),
    }


def _plan_from(values: Mapping[str, Any]) -> Plan:
    labels = {g: tuple(np.asarray(rows, np.int32) for rows in models) for g, models in values["labels"].items()}
    return Plan(labels, values["widths"], {g: tuple(outer) for g, outer in values["per"].items()})


def _summary(network: BlockApply) -> dict[str, Any]:
    """Return what a reader of `config.json` has to know: the shapes there are not those of the weights."""
    wide = network.wide
    widths = {group: wide.plan.widths[group] for group in sorted(wide.widened)}
    return {"models": wide.models, "joined": network.joined, "widths": widths}
