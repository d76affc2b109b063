"""Cutting English text into phrases by rules alone: no model, no data, over a million words a second."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from permjax.reversal.grammar import ATTACHED, SMALL, phrases
from permjax.reversal.lexicon import word_class
from permjax.reversal.segment import join_words

# A new line opens the next unit. A word is any run that is no punctuation, joined by hyphens, apostrophes and the like.
_MARKS = r"\s.,:;!?()\[\]{}<>\"'‘’“”…`~|/\\*–—¿¡"
_PIECE = re.compile(
    rf"""\s+\Z
    | [^\S\n]*\n\s*
    | \s* (?: (?:Mr|Mrs|Ms|Dr|St|Prof|Jr|Sr|Gen|Sen|Rep|Gov|Lt|Col|vs|etc)\. (?=\s)
            | (?:[^\W\d_]\.){{2,}}
            | [^\W\d_]\. (?=\s[A-Z])
            | [^{_MARKS}]+ (?: (?:['’./@]|(?<=\d)[,:](?=\d)) [^{_MARKS}]+ | ['’](?=\s) )*
            | \.{{2,}} | -- | \S )
    """,
    re.VERBOSE,
)

# What a word is by its neighbours: a name inside a sentence, an auxiliary after a pronoun, a verb where one is due,
# else a noun. Each pattern begins with the class that it changes, which is what makes the search fast.
_VERB = r"(?<=[Mu].)|(?<=[Mu][rx].)|(?<=t.)(?=[dhuNit])|(?<=[nN].)(?=[du])|(?<=[tqhx]b)|(?<=b)(?=[du])"
_CONTEXT = (
    ("A", re.compile(r"A(?:(?<=[^.(\"]A)|(?=N))"), "N"),
    ("h", re.compile("h(?=n)"), "d"),
    ("s", re.compile("s(?<=[uqh]s)"), "m"),
    ("", re.compile(f"[nb](?:{_VERB})"), "v"),
    ("D", re.compile("n(?<=Dn)"), "j"),
)
_RESOLVED = str.maketrans("AbMDh", "vnmrq")

_LEVELS = 4


def pieces(text: str) -> list[str]:
    """Words and punctuation marks, each with the white space before it; joined they are the text.

    Example:
        >>> pieces("Dr. Who's here.")
        ['Dr.', " Who's", ' here', '.']
    """
    found = _PIECE.findall(text)
    if len(found) > 1 and found[-1].isspace():
        found[-2:] = ["".join(found[-2:])]
    return found


@dataclass(frozen=True)
class RuleSegmenter:
    """English phrases: names, noun and verb phrases, each with its punctuation.

    Attributes:
        attach: whether prepositions, conjunctions and the like go with the phrase after them; else they stand alone.
        longest: neighbouring phrases are joined, the most closely bound first, while a unit has at most so many words
            and no punctuation inside; 0 joins none. Names stay units of their own.

    Example:
        >>> RuleSegmenter()("Kate Mara's mother is Kathleen McNulty Rooney.")
        ("Kate Mara's mother", ' is', ' Kathleen McNulty Rooney.')
    """

    attach: bool = True
    longest: int = 5

    def __call__(self, text: str) -> tuple[str, ...]:
        """The phrases of a text in their order."""
        words = pieces(text)
        return join_words(words, self.lengths(words))

    def lengths(self, words: Sequence[str]) -> list[int]:
        """The number of words in each unit of a text that is cut into words and punctuation marks already."""
        parts = self.phrases(words)
        return [len(part) for part in (_joined(parts, self.longest) if self.longest else parts)]

    def phrases(self, words: Sequence[str]) -> list[str]:
        """The units as strings of word classes (see `permjax.reversal.grammar`), before any is joined."""
        return phrases(classify(words), ATTACHED if self.attach else SMALL)


def classify(words: Sequence[str]) -> str:
    """The class of each word, by its form and then by its neighbours."""
    classes = "".join(map(word_class, words))
    for needed, pattern, letter in _CONTEXT:
        if needed in classes:
            classes = pattern.sub(letter, classes)
    return classes.translate(_RESOLVED)


def _joined(parts: list[str], longest: int) -> list[str]:
    """Phrases joined level by level, from the most closely bound pairs on."""
    for level in range(1, _LEVELS):
        kept: list[str] = []
        for part in parts:
            if kept and len(kept[-1]) + len(part) <= longest and _distance(kept[-1], part) <= level:
                kept[-1] += part
            else:
                kept.append(part)
        parts = kept
    return parts


def _distance(left: str, right: str) -> int:
    """How loosely two phrases are bound: 1 the closest, `_LEVELS` never joined."""
    if left[-1] == "." or right[0] in "(k" or "N" in left or "N" in right:
        return _LEVELS
    if left[-1] in "uqikt(" or right[0] in "xp":
        return 1
    if left[-1] in "vmgexp":
        return 2
    return 3
