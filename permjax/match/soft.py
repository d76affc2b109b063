"""Soft permutations: doubly stochastic matrices in place of index arrays, and their action on a model.

A soft permutation of a spec holds matrices for every group: how much of source unit `j` target unit `i` takes. A group
D per H has one matrix for every pair of a target and a source unit of H, so that changing the order of H does not mix
up what is known of D: `out[h, d] = sum_{h', d'} X_H[h, h'] X_D[h, h', d, d'] in[h', d']`. The action is linear in the
matrices of every single place where a group stands.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from permjax import tree
from permjax.match.assignment import Solver, solve
from permjax.permutation import Permutations, as_matrix, outer_first, validate
from permjax.symmetry.blocks import Block, extract, leaf_blocks
from permjax.symmetry.spec import PermutationSpec

Soft: TypeAlias = dict[str, Any]
"""Group name -> matrices `[*outer, n, n]`; `outer` counts pairs of units of free groups that index it, target first."""


def soft_shape(spec: PermutationSpec, group: str) -> tuple[int, ...]:
    """Return the shape of a group's matrices: two axes for each free group that indexes it, one for a fixed index."""
    outer = [n for g in spec.group(group).per for n in (spec.group(g).size,) * (2 if g in spec else 1)]
    return (*outer, *(spec.group(group).size,) * 2)


def from_permutations(spec: PermutationSpec, permutations: Mapping[str, Any]) -> Soft:
    """Return hard permutations as matrices; pairs of outer units that are not matched have the target's."""
    validate(spec, permutations)
    return {g.name: _paired(spec, g.name, jnp.asarray(as_matrix(permutations[g.name]))) for g in spec.groups}


def barycentre(spec: PermutationSpec) -> Soft:
    """Return the centre of all permutations: every unit takes equal parts of all."""
    return {g.name: jnp.full(soft_shape(spec, g.name), 1 / g.size, jnp.float32) for g in spec.groups}


def rounded(spec: PermutationSpec, soft: Mapping[str, Any], solver: Solver = "auto") -> Permutations:
    """Return the permutations nearest to concrete matrices, outer groups first: `max_p <P, X>`."""
    found: Permutations = {}
    for group in outer_first(spec):
        rows = _matched(spec, group, np.asarray(soft[group]), found)
        found[group] = np.asarray(solve(rows, solver=solver, what=f"the soft permutation of group '{group}'"))
    return {g.name: found[g.name] for g in spec.groups}


def soft_permute(spec: PermutationSpec, soft: Mapping[str, Any], params: Any) -> Any:
    """Apply a soft permutation to a model, differentiable in both; equals `permute` where the matrices are hard.

    Args:
        spec: the symmetry.
        soft: group -> matrices, see `Soft`.
        params: pytree with the spec's leaf names and shapes; leaves of integers may not carry groups.

    Raises:
        ValueError: leaves do not fit the spec, or an integer leaf would be mixed.
    """
    named = tree.flatten(params)
    spec.validate({name: np.shape(leaf) for name, leaf in named.items()}, "params")
    return tree.unflatten(params, {name: _mixed_leaf(spec, name, soft, leaf) for name, leaf in named.items()})


def mix(block: Block, soft: Mapping[str, Any], value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply a soft permutation to the entries of a block, in the block's shape."""
    fresh = count(value.ndim)
    target = [next(fresh) if name in soft else axis for axis, name in enumerate(block.names)]
    operands: list[Any] = [value, list(range(value.ndim))]
    for axis, name in enumerate(block.names):
        if name in soft:
            pairs = [(target[j], j) if g in soft else (j,) for g, j in block.beside[axis]]
            labels = [*(label for pair in pairs for label in pair), target[axis], axis]
            operands += [soft[name].astype(value.dtype), labels]
    return jnp.einsum(*operands, target, precision=jax.lax.Precision.HIGHEST)


def _mixed_leaf(spec: PermutationSpec, name: str, soft: Mapping[str, Any], leaf: Any) -> Any:
    blocks = [block for block in leaf_blocks(spec, spec.leaf(name)) if any(n in soft for n in block.names)]
    if not blocks:
        return leaf
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(f"leaf '{name}' of dtype {leaf.dtype} carries groups and cannot be mixed; make it a float.")
    result = leaf
    for block in blocks:
        entries = mix(block, soft, extract(block, leaf)).astype(leaf.dtype)
        sizes = [len(pick) for pick in block.picks]
        if sizes == list(leaf.shape):
            return entries.reshape(leaf.shape)
        result = result.at[np.ix_(*(np.asarray(pick) for pick in block.picks))].set(entries.reshape(sizes))
    return result


def _paired(spec: PermutationSpec, group: str, matrices: Array) -> Array:
    """Repeat `[*per, n, n]` over the source units of the free groups among `per`."""
    axis = 0
    for outer in spec.group(group).per:
        axis += 1
        if outer in spec:
            matrices = jnp.repeat(jnp.expand_dims(matrices, axis), spec.group(outer).size, axis=axis)
            axis += 1
    return matrices


def _matched(spec: PermutationSpec, group: str, matrices: np.ndarray, found: Permutations) -> np.ndarray:
    """Keep, of the pairs of outer units, those that are matched: `[*per, n, n]`."""
    per = spec.group(group).per
    for axis, outer in enumerate(per, 1):
        if outer in spec:
            own = (*spec.group(outer).per, outer)
            rows = found[outer].transpose([own.index(g) for g in per[:axis] if g in own])
            shape = [spec.group(g).size if g in own else 1 for g in per[:axis]]
            index = rows.reshape([*shape, *[1] * (matrices.ndim - len(shape))])
            matrices = np.take_along_axis(matrices, index, axis=axis).squeeze(axis)
    return matrices
