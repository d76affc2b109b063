"""From units of characters to units of tokens, for any tokenizer that says where its tokens stand.

The rule of the leading space: byte-level tokenizers write a word at the start of a text otherwise than after a space.
Units that change places must look the same everywhere, so a text for such a tokenizer begins with one space
(`with_prefix_space`), when it is trained on and when it is asked about. `needs_prefix_space` says whether a tokenizer
is of that kind; do not switch on its own `add_prefix_space` as well.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from permjax.reversal.segment import Segmenter

Offsets = Sequence[Sequence[int]] | Int[np.ndarray, "t 2"]
Encoder = Callable[[str], tuple[Sequence[int], Offsets]]


class UnitTokens(NamedTuple):
    """The tokens of a text with the unit of each, and how many cuts had to move to the start of a token."""

    tokens: Int[np.ndarray, " t"]
    unit_ids: Int[np.ndarray, " t"]
    snapped: int


def encoder(tokenizer: Any) -> Encoder:
    """`encode(text) -> (token ids, character offsets)` of a tokenizer, without special tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, a fast tokenizer of `transformers`, or a function that is such an encoder
            already.

    Raises:
        TypeError: it cannot say where its tokens stand in the text.
    """
    if getattr(tokenizer, "is_fast", False):
        return lambda text: _fast(tokenizer, text)
    if hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "token_to_id"):
        return lambda text: _encoding(tokenizer.encode(text, add_special_tokens=False))
    if hasattr(tokenizer, "is_fast") or not callable(tokenizer):
        message = f"A {type(tokenizer).__name__} cannot say which characters its tokens stand for; give "
        raise TypeError(message + "a tokenizers.Tokenizer, a fast tokenizer, or a function text -> (ids, offsets).")
    return cast(Encoder, tokenizer)


def _fast(tokenizer: Any, text: str) -> tuple[Sequence[int], Offsets]:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], encoding["offset_mapping"]


def _encoding(encoding: Any) -> tuple[Sequence[int], Offsets]:
    return encoding.ids, encoding.offsets


def needs_prefix_space(encode: Encoder) -> bool:
    """Whether a word has other tokens at the start of a text than after a space."""
    ids, _ = encode("the the")
    half = len(ids) // 2
    return list(ids[:half]) != list(ids[half:])


def with_prefix_space(text: str) -> str:
    """The text with a space before it, unless it begins with white space or is empty."""
    return f" {text}" if text and not text[0].isspace() else text


def unit_ids(units: Sequence[str], offsets: Offsets) -> tuple[Int[np.ndarray, " t"], int]:
    """The unit of each token, and the number of cuts that fell inside a token.

    A cut inside a token moves to its start, so the token goes with the unit that it ends in; white space at the end of
    a token does not count. A token without characters goes with the one before it. Units without a token vanish: ids
    count up from 0 without a gap.

    Args:
        units: pieces of a text that tile it.
        offsets: the first and past-the-end character of each token in that text, shape [t, 2], in text order.

    Example:
        >>> unit_ids(["The dog", " barks."], [(0, 3), (3, 7), (7, 13), (13, 14)])
        (array([0, 0, 1, 1], dtype=int32), 0)
    """
    cuts = np.array(list(accumulate(map(len, units)))[:-1], np.int64)
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    ends = _without_space("".join(units), starts, ends)
    rows = np.maximum.accumulate(np.searchsorted(cuts, ends, side="left"))
    _, ids = np.unique(rows, return_inverse=True)
    return ids.astype(np.int32), _inside(cuts, starts, ends)


def _without_space(text: str, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The ends of tokens before the white space that they end with, if they are not all white space."""
    seen = [0, *(0 if character.isspace() else place for place, character in enumerate(text, 1))]
    last = np.maximum.accumulate(seen)[ends]
    return np.where(last > starts, last, ends)


def _inside(cuts: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> int:
    """How many cuts lie inside a token."""
    inner = np.zeros(cuts.shape, bool)
    for first, last in zip(np.searchsorted(cuts, starts, "right"), np.searchsorted(cuts, ends, "left"), strict=True):
        inner[first:last] = True
    return int(inner.sum())


def unit_tokens(text: str, encode: Encoder, segmenter: Segmenter | None = None) -> UnitTokens:
    """The tokens of a text, and the unit of each by a segmenter; without one each token is a unit.

    The text is tokenized as a whole, so its tokens are the same whatever the units.

    Args:
        text: as it is trained on, a leading space included where the tokenizer needs one.
        encode: see `encoder`.
        segmenter: cuts the text.
    """
    ids, offsets = encode(text)
    tokens = np.asarray(ids, np.int32).reshape(-1)
    if segmenter is None:
        return UnitTokens(tokens, np.arange(len(tokens), dtype=np.int32), 0)
    return UnitTokens(tokens, *unit_ids(segmenter(text), offsets))
