"""Baselines of semantic-aware permutation that are permutations of other units, or with other probabilities.

A method is a `Recipe`: where its units come from, and how likely each order is. Units of a document are found by a
segmenter before training (`given`), or on the device by the functions below.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from permjax.reversal.draws import document_starts_of, token_keys
from permjax.reversal.layout import Batch, over_rows, positions
from permjax.reversal.reorder import THIRDS

HALVES = (0.5, 0.5, 0.0)
UNMOVED = (1.0, 0.0, 0.0)


class Recipe(NamedTuple):
    """A method of training as units and probabilities.

    Attributes:
        units: `given` by a segmenter; or `tokens`, or runs of `size` tokens (`ngrams`), or of 1 to `size` (`random`).
        probs: of the original, the reversed and a random order.
        size: the tokens of a run.
    """

    units: str
    probs: tuple[float, float, float]
    size: int = 1


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "ntp": Recipe("given", UNMOVED),
        "spt": Recipe("given", THIRDS),
        "unit_reversal": Recipe("given", HALVES),
        "unit_permutation": Recipe("given", (0.0, 0.0, 1.0)),
        "token_reversal": Recipe("tokens", HALVES),
        "token_permutation": Recipe("tokens", THIRDS),
        "ngram2": Recipe("ngrams", THIRDS, 2),
        "ngram3": Recipe("ngrams", THIRDS, 3),
        "random_reversal": Recipe("random", HALVES, 5),
        "random_permutation": Recipe("random", THIRDS, 5),
    }
)
"""Methods by name. `ntp` is next-token prediction; `spt` that of Guo et al. (Findings of ACL 2024). Reversals are those
of Golovneva et al. (COLM 2024): of tokens; of random runs of at most `size` tokens; and, with units in which entities
stay whole and other words stand alone (`EntitySegmenter`), or of words (`WordSegmenter`), `unit_reversal`."""


def with_units(key: Array, batch: Batch, recipe: Recipe) -> dict[str, Any]:
    """The batch with the units of a method; `permute_units(key, ..., recipe.probs)` comes next.

    Args:
        key: the one for `permute_units`: random runs too depend on it and on the example alone.
        batch: see `permjax.reversal.layout`; its `unit_ids` are needed only for units that are `given`.
        recipe: the method.

    Raises:
        ValueError: no such units.
    """
    if recipe.units == "given":
        return dict(batch)
    if recipe.units == "tokens" or (recipe.units == "ngrams" and recipe.size >= 1):
        return {**batch, "unit_ids": ngram_units(batch["doc_ids"], recipe.size if recipe.units == "ngrams" else 1)}
    if recipe.units == "random" and recipe.size >= 1:
        return {**batch, "unit_ids": random_units(key, batch, recipe.size)}
    message = f"There are no units {recipe.units!r} of size {recipe.size}; "
    raise ValueError(message + "choose given, tokens, ngrams or random, and a size of 1 or more.")


def ngram_units(doc_ids: Int[Array, "*rows t"], size: int) -> Int[Array, "*rows t"]:
    """Runs of `size` tokens from the start of each document on; the last may be shorter."""
    place = jnp.arange(doc_ids.shape[-1], dtype=jnp.int32)
    within = positions(doc_ids)
    first = place.reshape((1,) * (doc_ids.ndim - 1) + (-1,)) - within
    return jnp.where(doc_ids >= 0, first + within // size, -1)


def random_units(key: Array, batch: Batch, most: int) -> Int[Array, "*rows t"]:
    """Runs of 1 to `most` tokens, all lengths alike, as the example and the key will have it.

    Source: Golovneva et al. (COLM 2024), random segment reversal.
    """
    doc_ids = batch["doc_ids"]
    lengths = jax.vmap(lambda key: jax.random.randint(key, (), 1, most + 1))(token_keys(key, batch, 1).reshape(-1))

    def row(doc_ids: Array, lengths: Array) -> Array:
        place = jnp.arange(len(doc_ids), dtype=jnp.int32)
        first = document_starts_of(doc_ids)
        total = jnp.cumsum(lengths, dtype=jnp.int32)
        cut = first + total - total[first] + lengths[first]  # the place where the run after this one begins
        here = (doc_ids >= 0) & (jnp.take(doc_ids, cut, mode="fill", fill_value=-1) == doc_ids)
        begins = jnp.zeros(len(doc_ids), bool).at[jnp.where(here, cut, len(doc_ids))].max(True, mode="drop")
        return jnp.where(doc_ids >= 0, jnp.cumsum(begins | (place == first), dtype=jnp.int32), -1)

    return over_rows(row, doc_ids.ndim)(doc_ids, lengths.reshape(doc_ids.shape))
