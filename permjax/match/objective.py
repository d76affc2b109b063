"""What matching maximises, as one number or by pairs: inner products of models over the leaves that count."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from permjax.match.models import counted_names
from permjax.symmetry.spec import PermutationSpec


def counted(spec: PermutationSpec, leaves: Mapping[str, Any]) -> PermutationSpec:
    """Return the part of the spec that counts: floating leaves of role weight, and the groups that stand in them.

    Raises:
        ValueError: there is no such group.
    """
    names = frozenset(counted_names(spec, leaves))
    weights = tuple(leaf for leaf in spec.leaves if leaf.name in names)
    groups = tuple(g for g in spec.groups if any(member.leaf in names for member in spec.members(g.name)))
    if not groups:
        raise ValueError("no group of the spec stands in a floating leaf of role weight, so nothing can be matched.")
    return PermutationSpec(groups, weights, spec.indices)


def joint_objective(models: Sequence[Mapping[str, Any]]) -> float:
    """Return the sum over all pairs of models of their inner product, in float64 on the host.

    Args:
        models: leaves that count, by name.
    """
    total = 0.0
    for name in models[0]:
        before = np.asarray(models[0][name], np.float64)
        for model in models[1:]:
            wide = np.asarray(model[name], np.float64)
            total += float(np.vdot(before, wide))
            before = before + wide
    return total


def pair_objectives(models: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "models models"]:
    """Return the inner products of all pairs of models, squared norms on the diagonal, in float64 on the host."""
    found = np.zeros((len(models), len(models)))
    for name in models[0]:
        rows = np.stack([np.asarray(model[name], np.float64).ravel() for model in models])
        found += rows @ rows.T
    return found


def scale(models: Sequence[Mapping[str, Any]]) -> float:
    """Return the unit of objectives and gains: `sum_{m<k} |b_m| |b_k|` over all pairs of models."""
    squares = [sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in model.values()) for model in models]
    return sum(x * y for x, y in combinations(np.sqrt(squares).tolist(), 2))
