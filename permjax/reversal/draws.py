"""Random numbers of tokens and documents that depend on a key and on the example, never on its row or neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from permjax.reversal.layout import Batch, document_starts, over_rows, positions


def document_starts_of(doc_ids: Int[Array, " t"]) -> Int[Array, " t"]:
    """The place where each token's document begins."""
    return jnp.arange(len(doc_ids), dtype=jnp.int32) - positions(doc_ids)


def token_examples(batch: Batch) -> Int[Array, "*rows t"]:
    """Which example each token belongs to."""
    doc_ids, examples = jnp.asarray(batch["doc_ids"]), jnp.asarray(batch["example_ids"])
    if examples.shape == doc_ids.shape:
        return examples
    return jnp.take_along_axis(examples, jnp.maximum(doc_ids, 0), axis=-1)


def document_keys(key: Array, batch: Batch, purpose: int) -> Key[Array, "*rows t"]:
    """One key for each token, the same in a document; `purpose` tells draws for the same example apart."""
    own = jax.random.fold_in(key, purpose)
    examples = token_examples(batch)
    return over_rows(jax.vmap(lambda example: jax.random.fold_in(own, example)), examples.ndim)(examples)


def token_keys(key: Array, batch: Batch, purpose: int) -> Key[Array, "*rows t"]:
    """One key for each token: of its example and its place in the document."""
    keys, within = document_keys(key, batch, purpose), positions(jnp.asarray(batch["doc_ids"]))
    return over_rows(jax.vmap(jax.random.fold_in), within.ndim)(keys, within)


def uniform(keys: Key[Array, "*rows t"]) -> Float[Array, "*rows t"]:
    """A number in [0, 1) for each key."""
    return over_rows(jax.vmap(jax.random.uniform), keys.ndim)(keys)


def document_sums(doc_ids: Int[Array, "*rows t"], values: Float[Array, "*rows t"]) -> Float[Array, "*rows t"]:
    """For each token the sum of the values over its document."""

    def row(doc_ids: Array, values: Array) -> Array:
        number = jnp.maximum(jnp.cumsum(document_starts(doc_ids)) - 1, 0)
        sums = jax.ops.segment_sum(jnp.where(doc_ids >= 0, values, 0.0), number, len(doc_ids))
        return jnp.where(doc_ids >= 0, sums[number], 0.0)

    return over_rows(row, doc_ids.ndim)(doc_ids, values)
