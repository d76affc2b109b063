"""Cutting a text into units without losing a character: the contract, and the plainest cuts as baselines."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Protocol, runtime_checkable

_WORD = re.compile(r"\s*\S+")


class SegmentError(ValueError):
    """Units that do not tile their text, or a text that cannot be cut as asked."""


@runtime_checkable
class Segmenter(Protocol):
    """Anything that cuts a text into units that joined are the text.

    `"".join(units) == text` holds exactly, no unit is empty, and the empty text has no unit. White space before a word
    goes with that word, and what is left at the end with the last one. `check_units` checks the contract.
    """

    def __call__(self, text: str) -> tuple[str, ...]:
        """The units of `text` in their order."""
        ...


def check_units(text: str, units: Iterable[str]) -> tuple[str, ...]:
    """The units as a tuple, if they tile the text.

    Raises:
        SegmentError: a unit is empty, or the joined units differ from the text; says where.

    Example:
        >>> check_units("The dog barks.", ["The dog", " barks."])
        ('The dog', ' barks.')
    """
    units, place = tuple(units), 0
    for number, unit in enumerate(units):
        if not unit:
            raise SegmentError(f"Unit {number} is empty at character {place} of the text; leave it out.")
        if not text.startswith(unit, place):
            found = text[place : place + len(unit)]
            message = f"Unit {number} is {unit!r}, but the text has {found!r} at character {place}; "
            raise SegmentError(message + "units must be pieces of the text, in order, white space included.")
        place += len(unit)
    if place != len(text):
        message = f"The units end at character {place} of {len(text)}, before {text[place : place + 40]!r}; "
        raise SegmentError(message + "units must cover the text to its end.")
    return units


def cut_text(text: str, cuts: Iterable[int]) -> tuple[str, ...]:
    """The pieces of a text between character positions; those at its ends or beyond cut nothing.

    Example:
        >>> cut_text("The dog barks.", [7])
        ('The dog', ' barks.')
    """
    places = sorted({0, len(text), *(cut for cut in cuts if 0 < cut < len(text))})
    return tuple(text[start:end] for start, end in pairwise(places))


def split_words(text: str) -> list[str]:
    """What stands between white space, each piece with the white space before it; the last takes what is left.

    Example:
        >>> split_words("The dog  barks. ")
        ['The', ' dog', '  barks. ']
    """
    words = _WORD.findall(text)
    rest = text[sum(map(len, words)) :]
    if not words:
        return [rest] if rest else []
    words[-1] += rest
    return words


def join_words(words: Sequence[str], lengths: Iterable[int]) -> tuple[str, ...]:
    """Units of so many words each.

    Example:
        >>> join_words(["The", " dog", " barks."], [2, 1])
        ('The dog', ' barks.')
    """
    units, start = [], 0
    for length in lengths:
        units.append("".join(words[start : start + length]))
        start += length
    return tuple(units)


@dataclass(frozen=True)
class SentenceSegmenter:
    """The whole text as one unit: no order but its own."""

    def __call__(self, text: str) -> tuple[str, ...]:
        """The text, or nothing if it is empty."""
        return (text,) if text else ()


@dataclass(frozen=True)
class WordSegmenter:
    """One unit per word, as white space parts them (the word reversal of Golovneva et al., 2024)."""

    def __call__(self, text: str) -> tuple[str, ...]:
        """The words, each with the white space before it."""
        return tuple(split_words(text))


@dataclass(frozen=True)
class NGramSegmenter:
    """Runs of `n` words each; the last may be shorter.

    Example:
        >>> NGramSegmenter(2)("one two three")
        ('one two', ' three')
    """

    n: int

    def __post_init__(self) -> None:
        """Refuse runs of no word."""
        _require_words("n", self.n)

    def __call__(self, text: str) -> tuple[str, ...]:
        """The runs in their order."""
        words = split_words(text)
        return join_words(words, [self.n] * -(-len(words) // self.n))


@dataclass(frozen=True)
class RandomSegmenter:
    """Runs of 1 to `most` words, all lengths alike (the random segments of Golovneva et al., 2024).

    The same text and seed always give the same units, whatever was cut before.
    """

    most: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse runs of no word."""
        _require_words("most", self.most)

    def __call__(self, text: str) -> tuple[str, ...]:
        """The runs in their order."""
        words, lengths = split_words(text), []
        rng = Random(f"{self.seed} {text}".encode(errors="surrogatepass"))
        left = len(words)
        while left:
            lengths.append(min(rng.randint(1, self.most), left))
            left -= lengths[-1]
        return join_words(words, lengths)


def _require_words(name: str, value: int) -> None:
    if value < 1:
        raise SegmentError(f"{name!r} is {value}, but a unit has at least one word.")
