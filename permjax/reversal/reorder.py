"""Semantic-aware permutation on the device: the units of each document in original, reversed or random order."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from permjax.permutation import is_traced
from permjax.reversal.layout import Batch, changes, document_starts, over_rows
from permjax.reversal.layout_checks import check_batch

ORDERS = ("original", "reversed", "random")
"""The orders by their numbers."""
ORIGINAL, REVERSED, RANDOM = range(3)
THIRDS = (1 / 3, 1 / 3, 1 / 3)
STAYING = ("doc_ids", "example_ids", "positions", "position_ids")
"""Entries of a batch that belong to places and documents, not to tokens."""

_MOST_UNITS = 1 << 16  # the place of a unit, and the number of its block, have 16 bits when units are sorted


class Permuted(NamedTuple):
    """A batch in which units have moved.

    Attributes:
        batch: like the one given.
        index: the place in the row from which each token came, int32 [*rows, t].
        orders: the number in `ORDERS` of each document's order, int32 [*rows, documents]; -1 where a row has fewer.
        surplus: by how many units each row exceeds the maximum, int32 [*rows]; the first document that does not fit,
            and those after it, are left in their original order.
    """

    batch: dict[str, Any]
    index: Int[Array, "*rows t"]
    orders: Int[Array, "*rows documents"]
    surplus: Int[Array, "*rows"]


def permute_units(
    key: Array,
    batch: Batch,
    probs: Sequence[float | int] = THIRDS,
    *,
    max_units: int,
    tag_ids: Sequence[int] | None = None,
) -> Permuted:
    """Bring the units of each document into an order that is drawn for it.

    Pinned tokens and padding keep their places, and units move between them: a document with BOS and EOS pinned is
    permuted inside. Nothing depends on the row or on the neighbours of a document: an order is a function of the key,
    the `example_ids` and the units. Fold the epoch into the key: `jax.random.fold_in(key, epoch)`.

    Args:
        key: a typed key.
        batch: see `permjax.reversal.layout`; arrays by token move together, but for those in `STAYING`.
        probs: of the original, the reversed and a uniformly random order. The paper says "with a certain probability";
            equal thirds are our reading of it.
        max_units: the most units in a row, all its documents together.
        tag_ids: three tokens that name the orders. A document that carries one of them in its place, as after BOS,
            gets the one of its order; these tokens are pinned.

    Raises:
        ValueError: probabilities that are none, `max_units` out of bounds, or a batch that `check_batch` refuses.
            Under a trace the values of the batch are not known and not checked; what does not fit is counted in
            `surplus`.

    Example:
        >>> row = {"tokens": jnp.arange(6), "doc_ids": jnp.zeros(6, int), "unit_ids": jnp.array([0, 0, 1, 2, 2, 2])}
        >>> row["example_ids"] = jnp.array([7])
        >>> permute_units(jax.random.key(0), row, (0, 1, 0), max_units=4).batch["tokens"]
        Array([3, 4, 5, 2, 0, 1], dtype=int32)

    Source: Guo et al., Findings of ACL 2024, section 3: the order of chunks of a sentence. Here units, not tokens, are
    sorted, and ties of random keys are broken by the index of the unit.
    """
    edges = order_edges(probs)
    if not 0 < max_units < _MOST_UNITS:
        raise ValueError(f"'max_units' is {max_units}; give 1 to {_MOST_UNITS - 1}.")
    if not is_traced(*jax.tree.leaves(dict(batch))):
        check_batch(batch, max_units, tag_ids)
    tags = None if tag_ids is None else np.asarray(tag_ids, np.int32)
    return _permute(key, dict(batch), np.asarray(edges, np.float32), tags, max_units=max_units)


@functools.partial(jax.jit, static_argnames="max_units")
def _permute(
    key: Array, batch: Batch, edges: Float[Array, " 2"], tags: Int[Array, " 3"] | None, *, max_units: int
) -> Permuted:
    tokens, doc_ids, unit_ids, examples = (batch[name] for name in ("tokens", "doc_ids", "unit_ids", "example_ids"))
    pinned = batch.get("pinned", jnp.zeros(tokens.shape, bool))
    pinned = pinned if tags is None else pinned | jnp.isin(tokens, tags)
    draw = functools.partial(_row, key, edges=edges, max_units=max_units)
    found = over_rows(draw, tokens.ndim)(doc_ids, unit_ids, examples, pinned)
    moved = reorder(batch, found.index)
    if tags is not None:
        tag = over_rows(functools.partial(_tagged, tags), tokens.ndim)
        moved["tokens"] = tag(moved["tokens"], doc_ids, found.orders)
    return Permuted(moved, *found)


def reorder(batch: Batch, index: Int[Array, "*rows t"]) -> dict[str, Any]:
    """Take the tokens of each row from the given places, and with them all arrays by token but for `STAYING`."""

    def take(leaf: Any) -> Any:
        if jnp.shape(leaf)[: index.ndim] != index.shape:
            return leaf
        gather = over_rows(lambda row, index: row.at[index].get(mode="promise_in_bounds"), index.ndim)
        return gather(jnp.asarray(leaf), index)

    return {name: leaf if name in STAYING else jax.tree.map(take, leaf) for name, leaf in batch.items()}


def inverse(index: Int[Array, "*rows t"]) -> Int[Array, "*rows t"]:
    """The index that undoes another one: after `reorder` by both, every token is back."""
    return jnp.argsort(index, axis=-1).astype(jnp.int32)


def order_edges(probs: Sequence[float | int]) -> tuple[float, float]:
    """Where [0, 1) is cut for the three orders.

    Raises:
        ValueError: there are not three probabilities, one is negative, or they do not sum to one.
    """
    found = np.asarray(probs, np.float64)
    if found.shape != (3,) or not (found >= 0).all() or abs(found.sum() - 1) > 1e-6:
        message = f"The probabilities of the orders {', '.join(ORDERS)} are {tuple(probs)}; "
        raise ValueError(message + "give three numbers from 0 on that sum to one.")
    ends = np.cumsum(found)
    return float(ends[0] / ends[2]), float(ends[1] / ends[2])


class _Drawn(NamedTuple):
    index: Int[Array, " t"]
    orders: Int[Array, " documents"]
    surplus: Int[Array, ""]


class _Units(NamedTuple):
    """The units of a row as they stand; those that are not there come last, with length 0."""

    at: Int[Array, " units"]  # place in the row
    length: Int[Array, " units"]
    document: Int[Array, " units"]


def _row(
    key: Array,
    doc_ids: Int[Array, " t"],
    unit_ids: Int[Array, " t"],
    example_ids: Int[Array, " n"],
    pinned: Bool[Array, " t"],
    *,
    edges: Float[Array, " 2"],
    max_units: int,
) -> _Drawn:
    """The permutation of one row."""
    t = len(doc_ids)
    place = jnp.arange(t, dtype=jnp.int32)
    starts = document_starts(doc_ids)
    free = (doc_ids >= 0) & ~pinned
    begins = free & (changes(unit_ids) | starts | changes(free))
    unit = jnp.cumsum(begins, dtype=jnp.int32) - 1
    at = _scatter(jnp.full(max_units + 1, t, jnp.int32), begins, unit, place)
    surplus_document = _take(doc_ids, at[-1], t)  # the first with a unit too many
    free &= doc_ids < surplus_document
    units = _units(doc_ids, free, begins, unit, at[:-1])
    ids = example_ids
    if len(example_ids) == t:
        ids = _scatter(jnp.zeros(max_units, example_ids.dtype), starts, doc_ids, example_ids)
    keys = jax.vmap(lambda example: jax.random.fold_in(key, example))(ids)
    orders = _orders(keys, edges)
    shift = _shift(units, keys, orders)
    destination = place + jnp.where(free, _take(shift, unit, 0), 0)
    index = jnp.zeros(t, jnp.int32).at[destination].set(place, unique_indices=True)
    column = jnp.arange(len(ids), dtype=jnp.int32)
    orders = jnp.where(column < surplus_document, orders, ORIGINAL)
    orders = jnp.where(column <= doc_ids.max(), orders, -1)
    return _Drawn(index, orders, jnp.maximum(unit[-1] + 1 - max_units, 0))


def _units(doc_ids: Array, free: Array, begins: Array, unit: Array, at: Array) -> _Units:
    t = len(free)
    there = _take(free, at, False)
    ends = free & (jnp.roll(begins, -1) | ~jnp.roll(free, -1)).at[-1].set(True)
    end = _scatter(jnp.zeros_like(at), ends, unit, jnp.arange(1, t + 1, dtype=jnp.int32))
    return _Units(jnp.where(there, at, t), jnp.where(there, end - at, 0), jnp.where(there, _take(doc_ids, at, t), t))


def _orders(keys: Array, edges: Array) -> Int[Array, " documents"]:
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys)
    return (draw >= edges[0]).astype(jnp.int32) + (draw >= edges[1]).astype(jnp.int32)


def _shift(units: _Units, keys: Array, orders: Array) -> Int[Array, " units"]:
    """How many places each unit moves within its block, a stretch of one document between pinned tokens."""
    n = jnp.arange(len(units.at), dtype=jnp.int32)
    other = changes(units.document)
    gap = units.at != jnp.roll(units.at + units.length, 1)
    block = jnp.cumsum(other | gap, dtype=jnp.uint32)
    first_unit = _scatter(jnp.zeros(len(keys), jnp.int32), other, units.document, n)
    order = _sorted(block, _sort_keys(units, n - _take(first_unit, units.document, 0), keys, orders))
    first, length = jnp.cumsum(units.length) - units.length, units.length[order]
    return jnp.zeros_like(n).at[order].set(jnp.cumsum(length) - length, unique_indices=True) - first


def _sorted(block: UInt32[Array, " units"], keys: UInt32[Array, " units"]) -> Int[Array, " units"]:
    """The units by block, then by key, then by place.

    XLA sorts numbers several times faster than tuples, so these are sorted digit by digit, the least significant first,
    each digit with the place so far in its low bits.
    """
    bits = len(keys).bit_length()  # of a place, and of a block
    width = 32 - bits
    low, high = keys & (2**width - 1), keys >> width
    digits = (low, high | block << bits) if 2 * bits <= width else (low, high, block)
    place = jnp.arange(len(keys), dtype=jnp.uint32)
    order = jnp.arange(len(keys), dtype=jnp.int32)
    for digit in digits:
        packed = jnp.sort(digit[order] << bits | place)
        order = order[(packed & (2**bits - 1)).astype(jnp.int32)]
    return order


def _sort_keys(units: _Units, number: Array, keys: Array, orders: Array) -> UInt32[Array, " units"]:
    """What to sort the units of a block by."""
    own = jnp.minimum(units.document, len(keys) - 1)
    draw = jax.vmap(lambda key, n: jax.random.bits(jax.random.fold_in(key, n + 1)))(keys[own], number)
    up = number.astype(jnp.uint32)
    order = orders[own]
    return jnp.where(order == ORIGINAL, up, jnp.where(order == REVERSED, ~up, draw))


def _tagged(tags: Array, tokens: Array, doc_ids: Array, orders: Array) -> Array:
    """Write the tag of its document's order wherever one of the tags stands."""
    return jnp.where(
        jnp.isin(tokens, tags) & (doc_ids >= 0), tags[_take(orders, doc_ids, 0)].astype(tokens.dtype), tokens
    )


def _scatter(into: Array, flags: Bool[Array, " t"], at: Int[Array, " t"], values: Array) -> Array:
    """Put the values that are flagged at their places; what lies behind the end is dropped."""
    return into.at[jnp.where(flags, at, len(into))].set(values, mode="drop")


def _take(values: Array, at: Array, fill: int) -> Array:
    """`values[at]`, and `fill` behind the end."""
    return jnp.take(values, at, mode="fill", fill_value=fill)
