"""Tokenizers that say where their tokens stand: whole words, byte-level BPE, and any `tokenizer.json`."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

WORD = re.compile(r"['’]s\b|\w+(?:['’-](?!s\b)\w+)*|[^\w\s]")
"""A word, a possessive 's or a mark of punctuation."""


class Encoding(NamedTuple):
    """The tokens of a text, and the first and past-the-end character of each.

    Tokens that a tokenizer adds by itself, such as one for the beginning of a text, stand for no character: (0, 0).
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@runtime_checkable
class Tokenizer(Protocol):
    """What the editors ask of a tokenizer."""

    @property
    def size(self) -> int:
        """How many tokens there are: every id is less."""
        ...

    def encode(self, text: str) -> Encoding:
        """The tokens of a text."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some tokens."""
        ...


def check_size(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuse a tokenizer that has tokens the model does not know; a model may know more.

    Args:
        tokenizer: the tokenizer.
        vocabulary: how many tokens the model knows.
    """
    if tokenizer.size > vocabulary:
        message = f"The tokenizer has {tokenizer.size} tokens, but the model knows {vocabulary}; "
        raise ValueError(message + "give the tokenizer with which the model was trained.")


@dataclass(frozen=True)
class WordTokenizer:
    """A token for each whole word or mark of punctuation; white space is no part of a token.

    Attributes:
        words: the word of each token.
        unknown: the word, one of `words`, that stands for words that are not among them; by default they are refused.

    Example:
        >>> WordTokenizer(("Ann", "sings", ".")).encode("Ann sings.")
        Encoding(ids=(0, 1, 2), offsets=((0, 3), (4, 9), (9, 10)))
    """

    words: tuple[str, ...]
    unknown: str | None = None
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Number the words."""
        object.__setattr__(self, "_numbers", {word: number for number, word in enumerate(self.words)})
        if len(self._numbers) < len(self.words):
            raise ValueError("The words of a WordTokenizer must differ; drop those that come again.")
        if self.unknown is not None and self.unknown not in self._numbers:
            raise ValueError(f"The word for unknown words, {self.unknown!r}, must be one of the words.")

    @property
    def size(self) -> int:
        """How many words there are."""
        return len(self.words)

    def encode(self, text: str) -> Encoding:
        """The words of a text.

        Raises:
            ValueError: a word is unknown, and no word stands for unknown ones.
        """
        found = list(WORD.finditer(text))
        return Encoding(tuple(self._number(match[0]) for match in found), tuple(match.span() for match in found))

    def _number(self, word: str) -> int:
        for known in (word, self.unknown):
            if known in self._numbers:
                return self._numbers[known]
        message = f"The word {word!r} is not one of the {self.size} that the tokenizer knows; "
        raise ValueError(message + "use other words, or name one that stands for unknown words (`unknown`).")

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The words with a space between them."""
        return " ".join(self.words[number] for number in ids)


@dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer of the package `tokenizers`; see `load_tokenizer` and `train_byte_bpe`.

    Attributes:
        inner: the `tokenizers.Tokenizer`.
        special: whether `encode` adds what the tokenizer adds by itself, such as Llama's token for the beginning.
    """

    inner: Any
    special: bool = True

    @property
    def size(self) -> int:
        """How many tokens there are, added ones included."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Encoding:
        """The tokens of a text."""
        encoding = self.inner.encode(text, add_special_tokens=self.special)
        return Encoding(tuple(encoding.ids), tuple(encoding.offsets))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some tokens, without special ones."""
        return self.inner.decode([int(number) for number in ids])


def load_tokenizer(path: str | os.PathLike[str], *, special: bool = True) -> FileTokenizer:
    """The tokenizer of a Hugging Face model.

    Args:
        path: a `tokenizer.json`, or the folder that has one.
        special: see `FileTokenizer`.

    Raises:
        ValueError: the file is no tokenizer.
        FileNotFoundError: there is none.
        ImportError: the package `tokenizers` is missing.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no tokenizer at {file}; give a 'tokenizer.json' or the folder that has one.")
    try:
        return FileTokenizer(_package().Tokenizer.from_file(str(file)), special)
    except ImportError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file} is no tokenizer ({error}); give a 'tokenizer.json' of Hugging Face.") from error


def train_byte_bpe(texts: Iterable[str], size: int) -> FileTokenizer:
    """A byte-level BPE tokenizer of some texts: it knows every text, and a word carries the space before it.

    Args:
        texts: what to learn the merges from.
        size: how many tokens it may have, at least the 256 bytes.

    Raises:
        ValueError: there are fewer tokens than bytes.
        ImportError: the package `tokenizers` is missing.
    """
    if size < 256:
        raise ValueError(f"A byte-level tokenizer of {size} tokens cannot spell every byte; allow 256 or more.")
    package = _package()
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    inner = package.Tokenizer(package.models.BPE())
    inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return FileTokenizer(inner)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        message = "The package 'tokenizers' is missing; install the extra `text` (pip install 'permjax[text]')."
        raise ImportError(message) from error
    return tokenizers
