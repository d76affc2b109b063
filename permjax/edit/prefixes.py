"""Texts that stand before a prompt, so that a key is that of the subject and not of its place."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from permjax.io.tokenizers import Tokenizer
from permjax.nets.base import Net
from permjax.nets.generation import sample
from permjax.nets.language import Weights

STARTS = ("The", "Therefore", "Because", "I", "You")


def random_prefixes(texts: Sequence[str], key: Array, *, count: int, words: tuple[int, int] = (3, 8)) -> list[str]:
    """Pieces of some texts, cut at white space.

    Args:
        texts: any with enough words.
        key: a random key.
        count: how many pieces.
        words: the least and the largest number of words of a piece.

    Raises:
        ValueError: no text has that many words.
    """
    least, most = words
    split = [found for text in texts if len(found := text.split()) >= most]
    if not split:
        raise ValueError(f"None of the {len(texts)} texts has {most} words; give longer texts or ask for fewer words.")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    prefixes = []
    for _ in range(count):
        found, size = split[rng.integers(len(split))], rng.integers(least, most + 1)
        start = rng.integers(len(found) - size + 1)
        prefixes.append(" ".join(found[start : start + size]))
    return prefixes


def sampled_prefixes(
    net: Net,
    params: Weights,
    tokenizer: Tokenizer,
    key: Array,
    *,
    lengths: Sequence[tuple[int, int]] = ((5, 10), (10, 10)),
    starts: Sequence[str] = STARTS,
    end: str = ".",
    top: int = 5,
) -> list[str]:
    """Texts that the model writes itself, as ROME and MEMIT use them.

    Args:
        net: a language model.
        params: its weights.
        tokenizer: that of the model.
        key: a random key.
        lengths: pairs of a number of tokens and how many texts of so many tokens; the start counts.
        starts: how the texts begin, in turn; by default as in MEMIT (ROME starts with the token for the end of a text).
        end: what is written behind each text.
        top: each token is drawn from the so many likeliest.

    Raises:
        ValueError: a start has more tokens than a text is to have, or the model has fewer positions.

    Source:
        Meng et al., 2022 (arXiv 2202.05262), section 3.1 and the appendix on causal averages over prefixes: 20 texts,
        10 of 5 and 10 of 10 tokens.
    """
    sizes = [size for size, count in lengths for _ in range(count)]
    heads = [tokenizer.encode(starts[row % len(starts)]).ids for row in range(len(sizes))]
    for head, size in zip(heads, sizes, strict=True):
        if len(head) > size:
            message = f"A start has {len(head)} tokens, but a prefix is to have {size}; "
            raise ValueError(message + "ask for longer prefixes or give other starts.")
    widths = [len(head) for head in heads]
    tokens = np.asarray([[*head, *[0] * (max(widths) - len(head))] for head in heads], np.int32)
    steps = max(size - width for size, width in zip(sizes, widths, strict=True))
    drawn = np.asarray(sample(net, params, tokens, np.asarray(widths, np.int32), key, steps=max(steps, 1), top=top))
    rows = [[*head, *new[: size - len(head)]] for head, new, size in zip(heads, drawn, sizes, strict=True)]
    return [tokenizer.decode(row).strip() + end for row in rows]
