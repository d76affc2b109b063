"""What a row of packed documents looks like: where documents begin, which tokens may move, what is seen and foretold.

A batch is a dictionary of arrays, one row `[t]` or rows `[rows, t]`: `tokens`; `doc_ids`, the number of each token's
document in its row, 0, 1, 2 ... one after the other, and -1 for padding; `unit_ids`, which differ between neighbouring
units, and -1 where there is none; `example_ids`, which example each document is (`[rows, documents]`, or by token);
and where wanted `loss_mask`, `pinned` and any other array by token.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Batch = Mapping[str, Any]


def changes(values: Shaped[Array, " t"]) -> Bool[Array, " t"]:
    """Where a value is not the one before it; true at the first place."""
    return jnp.concatenate([jnp.ones(1, bool), values[1:] != values[:-1]])


def document_starts(doc_ids: Int[Array, " t"]) -> Bool[Array, " t"]:
    """Where a document begins."""
    return (doc_ids >= 0) & changes(doc_ids)


def positions(doc_ids: Int[Array, "*rows t"]) -> Int[Array, "*rows t"]:
    """The place of each token in its document, 0, 1, 2 ...; 0 for padding.

    Documents keep their spans when their units move, so these are the position ids before and after a permutation.
    """
    place = jnp.arange(doc_ids.shape[-1], dtype=jnp.int32)

    def row(doc_ids: Array) -> Array:
        begin = jax.lax.cummax(jnp.where(document_starts(doc_ids), place, 0))
        return jnp.where(doc_ids >= 0, place - begin, 0)

    return over_rows(row, doc_ids.ndim)(doc_ids)


def visible(
    doc_ids: Int[Array, "rows t"],
    *,
    causal: Bool[Array, " rows"] | bool = True,
    seen: Bool[Array, "rows t"] | None = None,
) -> Bool[Array, "rows t t"]:
    """What each token (second axis) may attend to (third axis): tokens of its own document.

    Args:
        doc_ids: the document of each token, -1 for padding.
        causal: whether later tokens are hidden, for all rows or row by row.
        seen: tokens that may be attended to at all; each token always sees itself if it sees nothing else.
    """
    same = doc_ids[:, :, None] == doc_ids[:, None, :]
    t = doc_ids.shape[1]
    after = ~jnp.tri(t, dtype=bool)[None]
    shown = same & ~(after & jnp.broadcast_to(jnp.asarray(causal), doc_ids.shape[:1])[:, None, None])
    return shown if seen is None else shown & (seen[:, None, :] | jnp.eye(t, dtype=bool)[None])


def next_token(batch: Batch) -> dict[str, Any]:
    """Add what a causal model is trained on: `labels`, `weights` and `positions`, each [*rows, t].

    The label of a token is the one after it in the same document, *after* any permutation, and its weight is that
    one's `loss_mask` (1 by default); the last token of a document and padding have weight 0.
    """
    doc_ids = batch["doc_ids"]
    mask = batch["loss_mask"] if "loss_mask" in batch else jnp.ones(doc_ids.shape, bool)
    last = jnp.arange(doc_ids.shape[-1]) == doc_ids.shape[-1] - 1
    follows = (doc_ids >= 0) & (doc_ids == _left(doc_ids)) & ~last.reshape((1,) * (doc_ids.ndim - 1) + (-1,))
    weights: Float[Array, "*rows t"] = jnp.where(follows, _left(mask).astype(jnp.float32), 0.0)
    return {**batch, "labels": _left(batch["tokens"]), "weights": weights, "positions": positions(doc_ids)}


def pin(batch: Batch, token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Pin the tokens of these ids (BOS, EOS, tags, role headers ...) besides those that are already pinned."""
    found = jnp.isin(batch["tokens"], jnp.asarray(token_ids, batch["tokens"].dtype))
    return {**batch, "pinned": (batch["pinned"] | found) if "pinned" in batch else found}


def pin_final(batch: Batch, token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Pin the tokens of these ids, such as full stops, where nothing but them and pinned tokens ends the document."""
    found = pin(batch, token_ids)["pinned"]

    def row(doc_ids: Array, found: Array) -> Array:
        place = jnp.arange(len(doc_ids), dtype=jnp.int32)
        ends = changes(doc_ids[::-1])[::-1]
        end = jax.lax.cummin(jnp.where(ends, place, len(doc_ids)), reverse=True)
        others = jnp.cumsum(~found)
        return found & (others == others[end])

    final = over_rows(row, found.ndim)(batch["doc_ids"], found)
    return {**batch, "pinned": (batch["pinned"] | final) if "pinned" in batch else final}


def over_rows(function: Any, axes: int) -> Any:
    """A function of rows `[t]` as one of arrays of so many axes."""
    for _ in range(axes - 1):
        function = jax.vmap(function)
    return function


def _left(x: Shaped[Array, "*rows t"]) -> Shaped[Array, "*rows t"]:
    return jnp.roll(x, -1, axis=-1)
