"""Bring the coordinates of one trained table into the order, signs and places of those of another.

Scores do not change when the coordinates of all rows are permuted. Nor do those of flows and affine maps when one
coordinate of all means changes its sign, or moves by a constant c with the shifts of relations moving by c (1 - s). Two
tables trained from different seeds differ by such a motion first of all, so they are averaged only after it is undone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax import tree
from permjax.action import permute
from permjax.kge.base import Family, Params
from permjax.kge.flows import Nfe1, Nfe1Sigma, Nfe2, Nfe3, NfeK
from permjax.kge.vectors import Affine, Distmult, Transe
from permjax.match.assignment import Solver, solve
from permjax.symmetry.spec import Fixed, Group, Leaf, Of, PermutationSpec

COORDINATE = "coordinate"
"""Name of the only group of the spec of a table."""

_WITH_MEANS = (Nfe1, Nfe2, NfeK, Nfe3, Affine, Transe)
_ALIGNED = (*_WITH_MEANS, Nfe1Sigma, Distmult)


class Motion(NamedTuple):
    """What leaves the scores of a family alone; applied in this order.

    Attributes:
        permutation: source coordinate of each coordinate.
        sign: 1 or -1, by which means (DistMult: entities) are multiplied.
        shift: what is added to the means.
    """

    permutation: Int[Array | np.ndarray, " d"]
    sign: Float[Array | np.ndarray, " d"]
    shift: Float[Array | np.ndarray, " d"]


class Aligned(NamedTuple):
    """What `align_coordinates` found.

    Attributes:
        params: the other model's rows, moved.
        motion: how they were moved.
        correlation: of every coordinate with that of the anchor over the entities, `[d]`, before signs.
    """

    params: Params
    motion: Motion
    correlation: Float[np.ndarray, " d"]


def coordinate_spec(params: Params) -> PermutationSpec:
    """The symmetry of a model's rows as data: the last axis of all parts is one group.

    Example:
        >>> order = random_permutations(coordinate_spec(params), key)
        >>> same = permute(coordinate_spec(params), order, params)
    """
    leaves = {name: tuple(part.shape) for name, part in tree.flatten(params).items()}
    size = next(iter(leaves.values()))[-1]
    axes = {name: (*map(Fixed, shape[:-1]), Of(COORDINATE)) for name, shape in leaves.items()}
    found = tuple(Leaf(name, shape, axes[name], "weight") for name, shape in leaves.items())
    return PermutationSpec((Group(COORDINATE, size, ()),), found)


def move(family: Family, params: Params, motion: Motion) -> Params:
    """Permute, turn and shift coordinates so that all scores stay as they are.

    Args:
        family: of the model.
        params: its rows.
        motion: how to move them.

    Raises:
        ValueError: a family with other symmetries, or a sign or shift that is none of this family.
    """
    _check(family, motion)
    rows = permute(coordinate_spec(params), {COORDINATE: motion.permutation}, params)
    sign, shift = (jnp.asarray(x, jnp.float32)[None] for x in (motion.sign, motion.shift))
    if isinstance(family, Distmult):
        return {**rows, "entity": {"scale": rows["entity"]["scale"] * sign}}
    if not isinstance(family, _WITH_MEANS):
        return rows
    entity = {**rows["entity"], "mean": rows["entity"]["mean"] * sign + shift}
    if "slopes" in entity:
        entity["slopes"] = jnp.where(sign[:, None] < 0, entity["slopes"][:, ::-1], entity["slopes"])
    moved = 1 - family.relation(rows["relation"]).get("scale", jnp.ones_like(rows["relation"]["shift"]))
    relation = {**rows["relation"], "shift": rows["relation"]["shift"] * sign + shift * moved}
    return {"entity": entity, "relation": relation}


def align_coordinates(
    family: Family, anchor: Params, other: Params, *, signed: bool = True, solver: Solver = "auto"
) -> Aligned:
    """Move the coordinates of a model to where they agree best with an anchor's.

    The permutation maximises the sum of absolute correlations of coordinates over the entities; then come the signs of
    the correlations, then the shift that makes means equal on average.

    Args:
        family: of both models.
        anchor: rows of the model that stays.
        other: rows of a model of the same entities, in the same order.
        signed: whether signs may change; a control where they may not.
        solver: of the assignment.

    Raises:
        ValueError: a family with other symmetries, or rows of other shapes.

    Example:
        >>> aligned = align_coordinates(Nfe1(64), first, second)
        >>> mean = average_tables(family, [first, aligned.params])
    """
    tree.check_same_structure([anchor, other])
    still = Motion(np.arange(family.dimension), np.ones(family.dimension), np.zeros(family.dimension))
    _check(family, still)
    fixed, free = (_features(family, params) for params in (anchor, other))
    correlations = _standard(fixed).T @ _standard(free)
    turns = signed and not isinstance(family, Nfe1Sigma)
    permutation = np.asarray(solve(np.abs(correlations) if turns else correlations, solver))
    found = correlations[np.arange(family.dimension), permutation]
    sign = np.where(found < 0, -1.0, 1.0) if turns else still.sign
    shift = still.shift
    if isinstance(family, _WITH_MEANS):
        shift = fixed.mean(axis=0) - sign * free.mean(axis=0)[permutation]
    motion = Motion(permutation, sign, shift)
    return Aligned(move(family, other, motion), motion, found)


def average_tables(family: Family, models: Sequence[Params]) -> Params:
    """The mean of rows, each model in its canonical form.

    Raises:
        ValueError: no model, or models of unlike shapes.
    """
    return tree.average([canonical(family, params) for params in models])


def canonical(family: Family, params: Params) -> Params:
    """The same model without the signs that mean nothing: those of slopes, and of deviations."""
    if isinstance(family, Nfe1Sigma):
        return jax.tree.map(jnp.abs, params)
    if "slopes" not in params["entity"]:
        return params
    return {**params, "entity": {**params["entity"], "slopes": jnp.abs(params["entity"]["slopes"])}}


def _features(family: Family, params: Params) -> Float[np.ndarray, "entities d"]:
    """What coordinates are compared by."""
    rows = canonical(family, params)["entity"]
    return np.asarray(rows["mean" if isinstance(family, _WITH_MEANS) else "scale"], np.float64)


def _standard(x: Float[np.ndarray, "entities d"]) -> Float[np.ndarray, "entities d"]:
    """Columns of mean 0 and length 1; constant ones become 0."""
    centred = x - x.mean(axis=0)
    length = np.linalg.norm(centred, axis=0)
    return centred / np.where(length > 0, length, 1.0)


def _check(family: Family, motion: Motion) -> None:
    name = type(family).__name__
    if not isinstance(family, _ALIGNED):
        known = ", ".join(cls.__name__ for cls in _ALIGNED)
        raise ValueError(f"coordinates of {name} have more symmetries than order and sign; it can be done for {known}.")
    if not isinstance(family, _WITH_MEANS) and np.any(np.asarray(motion.shift)):
        raise ValueError(f"scores of {name} change when its coordinates are shifted; give a shift of 0.")
    if isinstance(family, Nfe1Sigma) and np.any(np.asarray(motion.sign) < 0):
        raise ValueError(f"coordinates of {name} are deviations, which have no sign; give signs of 1.")
