"""Objectives that mask tokens instead of moving them: denoising, uniform-rate masking, copies of masked texts.

Each takes a batch of `permjax.reversal.layout`, in its original order, and adds `labels`, `weights` and `positions`,
and for models that see both ways `causal` [rows] and `seen` [rows, t], of which `layout.visible` makes the attention
mask. Pinned tokens are never masked. What is masked depends on the key and the example alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from permjax.reversal.draws import document_keys, document_starts_of, document_sums, token_keys, uniform
from permjax.reversal.layout import Batch, next_token, over_rows, positions

_RATE, _TOKEN, _ROW = range(1, 4)  # purposes of draws


def mlm_u(key: Array, batch: Batch, mask_id: int) -> dict[str, Any]:
    """Masked tokens at a rate that is uniform in [0, 1) for each document, foretold from both sides.

    In a document of n tokens that may be masked, m of them are; each weighs n / m, so that the loss is in expectation
    that of all factorization orders: `-E_order sum_t log p(x_order(t) | x_order(<t))`.

    Source: Kitouni et al. (NeurIPS 2024), section 2.3, MLM-U.
    """
    rate = uniform(document_keys(key, batch, _RATE))
    masked = _masked(key, batch, rate)
    free, lost = (document_sums(batch["doc_ids"], flags.astype(jnp.float32)) for flags in (_free(batch), masked))
    weights = jnp.where(masked, free / jnp.maximum(lost, 1.0), 0.0)
    return _denoised(batch, masked, mask_id, weights) | {"causal": jnp.zeros(masked.shape[:-1], bool)}


def bico(key: Array, batch: Batch, mask_id: int, *, rate: float = 0.15, share: float = 0.5) -> dict[str, Any]:
    """Denoising under bidirectional attention in a share of the rows, next-token prediction in the others.

    A masked token is foretold at its own place and is hidden from all others.

    Args:
        key: a typed key.
        batch: rows `[rows, t]`.
        mask_id: what stands for a masked token; the authors use the one of padding.
        rate: how many tokens are masked.
        share: how many rows are denoised, as the first example of a row will have it.

    Source: Lv et al. (EMNLP 2024), BICO. The authors also change the distances of rotary positions under
    bidirectional attention, which is not done here.
    """
    first = batch["example_ids"].reshape(len(batch["tokens"]), -1)[:, 0]
    own = jax.random.fold_in(key, _ROW)
    denoised = jax.vmap(lambda example: jax.random.uniform(jax.random.fold_in(own, example)))(first) < share
    masked = _masked(key, batch, jnp.full(batch["tokens"].shape, rate)) & denoised[:, None]
    forward, found = next_token(batch), _denoised(batch, masked, mask_id, masked.astype(jnp.float32))
    both = {name: jnp.where(denoised[:, None], found[name], forward[name]) for name in ("tokens", "labels", "weights")}
    return forward | both | {"causal": ~denoised, "seen": ~masked}


def masked_copy(
    key: Array, batch: Batch, mask_id: int, *, lowest: float = 0.05, highest: float = 0.95
) -> dict[str, Any]:
    """Each document twice, first with masked tokens and then as it is, with the loss on the second copy.

    A causal model thus learns each part of a text given any others, at rates drawn uniformly for each document. Rows
    become twice as long.

    Args:
        key: a typed key.
        batch: see `permjax.reversal.layout`. A document that begins with a pinned token, such as BOS, has it between
            its copies as well.
        mask_id: what stands for a masked token.
        lowest: the smallest rate.
        highest: the largest rate.

    Source: Pan et al. (arXiv 2510.09885), masked fine-tuning; their prompt in words is left out.
    """
    rate = lowest + (highest - lowest) * uniform(document_keys(key, batch, _RATE))
    masked = _masked(key, batch, rate)
    doc_ids, t = batch["doc_ids"], batch["doc_ids"].shape[-1]
    length = document_sums(doc_ids, jnp.ones(doc_ids.shape)).astype(jnp.int32)

    def row(doc_ids: Array, length: Array, first: Array, second: Array) -> Array:
        place = jnp.arange(t, dtype=jnp.int32)
        begin = jnp.where(doc_ids >= 0, document_starts_of(doc_ids), place)
        at = begin + place  # twice the begin, and the place within
        both = jnp.zeros((2 * t, *first.shape[1:]), first.dtype)
        return both.at[at].set(first).at[at + jnp.maximum(length, 1)].set(second)

    def twice(first: Any, second: Any) -> Array:
        return over_rows(row, doc_ids.ndim)(doc_ids, length, jnp.asarray(first), jnp.asarray(second))

    by_token = {name: leaf for name, leaf in batch.items() if jnp.shape(leaf)[: doc_ids.ndim] == doc_ids.shape}
    longer = {name: twice(leaf, leaf) for name, leaf in by_token.items()}
    loss = batch.get("loss_mask", jnp.ones(doc_ids.shape, bool))
    longer["tokens"] = twice(jnp.where(masked, mask_id, batch["tokens"]), batch["tokens"])
    longer["loss_mask"] = twice(jnp.zeros_like(loss), loss)
    return next_token({**batch, **longer})


def _free(batch: Batch) -> Bool[Array, "*rows t"]:
    inside = batch["doc_ids"] >= 0
    return inside & ~batch["pinned"] if "pinned" in batch else inside


def _masked(key: Array, batch: Batch, rate: Float[Array, "*rows t"]) -> Bool[Array, "*rows t"]:
    return _free(batch) & (uniform(token_keys(key, batch, _TOKEN)) < rate)


def _denoised(batch: Batch, masked: Array, mask_id: int, weights: Array) -> dict[str, Any]:
    """Every masked token foretold at its own place."""
    tokens = jnp.where(masked, mask_id, batch["tokens"])
    weights = weights * batch["loss_mask"].astype(jnp.float32) if "loss_mask" in batch else weights
    extra = {"labels": batch["tokens"], "weights": weights, "positions": positions(batch["doc_ids"])}
    return {**batch, "tokens": tokens, **extra}
