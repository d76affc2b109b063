"""What matching maximises, in pieces: inner products and Gram matrices of blocks, and the places of a group in them."""

from collections.abc import Iterator
from functools import reduce
from itertools import product
from math import fsum, prod
from operator import iadd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax.permutation import namespace
from permjax.symmetry.blocks import Block
from permjax.symmetry.spec import PermutationSpec

_RUN = 1 << 13  # entries of a NumPy block that are widened to float64 at a time
_SLAB = 1 << 22  # the same for matrix products, or as many as the product has


class Term(NamedTuple):
    """One appearance of a root group in a block: what is solved for there, and what is held.

    Attributes:
        block: index of the block.
        batch: axes of groups that are held but index a free one.
        free: the axis of the root, then those of the groups below it.
        held: roots of all other groups in the block, on whose place this term depends.
        apart: whether no held axis is indexed by a free one, so that they can be permuted separately.
        size: number of entries.
    """

    block: int
    batch: tuple[int, ...]
    free: tuple[int, ...]
    held: frozenset[str]
    apart: bool
    size: int


def inner(a: Any, b: Any) -> Any:
    """Return the inner product of two blocks in float64; JAX arrays need `jax.enable_x64`."""
    if isinstance(a, np.ndarray):
        axes = list(range(a.ndim))
        return np.einsum(a, axes, b, axes, [], dtype=np.float64)  # widens a few thousand entries at a time
    return jnp.vdot(a.astype(jnp.float64), b.astype(jnp.float64))


def gap(a: Any, b: Any) -> Any:
    """Return the squared distance of two blocks in float64; JAX arrays need `jax.enable_x64`."""
    if isinstance(a, np.ndarray):
        a, b = a.reshape(-1), b.reshape(-1)
        parts = (slice(start, start + _RUN) for start in range(0, a.size, _RUN))
        return fsum(np.square(a[part].astype(np.float64) - b[part].astype(np.float64)).sum() for part in parts)
    return jnp.square(a.astype(jnp.float64) - b.astype(jnp.float64)).sum()


def gram(a: Any, b: Any, batch: tuple[int, ...], free: tuple[int, ...]) -> Any:
    """Return `sum_rest a[batch, i, rest] b[batch, j, rest]`, shape `[*batch, *free of a, *free of b]`.

    In float32 or wider; of large NumPy blocks only a part is widened at a time.
    """
    rest = tuple(i for i in range(a.ndim) if i not in (*batch, *free))
    last = a.ndim - 1 in free  # the layout in which the axis that runs fastest stays last
    order = (*batch, *rest, *free) if last else (*batch, *free, *rest)
    sizes = [[a.shape[i] for i in axes] for axes in (batch, free)]
    many = prod(sizes[1])

    def rows(x: Any) -> Any:
        x = _widened(x.transpose(order))
        return x.reshape(*sizes[0], -1, many).swapaxes(-1, -2) if last else x.reshape(*sizes[0], many, -1)

    if isinstance(a, np.ndarray):
        found = reduce(iadd, (rows(x) @ rows(y).swapaxes(-1, -2) for x, y in _slabs(a, b, rest, max(many**2, _SLAB))))
    else:
        found = jnp.matmul(rows(a), rows(b).swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)
    return found.reshape(*sizes[0], *sizes[1], *sizes[1])


def _slabs(a: np.ndarray, b: np.ndarray, rest: tuple[int, ...], most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of two blocks of `most` entries or so, cut along the longest of the axes that are summed over."""
    if a.size <= most or not rest:
        yield a, b
        return
    axis = max(rest, key=lambda i: a.shape[i])
    step = max(a.shape[axis] * most // a.size, 1)
    for start in range(0, a.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        yield a[part], b[part]


def _widened(x: Any) -> Any:
    if x.dtype.itemsize >= 4:
        return x
    return np.ascontiguousarray(x, np.float32) if isinstance(x, np.ndarray) else x.astype(np.float32)


def bend(a: Any, b: Any, batch: tuple[int, ...], pair: tuple[int, int]) -> Any:
    """Return what swapping units `i` and `j` on two axes at once adds to the gains of swapping them on each.

    A swap is `1 - d d^T` with `d = e_i - e_j`, so the cross term is `sum_rest (d^T a d) (d^T b d)`; `[*batch, n, n]`.
    """
    rest = tuple(i for i in range(a.ndim) if i not in (*batch, *pair))

    def second(x: Any) -> Any:
        x = _widened(x.transpose(*rest, *batch, *pair))
        own = namespace(x).diagonal(x, axis1=-2, axis2=-1)
        return own[..., :, None] + own[..., None, :] - x - x.swapaxes(-1, -2)

    return (second(a) * second(b)).sum(tuple(range(len(rest))))


def roots(spec: PermutationSpec, group: str) -> frozenset[str]:
    """Return the groups above a group that are themselves per no free group; a group alone is its own root."""
    above = frozenset(g for g in spec.group(group).per if g in spec)
    tops = frozenset(g for g in above if not any(h in spec for h in spec.group(g).per))
    return tops or frozenset({group})


def is_root(spec: PermutationSpec, group: str) -> bool:
    """Tell whether a group is per no free group."""
    return roots(spec, group) == {group}


def terms(spec: PermutationSpec, blocks: tuple[Block, ...], root: str) -> Iterator[Term]:
    """Yield every appearance of a root group in the blocks, with the groups below it that stand beside it.

    Where a group stands several times in one block, each of its places is one term in which the others are held:
    together they are the gradient of the objective, which is linear in every single place.
    """
    for index, block in enumerate(blocks):
        for axis in (i for i, name in enumerate(block.names) if name == root):
            below: dict[str, list[int]] = {}
            for i, name in enumerate(block.names):
                if (root, axis) in block.beside[i] and name in spec:
                    below.setdefault(name, []).append(i)
            for choice in product(*below.values()):
                yield _term(spec, index, block, (axis, *choice))


def growth(parts: list[tuple[int, frozenset[str]]]) -> list[str]:
    """Order groups so that each has the largest share of entries that depend on nothing but groups before it.

    Args:
        parts: size and groups of every part of the objective.
    """
    left, order = sorted({g for _, groups in parts for g in groups}), []
    mine = {g: [(size, groups - {g}) for size, groups in parts if g in groups] for g in left}

    def share(group: str) -> float:
        known = sum(size for size, others in mine[group] if others <= set(order))
        return known / max(sum(size for size, _ in mine[group]), 1)

    while left:
        order.append(max(left, key=share))
        left.remove(order[-1])
    return order


def _term(spec: PermutationSpec, index: int, block: Block, free: tuple[int, ...]) -> Term:
    batch = sorted({j for i in free for _, j in block.beside[i]} - set(free))
    others = [i for i, name in enumerate(block.names) if i not in free and name in spec]
    held = frozenset().union(*(roots(spec, block.names[i]) for i in others))
    apart = not any(j in free for i in others for _, j in block.beside[i])
    return Term(index, tuple(batch), free, held, apart, prod(block.shape))
