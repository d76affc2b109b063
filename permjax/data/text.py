"""Text as characters: a reader of any text file, and sentences made from a seed."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from jaxtyping import Int

from permjax.data.dataset import Dataset
from permjax.data.images import require

_ONSETS = ("b", "ch", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "th", "v", "z")
_VOWELS = ("a", "ai", "e", "i", "o", "ou", "u")
_NOUNS, _VERBS, _ADJECTIVES = 60, 30, 20
_CHOICES = 4  # words that may follow another one


@dataclass(frozen=True, eq=False)
class TextDataset(Dataset):
    """Windows of a text: `x_train` and `x_test` are characters [n, t], the labels those that follow them.

    Attributes:
        y_train: the next character at every place, shape [n, t].
        y_test: the same for testing, shape [m, t].
    """

    y_train: Int[np.ndarray, "n t"]
    y_test: Int[np.ndarray, "m t"]

    @property
    def vocabulary(self) -> str:
        """All characters in the order of their numbers."""
        return "".join(self.classes)


def text(path: str | Path, *, length: int = 64, characters: int | None = None, test_share: float = 0.1) -> TextDataset:
    """A text file as windows of characters; the end of the text is for testing.

    Args:
        path: the file, in UTF-8. Its characters in their order are the vocabulary.
        length: characters of a window.
        characters: how many to read from the start of the file; all by default.
        test_share: the part of them that is for testing.

    Raises:
        MissingData: there is no such file.
        ValueError: the file is not in UTF-8, or too short for a window on each side of the split.
    """
    content = read_text(path, "the option `path`")
    return windows(content[:characters], length=length, test_share=test_share, name=Path(path).stem)


def read_text(path: str | Path, setting: str = "`data.root` of the configuration or PERMJAX_DATA") -> str:
    """A text file in UTF-8.

    Args:
        path: the file.
        setting: what names it, for the message.

    Raises:
        MissingData: there is no such file.
        ValueError: it is not in UTF-8.
    """
    path = require(Path(path), "a text file", setting)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); convert it first."
        raise ValueError(message) from None


def sentences(*, seed: int = 0, length: int = 64, characters: int = 200_000, test_share: float = 0.1) -> TextDataset:
    """Sentences of an invented language, about as hard to foretell as a simple book; no file is needed.

    Words are made of syllables; verbs end like their subjects, and every noun and verb goes with a few others only.

    Args:
        seed: of the language and of the sentences.
        length: characters of a window.
        characters: how long the text is.
        test_share: the part of it that is for testing.
    """
    content = invented(seed, characters)
    return windows(content, length=length, test_share=test_share, name="invented sentences")


def windows(content: str, *, length: int, test_share: float, name: str) -> TextDataset:
    """A text cut into windows that do not overlap, the first ones for training.

    Raises:
        ValueError: the text is too short for one window on each side, or the share does not lie between 0 and 1.
    """
    if not 0 < test_share < 1 or length < 1:
        raise ValueError(
            f"test_share must lie between 0 and 1 and length be at least 1, not {test_share} and {length}."
        )
    vocabulary, numbers = np.unique(np.array(list(content), dtype=np.str_), return_inverse=True)
    cut = len(content) - round(test_share * len(content))
    parts = numbers[:cut].astype(np.int32), numbers[cut:].astype(np.int32)
    if min(map(len, parts)) <= length:
        message = (
            f"The text {name} has {len(parts[0])} characters for training and {len(parts[1])} for testing, but a "
            f"window and the character after it need {length + 1}; give a longer text, or a shorter length."
        )
        raise ValueError(message)
    (x_train, y_train), (x_test, y_test) = (_cut(part, length) for part in parts)
    return TextDataset(x_train, y_train, x_test, y_test, tuple(vocabulary.tolist()), name)


def _cut(numbers: Int[np.ndarray, " n"], length: int) -> tuple[np.ndarray, np.ndarray]:
    count = (len(numbers) - 1) // length
    return tuple(numbers[i : i + count * length].reshape(count, length) for i in (0, 1))  # pyright: ignore


# the invented language


def invented(seed: int, characters: int) -> str:
    """Sentences up to that length: article, adjective or none, noun, verb, and an object of the same make."""
    rng = Random(seed)
    nouns, verbs, adjectives = (_words(rng, count) for count in (_NOUNS, _VERBS, _ADJECTIVES))
    verbs_after = [rng.choices(verbs, k=_CHOICES) for _ in nouns]
    objects_after = {verb: rng.choices(range(_NOUNS), k=_CHOICES) for verb in verbs}
    adjectives_before = [rng.choices(adjectives, k=_CHOICES) for _ in nouns]

    def phrase(noun: int, many: bool) -> str:
        adjective = f"{rng.choice(adjectives_before[noun])} " if rng.random() < 0.4 else ""
        return f"{'lo' if many else 'ne'} {adjective}{nouns[noun]}{'s' if many else ''}"

    pieces, total = [], 0
    while total < characters:
        subject, one, two = rng.randrange(_NOUNS), rng.random() < 0.5, rng.random() < 0.5
        verb = rng.choice(verbs_after[subject])
        sentence = (
            f"{phrase(subject, one)} {verb}{'en' if one else 'it'} {phrase(rng.choice(objects_after[verb]), two)}"
        )
        pieces.append(sentence.capitalize() + (".\n" if rng.random() < 0.3 else ". "))
        total += len(pieces[-1])
    return "".join(pieces)[:characters]


def _words(rng: Random, count: int) -> list[str]:
    syllables = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count)]
