"""Stacks of models over the devices: one mesh, and functions of one model mapped over many."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

MODELS = "models"
"""Name of the only axis of the mesh."""


def model_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, `models`, over the given devices; over all by default."""
    found = jax.devices() if devices is None else list(devices)
    return Mesh(np.array(found), (MODELS,), axis_types=(AxisType.Auto,))


def shard_models(stack: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Lay the first axis of every leaf, which counts the models, over the devices of a mesh.

    Args:
        stack: models stacked by `permjax.tree.stack`.
        mesh: from `model_mesh`; all devices by default.

    Raises:
        ValueError: the models are not a multiple of the devices.

    Example:
        >>> stack = shard_models(tree.stack(models))
        >>> losses = jax.jit(jax.vmap(loss))(stack)
    """
    mesh = model_mesh() if mesh is None else mesh
    count, size = _count(stack), mesh.devices.size
    if count % size:
        raise ValueError(
            f"{count} models cannot be laid over {size} devices in equal parts; use `pmap_models`, which fills up the "
            "last part, or a mesh of fewer devices."
        )
    return jax.device_put(stack, NamedSharding(mesh, PartitionSpec(MODELS)))


def pmap_models(f: Callable[..., Any], mesh: Mesh | None = None) -> Callable[..., Any]:
    """`f` of one model as a compiled function of a stack of models, which the devices share.

    Any number of models will do: the last one is repeated until every device has as many, and the surplus is cut off.

    Args:
        f: `f(model, *others)`; what it returns has a new first axis over models.
        mesh: from `model_mesh`; all devices by default.

    Returns:
        `mapped(stack, *others)`, in which `others` are the same for all models.

    Example:
        >>> losses = pmap_models(loss)(tree.stack(models), x, y)
    """
    mesh = model_mesh() if mesh is None else mesh

    @functools.partial(jax.jit, static_argnums=0)
    def run(others: int, stack: PyTree, *rest: Any) -> Any:
        return jax.vmap(f, in_axes=(0, *(None,) * others))(stack, *rest)

    def mapped(stack: PyTree, *others: Any) -> Any:
        count = _count(stack)
        surplus = -count % mesh.devices.size
        filled = jax.tree.map(lambda leaf: _filled(leaf, surplus), stack)
        found = run(len(others), shard_models(filled, mesh), *others)
        return jax.tree.map(lambda leaf: leaf[:count], found) if surplus else found

    return mapped


def _filled(leaf: Any, surplus: int) -> Any:
    leaf = jnp.asarray(leaf)
    return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], surplus, axis=0)]) if surplus else leaf


def _count(stack: PyTree) -> int:
    """The number of models in a stack."""
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(stack)}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"the first axis of every leaf must count the models, but there are first axes {sorted(counts)}; "
            "stack the models with `permjax.tree.stack`."
        )
    return counts.pop()[0]
