"""Permutations: the group of a spec as a dictionary of index arrays.

Convention (gather): `perm[g][i]` is the index of the source unit placed at position `i`. A group D `per` H has one
row for each unit of H, indexed by the target: `out[h, d] = in[pH[h], pD[h, d]]`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeAlias
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from permjax.symmetry.spec import PermutationSpec

Permutations: TypeAlias = dict[str, Any]
"""Group name -> int32 array of shape `per sizes + (n,)`, NumPy or JAX."""


def identity(spec: PermutationSpec) -> Permutations:
    """Return the neutral element: every unit stays in its place.

    Returns:
        Group name -> int32 array `[*per, n]` (NumPy) whose rows are 0..n-1.
    """
    return {g.name: _rows(spec, g.name) for g in spec.groups}


def random_permutations(spec: PermutationSpec, key: jax.Array) -> Permutations:
    """Draw every group's permutation uniformly and independently.

    The draw of a group depends on the key and the group's name only, not on other groups.

    Returns:
        Group name -> int32 array `[*per, n]`.
    """
    return {
        g.name: jax.random.permutation(
            jax.random.fold_in(key, crc32(g.name.encode())),
            jnp.asarray(_rows(spec, g.name)),
            axis=-1,
            independent=True,
        )
        for g in spec.groups
    }


def compose(spec: PermutationSpec, p: Mapping[str, Any], q: Mapping[str, Any]) -> Permutations:
    """Return the permutation that acts by `q` first, then by `p`.

    `rH = qH[pH]` and `rD[h, d] = qD[pH[h], pD[h, d]]`, so `permute(r, x) == permute(p, permute(q, x))`.
    """
    validate(spec, p)
    validate(spec, q)
    xp = namespace(*p.values(), *q.values())
    return {g.name: xp.asarray(q[g.name])[(*_outer(spec, p, g.name), p[g.name])] for g in spec.groups}


def invert(spec: PermutationSpec, p: Mapping[str, Any]) -> Permutations:
    """Return the inverse: `iH = argsort(pH)` and `iD[h] = argsort(pD[iH[h]])`."""
    validate(spec, p)
    xp = namespace(*p.values())
    inverse: Permutations = {}
    for name in outer_first(spec):
        rows = xp.asarray(p[name])[tuple(i[..., 0] for i in _outer(spec, inverse, name))]
        inverse[name] = xp.argsort(rows, axis=-1).astype(xp.int32)
    return {g.name: inverse[g.name] for g in spec.groups}


def validate(spec: PermutationSpec, p: Mapping[str, Any]) -> None:
    """Check that `p` holds one bijection of the right shape for every group of the spec.

    Traced arrays (under `jit`, `vmap`, `grad`) have no values yet: of them only names, shapes and dtypes are checked.

    Raises:
        ValueError: names the group, and the index that is out of range or repeated.
    """
    names = {g.name for g in spec.groups}
    if set(p) != names:
        missing, extra = sorted(names - set(p)), sorted(set(p) - names)
        raise ValueError(f"permutations do not match the spec's groups: missing {missing}, unknown {extra}.")
    for group in spec.groups:
        _validate_one(group.name, p[group.name], spec.shape(group.name))


def as_matrix(permutation: Int[Array | np.ndarray, "*per n"], dtype=np.float32) -> Array | np.ndarray:
    """Return P with `P[i, perm[i]] = 1`, so `P @ x` gathers: `(P @ x)[i] = x[perm[i]]`. Shape `[*per, n, n]`."""
    xp = namespace(permutation)
    n = permutation.shape[-1]
    units = xp.arange(n, dtype=permutation.dtype).reshape((1,) * permutation.ndim + (n,))
    return (permutation[..., None] == units).astype(dtype)


def outer_first(spec: PermutationSpec) -> list[str]:
    """Return the group names in an order in which every group follows the groups that it is `per`."""
    return [g.name for g in sorted(spec.groups, key=lambda g: len(g.per))]


def namespace(*arrays: Any) -> ModuleType:
    """Return `jax.numpy` if any array is a JAX array, else `numpy`."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def is_traced(*arrays: Any) -> bool:
    """Tell whether any array is abstract, as under `jit`, `vmap` or `grad`."""
    return any(isinstance(a, Tracer) for a in arrays)


def _rows(spec: PermutationSpec, name: str) -> np.ndarray:
    shape = spec.shape(name)
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape).copy()


def _outer(spec: PermutationSpec, p: Mapping[str, Any], name: str) -> tuple:
    """Return `p` of every group that `name` is per, as index arrays that broadcast against `p[name]`."""
    per = spec.group(name).per
    found = []
    for outer in per:
        rows = p[outer] if outer in spec else np.arange(spec.group(outer).size, dtype=np.int32)
        own = (*spec.group(outer).per, outer)
        shape = [spec.group(g).size if g in own else 1 for g in per]
        found.append(rows.transpose([own.index(g) for g in per if g in own]).reshape((*shape, 1)))
    return tuple(found)


def _validate_one(name: str, rows: Any, shape: tuple[int, ...]) -> None:
    if not hasattr(rows, "dtype") or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"permutation of group '{name}' must be an integer array, not {type(rows).__name__}.")
    if tuple(rows.shape) != shape:
        raise ValueError(f"permutation of group '{name}' has shape {tuple(rows.shape)}, the spec expects {shape}.")
    if is_traced(rows):
        return
    values = np.asarray(rows).reshape(-1, shape[-1])
    if values.size and (values.min() < 0 or values.max() >= shape[-1]):
        bad = values[(values < 0) | (values >= shape[-1])][0]
        raise ValueError(f"permutation of group '{name}' holds {bad}, outside 0..{shape[-1] - 1}.")
    for row in values:
        counts = np.bincount(row, minlength=shape[-1])
        if (counts != 1).any():
            twice = int(np.argmax(counts))
            raise ValueError(
                f"permutation of group '{name}' is no bijection: {twice} appears {counts[twice]} times, "
                f"{int(np.argmin(counts))} never."
            )
