"""A tokenizer of whole words for small corpora: no downloads, and a token never has two words."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<unknown>", "<original>", "<reversed>", "<random>")
"""The first words of every vocabulary; the last three are the tags of orders."""
PAD, BOS, EOS, MASK, UNKNOWN = range(5)
TAGS = (5, 6, 7)

_WORD = re.compile(r"['’]s\b|\w+(?:['’-](?!s\b)\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers. It is an encoder for `permjax.reversal.tokens`: call it on a text.

    Words are lower-cased, and a possessive 's and punctuation stand alone. White space is no part of a token, so that
    a word has the same token wherever it stands.

    Attributes:
        words: the special ones first.

    Example:
        >>> Vocabulary.of(["Ann's cat."])("The cat")
        ([4, 10], [(0, 3), (4, 7)])
    """

    words: tuple[str, ...]
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Number the words."""
        object.__setattr__(self, "_numbers", {word: number for number, word in enumerate(self.words)})

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Vocabulary":
        """The words of some texts in the order in which they come."""
        words = dict.fromkeys(word.lower() for text in texts for word in _WORD.findall(text))
        return cls((*SPECIAL, *words))

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.words)

    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The numbers of the words of a text, and the characters of each."""
        found = list(_WORD.finditer(text))
        return [self._numbers.get(match[0].lower(), UNKNOWN) for match in found], [match.span() for match in found]

    def ids(self, text: str) -> list[int]:
        """The numbers of the words of a text."""
        return self(text)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The words of some numbers, with a space between them."""
        return " ".join(self.words[number] for number in ids)
