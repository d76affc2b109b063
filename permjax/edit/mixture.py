"""What a model of a generated world is trained and measured on: rows full of text, facts and sums."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from permjax.edit.facts import World, sums


class Shares(NamedTuple):
    """Shares of the documents of a mixture.

    Attributes:
        text: sentences of the text.
        facts: facts in either template, half of them behind three to eight words of text.
        sums: sums of two digits.
    """

    text: float = 0.4
    facts: float = 0.5
    sums: float = 0.1


MIXTURE = Shares()
KINDS = {"mixture": MIXTURE, "text": Shares(1, 0, 0), "facts": Shares(0, 1, 0), "sums": Shares(0, 0, 1)}
"""Mixtures by name."""


def mixture_rows(
    world: World, count: int, length: int, *, seed: int, shares: Shares = MIXTURE, held_out: bool = False
) -> Int[np.ndarray, "count length"]:
    """Rows of tokens that are full: a document at the start of each, and others behind it, the last one cut.

    Args:
        world: of which the documents are.
        count: how many rows.
        length: tokens of a row.
        seed: of the choice.
        shares: of text, facts and sums.
        held_out: take sentences of the text that are not trained on.
    """
    rng = np.random.default_rng((seed, int(held_out)))
    documents = _documents(world, rng, np.asarray(shares) / sum(shares), world.held_out if held_out else world.text)
    rows = np.zeros((count, length), np.int32)
    for row in rows:
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += world.tokenizer.encode(next(documents)).ids
        row[:] = tokens[:length]
    return rows


def _documents(world: World, rng: np.random.Generator, shares: np.ndarray, text: Sequence[str]) -> Iterator[str]:
    every = sums()
    while True:
        kind = rng.choice(len(shares), p=shares)
        if kind == 0:
            yield text[int(rng.integers(len(text)))]
        elif kind == 2:
            yield every[int(rng.integers(len(every)))]
        else:
            fact = world.facts[int(rng.integers(len(world.facts)))]
            told = fact.statement("first" if rng.random() < 0.5 else "mid")
            yield told if rng.random() < 0.5 else f"{_piece(rng, text)} {told}"


def _piece(rng: np.random.Generator, text: Sequence[str]) -> str:
    """Three to eight words of a sentence, or as many as it has before the mark at its end."""
    words = text[int(rng.integers(len(text)))].split()[:-1]
    size = min(int(rng.integers(3, 9)), len(words))
    start = int(rng.integers(len(words) - size + 1))
    return " ".join(words[start : start + size])
