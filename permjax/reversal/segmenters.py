"""Segmenters by name, for configurations and the command line."""

from collections.abc import Callable, Mapping

from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import (
    NGramSegmenter,
    RandomSegmenter,
    Segmenter,
    SegmentError,
    SentenceSegmenter,
    WordSegmenter,
)
from permjax.tree import nearest

_RANDOM_LENGTH = 5

SEGMENTERS: Mapping[str, Callable[[], Segmenter]] = {
    "rules": RuleSegmenter,
    "rules_phrases": lambda: RuleSegmenter(longest=0),
    "rules_small": lambda: RuleSegmenter(attach=False, longest=0),
    "words": WordSegmenter,
    **{f"ngram{n}": lambda n=n: NGramSegmenter(n) for n in (2, 3, 4, 5)},
    "random": lambda: RandomSegmenter(_RANDOM_LENGTH),
    "whole": SentenceSegmenter,
}


def segmenter(name: str) -> Segmenter:
    """A segmenter that needs neither data nor a model, by its name in `SEGMENTERS`.

    `rules` gives units of about three words, `rules_phrases` phrases with their prepositions, `rules_small` these
    apart; `words`, `ngram2` to `ngram5`, `random` (1 to 5 words) and `whole` are the baselines.

    Raises:
        SegmentError: there is no such name; the nearest is named.

    Example:
        >>> segmenter("ngram2")("one two three")
        ('one two', ' three')
    """
    if name not in SEGMENTERS:
        message = f"There is no segmenter {name!r}{nearest(name, SEGMENTERS)}; known are {', '.join(SEGMENTERS)}."
        raise SegmentError(message)
    return SEGMENTERS[name]()
