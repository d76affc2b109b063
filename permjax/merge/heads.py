"""Heads of different label spaces: their outputs as units that no two models share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec


class Heads(NamedTuple):
    """What `own_heads` finds.

    Attributes:
        spec: the spec in which the outputs are units of a group.
        groups: these groups; a plan keeps them apart (ratio 1).
        leaves: the leaves that hold them: the heads' weights and biases.
    """

    spec: PermutationSpec
    groups: tuple[str, ...]
    leaves: tuple[str, ...]


def own_heads(spec: PermutationSpec, apply: Callable, params: Any, *inputs: Any) -> Heads:
    """Return the spec of models whose outputs (along the last axis) mean something different in each of them.

    In `spec` the outputs are pinned, so that merged models share a head. Here they are units: kept apart, every model
    keeps a head of its own on the merged network. Models may have unlike numbers of outputs.

    Args:
        spec: the symmetry, as traced from `apply`.
        apply: `apply(params, *inputs) -> outputs`.
        params: pytree of arrays, or of `jax.ShapeDtypeStruct`.
        *inputs: example inputs.

    Raises:
        ValueError: the outputs are no units of a head: they are used within the network, or are no axis of a leaf.
    """

    def free(params: Any, *inputs: Any) -> Any:  # any function of the outputs that does not depend on their order
        return jax.tree.map(lambda y: jax.nn.logsumexp(y, axis=-1), apply(params, *inputs))

    opened = trace_spec(free, params, *inputs, verify=False, **_roles(spec))
    places = {(m.leaf, m.axis, m.path) for g in spec.groups for m in spec.members(g.name)}
    groups = tuple(g.name for g in opened.groups if not places & set(opened.members(g.name)))
    if not groups or any(spec.group(g.name) != g for g in opened.groups if g.name in spec):
        raise ValueError(
            "the outputs of `apply` are no units of a head of their own along the last axis (they are no axis of a "
            "leaf, or are used within the network as well); models with such outputs must share them."
        )
    leaves = tuple(dict.fromkeys(m.leaf for g in groups for m in opened.members(g)))
    return Heads(opened, groups, leaves)


def _roles(spec: PermutationSpec) -> dict[str, Any]:
    return {
        "statistics": [leaf.name for leaf in spec.leaves if leaf.role == "statistic"],
        "frozen": [leaf.name for leaf in spec.leaves if leaf.role == "frozen"],
    }
