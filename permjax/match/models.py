"""Models on their way into a matching method and out of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.action import permute_leaf
from permjax.permutation import validate
from permjax.symmetry.spec import PermutationSpec


def check_models(spec: PermutationSpec, models: tuple) -> None:
    """Check that there are two models or more, of one structure, which is the spec's.

    Raises:
        ValueError: names the leaf that does not fit.
    """
    if len(models) < 2:
        raise ValueError(f"matching needs two models or more, not {len(models)}; the first one is the anchor.")
    tree.check_same_structure(models)
    spec.validate({name: np.shape(leaf) for name, leaf in tree.flatten(models[0]).items()}, "model 0")


def are_local(models: tuple) -> bool:
    """Tell whether all leaves lie in the host's memory: NumPy arrays, and JAX arrays of the CPU."""
    leaves = (leaf for model in models for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))
    return all(device.platform == "cpu" for leaf in leaves for device in leaf.devices())


def entries(model: Any, what: str, local: bool) -> dict[str, Any]:
    """Return the named leaves where they are worked on: views of JAX arrays of the CPU, lazy leaves as they are.

    Raises:
        ValueError: names a leaf that is not finite.
    """
    found = {name: _hosted(leaf) if local else jnp.asarray(leaf) for name, leaf in tree.flatten(model).items()}
    tree.check_finite(found, what)
    return found


def counted_names(spec: PermutationSpec, leaves: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the leaves that count: floating ones of role weight."""
    weights = [leaf.name for leaf in spec.leaves if leaf.role == "weight"]
    return tuple(name for name in weights if jnp.issubdtype(leaves[name].dtype, jnp.floating))


def reordered(spec: PermutationSpec, permutations: Mapping[str, Any], model: Any, found: Mapping[str, Any]) -> Any:
    """Return the permuted model, made leaf by leaf from its `entries`; JAX leaves are so again, in their place."""
    validate(spec, permutations)

    def permuted(name: str, leaf: Any) -> Any:
        value = found[name] if isinstance(found[name], jax.Array) else np.asarray(found[name])
        value = permute_leaf(spec, spec.leaf(name), permutations, value)
        return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value

    return tree.map_named(permuted, model)


def _hosted(leaf: Any) -> Any:
    """The leaf itself if it lies in a file, to be read whenever it is needed, else a view as a NumPy array."""
    lies_elsewhere = hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, jax.Array)
    return leaf if lies_elsewhere else np.asarray(leaf)
