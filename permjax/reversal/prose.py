"""Ordinary text as sentences to train on, for the price that permuted units have in original order."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from permjax.io.tokenizers import WORD
from permjax.reversal.corpus import Corpus
from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import Segmenter, check_units
from permjax.reversal.vocabulary import SPECIAL, Vocabulary

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n\s*\n")


class Prose(NamedTuple):
    """Sentences in units, to train on and to test with, and the words that are known."""

    train: Corpus
    test: Corpus
    words: Vocabulary


def prose(
    text: str, *, words: int = 4000, longest: int = 40, test_share: float = 0.1, segmenter: Segmenter | None = None
) -> Prose:
    """A text as sentences of which each is a document; the end of the text is for testing.

    Args:
        text: any; `<unk>` counts as a word.
        words: the most frequent words of the part for training are known, in lower case; others are `<unknown>`.
        longest: words of a sentence; longer ones are cut.
        test_share: the part for testing, between 0 and 1.
        segmenter: of the sentences; `RuleSegmenter` by default.

    Raises:
        ValueError: the text has no two sentences.

    Example:
        >>> prose("The dog barks. The cat sleeps.", test_share=0.5).test.texts
        ['The cat sleeps.']
    """
    found = list(_sentences(text.replace("<unk>", "unk"), longest))
    cut = len(found) - max(1, round(test_share * len(found)))
    if cut < 1:
        raise ValueError(f"The text has {len(found)} sentences, of which none is left for training; give a longer one.")
    counts = Counter(word.lower() for sentence in found[:cut] for word in WORD.findall(sentence))
    known = Vocabulary((*SPECIAL, *(word for word, _ in counts.most_common(words))))
    segmenter = RuleSegmenter() if segmenter is None else segmenter
    documents = [check_units(sentence, segmenter(sentence)) for sentence in found]
    train, test = (Corpus(tuple(some), (), ()) for some in (documents[:cut], documents[cut:]))
    return Prose(train, test, known)


def _sentences(text: str, longest: int) -> Iterator[str]:
    """Yield the sentences, white space as one space, in pieces of so many words at most."""
    for sentence in _SENTENCE.split(text):
        ends = [match.end() for match in WORD.finditer(sentence)]
        begin = 0
        for end in [*ends[longest - 1 : -1 : longest], *ends[-1:]]:
            yield " ".join(sentence[begin:end].split())
            begin = end
