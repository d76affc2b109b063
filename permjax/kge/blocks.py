"""Scores of a large entity table, block of rows by block of rows, in the forward and in the backward pass.

Keys of a whole table, and the gradient with respect to them, would each take as much memory as the table itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.kge.base import Family, Linear, Point
from permjax.kge.models import product

_ON_CPU, _ELSEWHERE = 1 << 20, 1 << 24
"""Numbers in the keys of a block: on a CPU it stays in the cache between being made and being used."""


def against_table(
    family: Family, table: dict[str, Array], x: Point, block: int | None = None
) -> Float[Array, "n entities"]:
    """The similarity of moved heads with every entity, without gamma; `against_all` with less memory.

    Args:
        family: the family.
        table: the rows of all entities.
        x: moved heads.
        block: how many numbers the keys of a block of rows may have; by default what suits the device.
    """
    query = family.query(x)
    block = block or (_ON_CPU if jax.default_backend() == "cpu" else _ELSEWHERE)
    rows = max(block // query.vector.shape[-1], 1)
    if len(jax.tree.leaves(table)[0]) <= rows:
        return _scores(family, table, query)
    return _in_blocks(family, rows, table, query)


def _scores(family: Family, rows: dict[str, Array], query: Linear) -> Float[Array, "n rows"]:
    return product(query, family.key(family.entity(rows)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(family: Family, size: int, table: dict[str, Array], query: Linear) -> Float[Array, "n entities"]:
    count = len(jax.tree.leaves(table)[0])

    def one(scores: Array, number: Array) -> tuple[Array, None]:
        start = jnp.minimum(number * size, count - size)
        block = _scores(family, _rows(table, start, size), query)
        return jax.lax.dynamic_update_slice_in_dim(scores, block, start, axis=1), None

    empty = jnp.zeros((len(query.bias), count), query.vector.dtype)
    return jax.lax.scan(one, empty, jnp.arange(-(-count // size)))[0]


def _forward(family: Family, size: int, table: dict[str, Array], query: Linear) -> tuple[Array, Any]:
    return _in_blocks(family, size, table, query), (table, query)


def _backward(family: Family, size: int, kept: Any, cotangent: Float[Array, "n entities"]) -> tuple[Any, Any]:
    """Gradients of the table and of the queries.

    The last block comes first: it starts among the rows of the one before, which that one then overwrites.
    """
    table, query = kept
    count = cotangent.shape[1]

    def one(total: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], None]:
        of_table, of_query = total
        start = jnp.minimum(number * size, count - size)
        _, pull = jax.vjp(functools.partial(_scores, family), _rows(table, start, size), query)
        own = start + jnp.arange(size) >= number * size
        slopes = jax.lax.dynamic_slice_in_dim(cotangent, start, size, axis=1)
        of_rows, more = pull(jnp.where(own[None], slopes, 0))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return (jax.tree.map(put, of_table, of_rows), jax.tree.map(jnp.add, of_query, more)), None

    empty = jax.tree.map(jnp.zeros_like, (table, query))
    return jax.lax.scan(one, empty, jnp.arange(-(-count // size)), reverse=True)[0]


_in_blocks.defvjp(_forward, _backward)


def _rows(table: dict[str, Array], start: Array, size: int) -> dict[str, Array]:
    return {part: jax.lax.dynamic_slice_in_dim(values, start, size) for part, values in table.items()}
