"""Units that keep listed names whole."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from permjax.reversal.segment import Segmenter, SegmentError, WordSegmenter, split_words

_AROUND = re.compile(r"^[\W_]+|(?:['’]s)?[\W_]*$")


@dataclass(frozen=True)
class EntitySegmenter:
    """Names from a list are units; what lies between them is cut by another segmenter.

    A name is found where its words stand between white space, whatever punctuation or possessive ending is around
    them; the longest name at a place wins. The unit has all of it, so that punctuation stays with its name.

    Attributes:
        names: the names; order and repetition do not matter.
        rest: cuts the text between names, by default at every word (the entity-preserving reversal of Golovneva et
            al., 2024).

    Example:
        >>> EntitySegmenter(["Ann Lee"])("Tom met Ann Lee's aunt.")
        ('Tom', ' met', " Ann Lee's", ' aunt.')
    """

    names: Collection[str] = field(repr=False)
    rest: Segmenter = field(default_factory=WordSegmenter)
    _bare: frozenset[str] = field(init=False, repr=False)
    _lengths: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Bring the names into the form in which text is looked up."""
        bare = frozenset(map(_core, self.names))
        if "" in bare:
            raise SegmentError("A name to keep whole has no letter or digit; leave it out of the list.")
        object.__setattr__(self, "_bare", bare)
        object.__setattr__(self, "_lengths", tuple(sorted({len(name.split()) for name in bare}, reverse=True)))

    def __call__(self, text: str) -> tuple[str, ...]:
        """The units in their order."""
        words = split_words(text)
        units: list[str] = []
        start = place = 0
        while place < len(words):
            if length := self._length_at(words, place):
                units += self.rest("".join(words[start:place]))
                units.append("".join(words[place : place + length]))
                start = place + length
            place += length or 1
        return (*units, *self.rest("".join(words[start:])))

    def _length_at(self, words: list[str], place: int) -> int:
        """The number of words of the longest name that begins there; 0 if none does."""
        return next((n for n in self._lengths if _core("".join(words[place : place + n])) in self._bare), 0)


def _core(name: str) -> str:
    """A name with single spaces, without punctuation around it or a possessive ending."""
    return _AROUND.sub("", " ".join(name.split()))
