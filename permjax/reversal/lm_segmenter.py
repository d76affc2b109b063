"""Units by an assistant language model that reads the text instead of writing it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from permjax.reversal.segment import SegmentError, cut_text, split_words
from permjax.reversal.tokens import Encoder

Logits = Callable[[Int[np.ndarray, "rows t"]], Any]


@dataclass(frozen=True, eq=False)
class LMSegmenter:
    """Cuts a text before each word where a causal language model would rather set a mark than go on.

    The score of a gap is `log p(mark | before) - log p(next token | before)`, read from passes over the text itself.
    The assistant of the SPT paper writes the text anew with [SEP] marks and changes 6 to 29 % of its lines on the way;
    here nothing is written, so the units are the text.

    Attributes:
        logits: `logits(tokens) -> array`, token ids [rows, t] to scores of the next token [rows, t, vocabulary]; such
            as `jax.jit(functools.partial(net.apply, params))` of a language model of `permjax.nets`, or
            `huggingface_logits(model)`.
        encode: text to token ids and offsets; see `permjax.reversal.tokens.encoder`.
        mark: the token that stands between units.
        prompt: tokens before every text, at least the one that begins a text: instructions and examples.
        threshold: how much more probable the mark must be, in nats; higher gives fewer units.
        context: the longest sequence that the model takes; longer texts are read in windows that overlap by half.
        passes: how often the text is read; after the first time with the marks found so far, as the assistant knows it.

    Example:
        >>> segmenter = LMSegmenter(logits, encode, mark=0, prompt=(1,))  # doctest: +SKIP
        >>> "".join(segmenter("The dog barks.")) == "The dog barks."  # doctest: +SKIP
        True
    """

    logits: Logits
    encode: Encoder
    mark: int
    prompt: Sequence[int] = (0,)
    threshold: float = 0.0
    context: int = 512
    passes: int = 2

    def __post_init__(self) -> None:
        """Refuse no pass, and a prompt that is empty or leaves no room for text."""
        if self.passes < 1:
            raise SegmentError(f"'passes' is {self.passes}, but a text must be read at least once.")
        if not self.prompt:
            raise SegmentError("'prompt' is empty, but the model needs a token to foretell the first one of a text.")
        if self.context < len(self.prompt) + 4:
            message = f"'context' is {self.context}, which leaves no room for text after the {len(self.prompt)} tokens "
            raise SegmentError(message + "of 'prompt'; shorten the prompt, or give a larger context.")

    def __call__(self, text: str) -> tuple[str, ...]:
        """The units in their order."""
        gaps, scores = self.scores(text)
        return cut_text(text, gaps[scores > self.threshold].tolist())

    def scores(self, text: str) -> tuple[Int[np.ndarray, " gaps"], Float[np.ndarray, " gaps"]]:
        """The character position of each gap before a word, and how much rather the model would set a mark there."""
        ids, offsets = self.encode(text)
        tokens = np.asarray(ids, np.int32).reshape(-1)
        gaps, first = _gaps(text, np.asarray(offsets, np.int64).reshape(-1, 2)[:, 1])
        marked = np.zeros(len(tokens), bool)
        scores = np.zeros(len(gaps), np.float32)
        for _ in range(self.passes if len(gaps) else 0):
            scores = self._scores(tokens, marked, first)
            marked[first] = scores > self.threshold
        return gaps, scores

    def _scores(self, tokens: np.ndarray, marked: np.ndarray, first: np.ndarray) -> Float[np.ndarray, " gaps"]:
        """The scores before the tokens `first`, in the text with a mark before each token that is `marked`."""
        sequence = np.insert(tokens, np.flatnonzero(marked), self.mark)
        before = first + (np.cumsum(marked) - marked)[first] - 1  # the place in `sequence` that foretells the gap
        half = (self.context - len(self.prompt)) // 2
        row = np.maximum(before // half - 1, 0)
        starts = half * np.arange(row[-1] + 1)
        windows = [np.concatenate([self.prompt, sequence[start : start + 2 * half]]) for start in starts]
        logits = np.asarray(self.logits(_padded(windows, self.context)))
        place = len(self.prompt) + before - starts[row]
        return logits[row, place, self.mark].astype(np.float32) - logits[row, place, tokens[first]].astype(np.float32)


def _gaps(text: str, ends: np.ndarray) -> tuple[Int[np.ndarray, " gaps"], Int[np.ndarray, " gaps"]]:
    """The position before each word but the first, white space included, and the token that the word begins in."""
    words = split_words(text)
    gaps = np.cumsum([len(word) for word in words], dtype=np.int64)[:-1]
    letters = gaps + np.array([len(word) - len(word.lstrip()) for word in words[1:]], np.int64)
    first = np.searchsorted(np.maximum.accumulate(ends), letters, side="right")
    known = first < len(ends)
    return gaps[known], first[known]


def _padded(windows: Sequence[np.ndarray], context: int) -> Int[np.ndarray, "rows t"]:
    """The windows as rows of one array; its sizes are powers of two, so that a jitted model compiles few times."""
    length = min(_power(max(map(len, windows))), context)
    rows = np.zeros((_power(len(windows)), length), np.int32)
    for row, window in zip(rows, windows, strict=False):
        row[: len(window)] = window
    return rows


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def marked_tokens(
    tokens: Int[np.ndarray, " t"], unit_ids: Int[np.ndarray, " t"], mark: int
) -> Int[np.ndarray, " marked"]:
    """Tokens with a mark between units: what an assistant is trained on.

    Example:
        >>> marked_tokens(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.int32), 9)
        array([5, 6, 9, 7], dtype=int32)
    """
    return np.insert(tokens, np.flatnonzero(np.diff(unit_ids)) + 1, mark)


def huggingface_logits(model: Any) -> Logits:
    """The logits of a causal language model of `transformers`, for `LMSegmenter`.

    Args:
        model: in evaluation mode, with parameters; called with `input_ids`, and its result has `logits`.
    """
    whole = next(iter(model.parameters())).new_zeros(1).long()  # a tensor of whole numbers where the model is

    def logits(tokens: Int[np.ndarray, "rows t"]) -> Float[np.ndarray, "rows t vocabulary"]:
        found = model(input_ids=whole.new_tensor(tokens.tolist())).logits
        return found.detach().float().cpu().numpy()

    return logits
