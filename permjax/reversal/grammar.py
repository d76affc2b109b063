"""A grammar of phrases over word classes, one letter each: noun, verb, adjective and adverb phrases; the rest alone.

The classes: `d` determiner, `j` adjective, `c` number, `n` noun, `N` name, `s` possessive mark, `S` a noun with one,
`u` pronoun, `v` verb, `m` auxiliary, `t` to, `g` -ing form, `e` -ed form, `x` not, `r` adverb, `p` particle,
`i` preposition, `k` conjunction, `q` question word or complementiser, `o` anything else, `.` punctuation that closes,
`(` punctuation that opens, `"` a quotation mark that does either.
"""

import re
from collections.abc import Iterable
from itertools import accumulate

# Repetitions are bounded where a phrase may still fail, so that reading takes time linear in the words.
_MODIFIERS = "(?:r{0,3}[jcge]){0,8}"
_NOUNS = rf"(?:d+{_MODIFIERS}[nN]*|(?:r{{0,3}}[jc]{_MODIFIERS})?(?:[nN]+|(?=S)))(?:[sS]{_MODIFIERS}[nN]*)*|u|c+"
_VERBS = r"(?:[rx]{0,3}(?:t(?=[rx]{0,3}[mvge])|[mvge])x*)+p?"
_PHRASE = rf"(?:{_NOUNS}|{_VERBS}|[rx]*j+|[rx]+|[^(.])"

SMALL = re.compile(rf"[(.]*{_PHRASE}\.*|[(.]+")
ATTACHED = re.compile(rf"[(.]*(?:[ikqt]\(*(?=[^.])){{0,4}}{_PHRASE}\.*|[(.]+")

_TITLE = re.compile(r'"[djcnNsSik]{1,8}"')
_QUOTED = re.compile(r'"([^"]{0,400})"')


def phrases(classes: str, pattern: re.Pattern[str] = SMALL) -> list[str]:
    """The classes cut into phrases; joined they are as long as before.

    A short quotation of nouns, adjectives and the like is read as one name, so that titles stay whole.

    Args:
        classes: one letter per word.
        pattern: `SMALL` (prepositions, conjunctions and the like stand alone) or `ATTACHED` (they go with the phrase
            after them).

    Example:
        >>> phrases("djnvin.")
        ['djn', 'v', 'i', 'n.']
    """
    if '"' in classes:
        classes = _TITLE.sub(lambda match: "N" * len(match.group()), classes)
        classes = _QUOTED.sub(r"(\1.", classes).replace('"', ".")
    return pattern.findall(classes)


def noun_spans(parts: Iterable[str]) -> list[tuple[int, int]]:
    """First and past-the-end word of each noun phrase of two words or more, without the punctuation around it."""
    spans, parts = [], list(parts)
    for start, part in zip(accumulate(map(len, parts), initial=0), parts, strict=False):
        inner = part.strip("(.")
        if len(inner) > 1 and not set(inner).isdisjoint("nNS"):
            first = start + part.index(inner[0])
            spans.append((first, first + len(inner)))
    return spans
