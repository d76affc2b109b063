"""What matching maximises, in pieces: inner products and Gram matrices of blocks, and the places of a group in them."""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax.permutation import namespace
from permjax.symmetry.blocks import Block
from permjax.symmetry.spec import PermutationSpec


class Term(NamedTuple):
    """One appearance of a root group in a block: what is solved for there, and what is held.

    Attributes:
        block: index of the block.
        batch: axes of groups that are held but index a free one.
        free: the axis of the root, then those of the groups below it.
        held: roots of all other groups in the block, on whose place this term depends.
        size: number of entries.
    """

    block: int
    batch: tuple[int, ...]
    free: tuple[int, ...]
    held: frozenset[str]
    size: int


def inner(a: Any, b: Any) -> Any:
    """Return the inner product of two blocks in float64; JAX arrays need `jax.enable_x64`."""
    if isinstance(a, np.ndarray):
        axes = list(range(a.ndim))
        return np.einsum(a, axes, b, axes, [], dtype=np.float64)
    return jnp.vdot(a.astype(jnp.float64), b.astype(jnp.float64))


def gram(a: Any, b: Any, batch: tuple[int, ...], free: tuple[int, ...]) -> Any:
    """Return `sum_rest a[batch, i, rest] b[batch, j, rest]`, shape `[*batch, *free of a, *free of b]`."""
    rest = tuple(i for i in range(a.ndim) if i not in (*batch, *free))
    sizes = [[a.shape[i] for i in axes] for axes in (batch, free)]

    def rows(x: Any) -> Any:
        return x.transpose(*batch, *free, *rest).reshape(*sizes[0], prod(sizes[1]), -1)

    a, b = rows(a), rows(b).swapaxes(-1, -2)
    found = a @ b if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return found.reshape(*sizes[0], *sizes[1], *sizes[1])


def bend(a: Any, b: Any, batch: tuple[int, ...], pair: tuple[int, int]) -> Any:
    """Return what swapping units `i` and `j` on two axes at once adds to the gains of swapping them on each.

    A swap is `1 - d d^T` with `d = e_i - e_j`, so the cross term is `sum_rest (d^T a d) (d^T b d)`; `[*batch, n, n]`.
    """
    rest = tuple(i for i in range(a.ndim) if i not in (*batch, *pair))

    def second(x: Any) -> Any:
        x = x.transpose(*rest, *batch, *pair)
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
    others = [name for i, name in enumerate(block.names) if i not in free and name in spec]
    held = frozenset().union(*(roots(spec, name) for name in others))
    return Term(index, tuple(batch), free, held, prod(block.shape))
