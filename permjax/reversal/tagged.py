"""Reading text whose words carry their part of speech, `word_TAG word_TAG ...`, one sentence per line."""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from permjax.reversal.lexicon import word_class

_TAGS = {
    **dict.fromkeys(("DT", "PDT", "PRP$", "WP$"), "d"),
    **dict.fromkeys(("JJ", "JJR", "JJS"), "j"),
    **dict.fromkeys(("NN", "NNS"), "n"),
    **dict.fromkeys(("NNP", "NNPS"), "N"),
    **dict.fromkeys(("PRP", "EX"), "u"),
    **dict.fromkeys(("VB", "VBD", "VBZ", "VBP"), "v"),
    **dict.fromkeys(("RB", "RBR", "RBS"), "r"),
    **dict.fromkeys(("WDT", "WP", "WRB"), "q"),
    **{"CD": "c", "POS": "s", "MD": "m", "TO": "t", "VBG": "g", "VBN": "e", "RP": "p", "IN": "i", "CC": "k"},
    **dict.fromkeys((".", ",", ":", "''", ")", "-", "...", "-RRB-", "HYPH", "NFP"), "."),
    **dict.fromkeys(("(", "``", "-LRB-"), "("),
}


class TaggedSentence(NamedTuple):
    """The words of a sentence and the Penn Treebank tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_tagged(path: str | Path) -> dict[str, list[TaggedSentence]]:
    """The sentences of each document of a ZIP archive, such as the tagged Manually Annotated Sub-Corpus (MASC).

    Args:
        path: the archive; its members `*.txt` are the documents, of lines `word_TAG word_TAG ...`. Those without such
            a word are left out.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: it is no ZIP archive, or no document holds a tagged word.
    """
    path = Path(path)
    if not path.is_file():
        message = f"There is no archive {path} of tagged text; MASC is at https://anc.org (data, MASC, tagged)."
        raise FileNotFoundError(message)
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
            texts = {name: archive.read(name).decode("utf-8", errors="replace") for name in names}
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is no ZIP archive of tagged text.") from None
    documents = {name: sentences for name, text in texts.items() if (sentences := list(parse(text.splitlines())))}
    if not documents:
        raise ValueError(f"{path} holds no document of lines `word_TAG word_TAG ...`.")
    return documents


def parse(lines: Iterable[str]) -> Iterator[TaggedSentence]:
    """The sentences of lines `word_TAG word_TAG ...`; pieces without a tag are left out, and lines without a word."""
    for line in lines:
        pieces = (piece.rpartition("_") for piece in line.split())
        pairs = [(word, tag) for word, _, tag in pieces if word and tag and tag == tag.upper()]
        if pairs:
            yield TaggedSentence(*zip(*pairs, strict=True))


def held_out(documents: dict[str, list[TaggedSentence]], *, every: int = 5) -> tuple[list[TaggedSentence], ...]:
    """Sentences for writing or training a segmenter, and those of each `every`-th document for measuring it."""
    names = sorted(documents)
    measured = set(names[every - 1 :: every])
    parts = ([name for name in names if name not in measured], sorted(measured))
    return tuple([sentence for name in part for sentence in documents[name]] for part in parts)


def penn_classes(words: Sequence[str], tags: Iterable[str]) -> str:
    """The class of each word by its tag of the Penn Treebank, for `permjax.reversal.grammar`.

    Marks without a letter or digit have the class that they have by themselves, and words of unknown tags are `o`.

    Example:
        >>> penn_classes(["The", "dog", "barks", "."], ["DT", "NN", "VBZ", "."])
        'dnv.'
    """
    return "".join(map(_penn_class, words, tags))


def _penn_class(word: str, tag: str) -> str:
    if tag not in ("POS", "CD") and not any(map(str.isalnum, word)):
        return word_class(word)
    if tag == "RB" and word.lower() in ("not", "n't", "n’t"):
        return "x"
    return _TAGS.get(tag, "o")
