"""Files of units separated by [SEP], as an assistant model writes them, brought back to the text they should have."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from permjax.reversal.segment import SegmentError, cut_text, split_words

MARK = "[SEP]"
Outcome = Literal["kept", "repaired", "rejected"]

_SPACE = re.compile(r"\s+")
_AROUND = re.compile(r"^\W+|\W+$")


@dataclass(frozen=True)
class SepFileSegmenter:
    """The units that a file gives for texts it was made from.

    Attributes:
        units: the units of each text; a rejected one is a single unit.
        outcomes: what became of each line.

    Example:
        >>> SepFileSegmenter.of(["The dog [SEP] barks ."], ["The dog barks."])("The dog barks.")
        ('The dog', ' barks.')
    """

    units: dict[str, tuple[str, ...]] = field(repr=False)
    outcomes: tuple[Outcome, ...] = field(repr=False)

    @classmethod
    def read(cls, path: str | Path, texts: Sequence[str], *, least: float = 0.8) -> "SepFileSegmenter":
        """The units of a file, line by line those of `texts`.

        Args:
            path: the file, in UTF-8; empty lines do not count.
            texts: the texts that its lines were made from, in the same order.
            least: the share of words that a line and its text must have in common, else the line is rejected.

        Raises:
            SegmentError: the file has another number of lines, or is not in UTF-8.
        """
        try:
            lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise SegmentError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None
        if len(lines) != len(texts):
            message = f"{path} has {len(lines)} lines, but there are {len(texts)} texts; "
            raise SegmentError(message + "give the texts that its lines were made from, in the same order.")
        return cls.of(lines, texts, least=least)

    @classmethod
    def of(cls, lines: Iterable[str], texts: Iterable[str], *, least: float = 0.8) -> "SepFileSegmenter":
        """The units that each line gives its text; the first line of equal texts counts that is not rejected."""
        units: dict[str, tuple[str, ...]] = {}
        outcomes: list[Outcome] = []
        for line, text in zip(lines, texts, strict=True):
            found, outcome = align(line, text, least=least)
            outcomes.append(outcome)
            if outcome != "rejected" and len(units.get(text, ())) < 2:
                units[text] = found
            units.setdefault(text, found)
        return cls(units, tuple(outcomes))

    def count(self, outcome: Outcome) -> int:
        """How many lines had that outcome."""
        return self.outcomes.count(outcome)

    def __call__(self, text: str) -> tuple[str, ...]:
        """The units of a text of the file.

        Raises:
            SegmentError: the file has no such text.
        """
        if text not in self.units and text:
            message = f"The [SEP] file has no line for the text {text[:60]!r}; it knows {len(self.units)} texts. "
            raise SegmentError(message + "Use it for those, and another segmenter for the others.")
        return self.units.get(text, ())


def align(line: str, text: str, *, least: float = 0.8) -> tuple[tuple[str, ...], Outcome]:
    """The units of a text where a line with [SEP] marks cuts it, and whether the line was faithful.

    A line that has the characters of the text, white space aside, is kept. In another one the words that both have are
    aligned, punctuation aside, and a mark beside an aligned word cuts the text there; marks elsewhere are dropped. A
    line with too few words of the text leaves it whole.

    Args:
        line: units separated by `[SEP]`.
        text: what the line should have said.
        least: the share of words in common (the ratio of `difflib`) from which a line is repaired.

    Example:
        >>> align("The dog [SEP] barks aloud.", "The dog barks.", least=0.5)
        (('The dog', ' barks.'), 'repaired')
    """
    parts = [part for part in line.split(MARK) if part.strip()]
    if _SPACE.sub("", "".join(parts)) == _SPACE.sub("", text):
        return cut_text(text, _places(text, [len(_SPACE.sub("", part)) for part in parts])), "kept"
    cuts, ratio = _word_cuts([part.split() for part in parts], text)
    if ratio < least:
        return ((text,) if text else ()), "rejected"
    return cut_text(text, cuts), "repaired"


def _places(text: str, lengths: Sequence[int]) -> Iterator[int]:
    """Where units of so many characters that are no white space end in a text."""
    ends = [place + 1 for place, character in enumerate(text) if not character.isspace()]
    seen = 0
    for length in lengths:
        seen += length
        yield ends[seen - 1]


def _word_cuts(parts: Sequence[Sequence[str]], text: str) -> tuple[list[int], float]:
    """Cuts of a text before the words that begin a part, or after those that end one; and how many words agree."""
    pieces = split_words(text)
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    given = [_bare(word) for part in parts for word in part]
    matcher = difflib.SequenceMatcher(None, given, list(map(_bare, pieces)), autojunk=False)
    place = {block.a + k: block.b + k for block in matcher.get_matching_blocks() for k in range(block.size)}
    cuts, seen = [], 0
    for part in parts[:-1]:
        seen += len(part)
        if seen in place:
            cuts.append(starts[place[seen]])
        elif seen - 1 in place:
            cuts.append(starts[place[seen - 1] + 1])
    return cuts, matcher.ratio()


def _bare(word: str) -> str:
    """A word without the punctuation around it, if it has anything else."""
    return _AROUND.sub("", word) or word.strip()
