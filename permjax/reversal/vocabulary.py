"""A tokenizer of whole words for small corpora: no downloads, and a token never has two words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from permjax.io.tokenizers import WORD

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<unknown>", "<original>", "<reversed>", "<random>")
"""The first words of every vocabulary; the last three are the tags of orders."""
PAD, BOS, EOS, MASK, UNKNOWN = range(5)
TAGS = (5, 6, 7)


class Special(NamedTuple):
    """The tokens that are no words.

    Attributes:
        begin: before a text that has no tag.
        end: after a text.
        pad: where nothing stands.
        mask: in the place of a hidden token; a model without one cannot be trained to fill masks.
        tags: of the original, the reversed and a random order; none for a model that was trained without.
    """

    begin: int
    end: int
    pad: int = PAD
    mask: int | None = None
    tags: tuple[int, int, int] | None = None

    @property
    def original(self) -> int:
        """What a text in original order begins with."""
        return self.begin if self.tags is None else self.tags[0]


WORD_TOKENS = Special(BOS, EOS, PAD, MASK, TAGS)
"""Those of a `Vocabulary`."""


def mask_of(special: Special) -> int:
    """The token of masks.

    Raises:
        ValueError: there is none.
    """
    if special.mask is None:
        raise ValueError("The model has no token for masks; take a method that foretells the next token.")
    return special.mask


@runtime_checkable
class Words(Protocol):
    """The tokens of a language model, as corpora and questions need them: `Vocabulary`, or those of a checkpoint."""

    @property
    def special(self) -> Special:
        """The tokens that are no words."""
        ...

    def __call__(self, text: str) -> tuple[Sequence[int], Sequence[Sequence[int]]]:
        """The tokens of a text, and the first and past-the-end character of each."""
        ...

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...


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
        words = dict.fromkeys(word.lower() for text in texts for word in WORD.findall(text))
        return cls((*SPECIAL, *words))

    @property
    def special(self) -> Special:
        """The tokens that are no words."""
        return WORD_TOKENS

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.words)

    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The numbers of the words of a text, and the characters of each."""
        found = list(WORD.finditer(text))
        return [self._numbers.get(match[0].lower(), UNKNOWN) for match in found], [match.span() for match in found]

    def ids(self, text: str) -> list[int]:
        """The numbers of the words of a text."""
        return self(text)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The words of some numbers, with a space between them."""
        return " ".join(self.words[number] for number in ids)
