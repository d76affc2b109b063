"""Semantic-aware permutation inside other people's pipelines: Grain, `datasets`, collators, and JAX train steps.

On the host the random numbers are NumPy's; an order depends on the seed, the epoch and the number of the example. On
the device (`wrap_step`) it is `permute_units`. Either way units must have been found before, by `add_units`.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from permjax.reversal.host import generator, permute_document
from permjax.reversal.packing import pack
from permjax.reversal.reorder import THIRDS, order_edges, permute_units
from permjax.reversal.segment import Segmenter
from permjax.reversal.tokens import encoder, unit_tokens, with_prefix_space

IGNORED_LABEL = -100
"""The label of a position without a loss, as trainers of Hugging Face have it."""


@dataclass(frozen=True)
class GrainPermutation:
    """A random map of a Grain pipeline: `dataset.random_map(GrainPermutation())`, after units, before packing.

    Grain makes `rng` of its seed, the place of the element and the epoch, so that orders survive a restart.

    Attributes:
        probs: of the original, the reversed and a random order.
    """

    probs: tuple[float, float, float] = THIRDS

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The element with `tokens`, `unit_ids` and all arrays as long permuted; `pinned` tokens stay."""
        return permute_document(rng, element, self.probs).document

    __call__ = random_map  # Grain takes functions of these two as well


def add_units(
    segmenter: Segmenter | None, tokenizer: Any, *, text: str = "text", prefix_space: bool = True
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function for `datasets.Dataset.map` that tokenizes a text and says which unit each token is in.

    Args:
        segmenter: cuts the text; without one each token is a unit.
        tokenizer: see `permjax.reversal.tokens.encoder`.
        text: the column of the text.
        prefix_space: begin each text with a space, so that units look the same wherever they stand; do the same where
            the model is asked.

    Returns:
        `function(row) -> {"input_ids", "unit_ids", "snapped"}`, in which `snapped` counts cuts inside tokens.

    Example:
        >>> rows = dataset.map(add_units(RuleSegmenter(), tokenizer), remove_columns=["text"])
    """
    encode = encoder(tokenizer)

    def function(row: Mapping[str, Any]) -> dict[str, Any]:
        content = with_prefix_space(row[text]) if prefix_space else row[text]
        found = unit_tokens(content, encode, segmenter)
        return {"input_ids": found.tokens.tolist(), "unit_ids": found.unit_ids.tolist(), "snapped": found.snapped}

    return function


@dataclass
class PermutingCollator:
    """A collator with arrays of NumPy: rows of `add_units`, permuted anew each epoch, one to a row of the batch.

    Attributes:
        length: tokens of a row; longer texts are cut, before they are permuted.
        probs: of the original, the reversed and a random order.
        tags: three tokens for the orders, of which the right one stands before each text; none by default.
        bos: the token before that, where there is one.
        eos: the token after it.
        pad_id: the token of padding.
        example: the column with the number of the example; without it orders follow from the tokens.
        seed: of all orders.
        epoch: set it at the start of each epoch.
    """

    length: int
    probs: tuple[float, float, float] = THIRDS
    tags: tuple[int, int, int] | None = None
    bos: int | None = None
    eos: int | None = None
    pad_id: int = 0
    example: str = "example_id"
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        """Refuse probabilities that are none."""
        order_edges(self.probs)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The rows as `input_ids`, `attention_mask`, and `labels` like the input ids, which trainers shift."""
        documents = [{"tokens": self._permuted(row)} for row in rows]
        batch = pack(documents, self.length, pad_id=self.pad_id, packed=False)
        inside = batch["doc_ids"] >= 0
        labels = np.where(inside, batch["tokens"], IGNORED_LABEL)
        return {"input_ids": batch["tokens"], "attention_mask": inside.astype(np.int32), "labels": labels}

    def _permuted(self, row: Mapping[str, Any]) -> np.ndarray:
        ends = [[] if token is None else [token] for token in (self.bos, self.eos)]
        room = self.length - sum(map(len, ends)) - (self.tags is not None)
        tokens, unit_ids = (np.asarray(row[name], np.int32)[:room] for name in ("input_ids", "unit_ids"))
        number = row[self.example] if self.example in row else zlib.crc32(tokens.tobytes())
        rng = generator(self.seed, self.epoch, int(number))
        moved = permute_document(rng, {"tokens": tokens, "unit_ids": unit_ids}, self.probs)
        tag = [] if self.tags is None else [self.tags[moved.order]]
        return np.array([*ends[0], *tag, *moved.document["tokens"], *ends[1]], np.int32)


def wrap_step(
    train_step: Callable[..., Any],
    key: jax.Array,
    probs: Sequence[float | int] = THIRDS,
    *,
    max_units: int,
    tag_ids: Sequence[int] | None = None,
    prepare: Callable[[dict[str, Any]], Any] = dict,
) -> Callable[..., Any]:
    """A train step that permutes the units of its batch first, on the device.

    Args:
        train_step: `train_step(state, batch, *others)`; it may be compiled, or be compiled with what is returned.
        key: of all orders.
        probs: of the original, the reversed and a random order.
        max_units: the most units in a row.
        tag_ids: see `permute_units`.
        prepare: makes of the permuted batch what the step takes, such as `layout.next_token`.

    Returns:
        `step(state, batch, epoch, *others)`; `epoch` is a number, and each has orders of its own.

    Example:
        >>> step = jax.jit(wrap_step(train_step, jax.random.key(0), max_units=64, prepare=next_token))
        >>> state, loss = step(state, batch, epoch)
    """
    order_edges(probs)

    def step(state: Any, batch: Mapping[str, Any], epoch: Any, *others: Any) -> Any:
        own = jax.random.fold_in(key, epoch)
        moved = permute_units(own, batch, probs, max_units=max_units, tag_ids=tag_ids)
        return train_step(state, prepare(moved.batch), *others)

    return step
