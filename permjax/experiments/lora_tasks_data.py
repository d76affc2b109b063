"""Generated tasks: a word, a row of symbols, and the symbol that the word asks for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from permjax.tree import nearest

Symbols = Int[np.ndarray, "n length"]
Answers = Int[np.ndarray, " n"]


def _counts(x: Symbols) -> Int[np.ndarray, "n symbols"]:
    """How often each symbol stands in each row."""
    return (x[:, :, None] == np.arange(x.max(initial=0) + 1)).sum(1)


def _most_frequent(x: Symbols) -> Answers:
    return _counts(x).argmax(1)


def _at(place: int) -> Callable[[Symbols], Answers]:
    return lambda x: x[:, place]


def _ranked(place: int) -> Callable[[Symbols], Answers]:
    return lambda x: np.sort(x, 1)[:, place]


OPERATIONS: dict[str, Callable[[Symbols], Answers]] = {
    "first": _at(0),
    "second": _at(1),
    "third": _at(2),
    "fourth": _at(3),
    "fifth": _at(4),
    "sixth": _at(5),
    "next_to_last": _at(-2),
    "last": _at(-1),
    "largest": _ranked(-1),
    "second_largest": _ranked(-2),
    "second_smallest": _ranked(1),
    "smallest": _ranked(0),
    "most_frequent": _most_frequent,
}
"""What a word may ask for; of several most frequent symbols the smallest, and ranks count equal symbols apart."""


class Examples(NamedTuple):
    """Questions and their answers: the tokens `[n, length + 2]` and the token that follows `[n]`."""

    x: Int[np.ndarray, "n tokens"]
    y: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Language:
    """The tokens: symbols in their order, one word for each operation that is known, and the sign that asks.

    Attributes:
        symbols: how many there are.
        length: symbols in a row.
        known: what the words mean to the base model.
        tasks: the first words' new meanings, one for each task.
    """

    symbols: int = 10
    length: int = 8
    known: tuple[str, ...] = ("first", "third", "last", "largest", "smallest", "most_frequent", "fifth", "sixth")
    tasks: tuple[str, ...] = ("second", "fourth", "next_to_last", "second_largest", "second_smallest")

    def __post_init__(self) -> None:
        """Refuse operations that do not exist or are named twice, and rows that are too short for them."""
        named = (*self.known, *self.tasks)
        if unknown := [name for name in named if name not in OPERATIONS]:
            message = f"there is no operation {unknown[0]!r}{nearest(unknown[0], OPERATIONS)}; known are "
            raise ValueError(message + f"{', '.join(OPERATIONS)}.")
        if len(set(named)) < len(named):
            raise ValueError(f"an operation is named twice among {list(named)}; name every operation once.")
        if not 1 < len(self.tasks) < len(self.known):
            message = f"there are {len(self.tasks)} tasks and {len(self.known)} words that the base model knows; "
            raise ValueError(f"{message}give two tasks or more, and more words than tasks.")
        if self.symbols < 2 or self.length < 6:
            raise ValueError(f"2 symbols in rows of 6 are the least, not {self.symbols} in rows of {self.length}.")

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.symbols + len(self.known) + 1

    @property
    def tokens(self) -> int:
        """Tokens of a question."""
        return self.length + 2

    @property
    def meanings(self) -> dict[int, str]:
        """What the words mean to the base model."""
        return {self.symbols + i: name for i, name in enumerate(self.known)}

    @property
    def untouched(self) -> dict[int, str]:
        """The words that no task changes."""
        return {word: name for word, name in self.meanings.items() if word >= self.symbols + len(self.tasks)}

    def new(self, task: str) -> dict[int, str]:
        """The word of a task and its new meaning."""
        return {self.symbols + self.tasks.index(task): task}

    def trials(self, count: int, rng: np.random.Generator) -> Examples:
        """Questions of every task, and of the untouched words as one more set: `[tasks + 1, count, tokens]`."""
        sets = [self.examples(words, count, rng) for words in (*map(self.new, self.tasks), self.untouched)]
        return Examples(*(np.stack(arrays) for arrays in zip(*sets, strict=True)))

    def examples(self, meanings: Mapping[int, str], count: int, rng: np.random.Generator) -> Examples:
        """Questions with one of some words each, all alike often, and the right answers."""
        which = rng.integers(0, len(meanings), count)
        rows = rng.integers(0, self.symbols, (count, self.length))
        answers = np.stack([OPERATIONS[name](rows) for name in meanings.values()])[which, np.arange(count)]
        x = np.column_stack([np.array([*meanings])[which], rows, np.full(count, self.vocabulary - 1)])
        return Examples(x.astype(np.int32), answers.astype(np.int32))

    def lessons(self, tasks: Sequence[str], count: int, replayed: float, rng: np.random.Generator) -> Examples:
        """What an adapter learns from: its tasks, and a share of questions with the other words as they were."""
        new = {word: name for task in tasks for word, name in self.new(task).items()}
        old = {word: name for word, name in self.meanings.items() if word not in new}
        share = round(replayed * count)
        parts = self.examples(new, count - share, rng), self.examples(old, share, rng)
        return Examples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
