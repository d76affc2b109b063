"""Phrases from a spaCy pipeline: a downloaded one, or a tagger trained from scratch on tagged text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from permjax.reversal.grammar import ATTACHED, SMALL, phrases
from permjax.reversal.segment import SegmentError, cut_text
from permjax.reversal.tagged import TaggedSentence, penn_classes

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc


@dataclass(frozen=True, eq=False)
class SpacySegmenter:
    """Units by what a spaCy pipeline knows of a text.

    With a parser: noun chunks, entities and what lies between them, inside sentences. Else with a tagger of Penn
    Treebank tags: phrases by the grammar of `permjax.reversal.grammar`. Else with entities alone: those and what lies
    between them. Punctuation stays with its unit.

    Attributes:
        nlp: the pipeline, such as `spacy.load("en_core_web_sm")` or that of `train_tagger`.
        attach: with a tagger, whether prepositions, conjunctions and the like go with the phrase after them.

    Example:
        >>> SpacySegmenter(train_tagger(sentences))("The dog barks.")  # doctest: +SKIP
        ('The dog', ' barks.')
    """

    nlp: "Language"
    attach: bool = True

    def __call__(self, text: str) -> tuple[str, ...]:
        """The units in their order.

        Raises:
            SegmentError: the pipeline has neither a parser, a tagger nor entities.
        """
        doc = self.nlp(text)
        ends = [token.idx + len(token) for token in doc]
        return cut_text(text, (ends[first - 1] for first in self._firsts(doc) if first)) if ends else _whole(text)

    def _firsts(self, doc: "Doc") -> Iterable[int]:
        """The first token of each unit."""
        if doc.has_annotation("DEP"):
            starts = [sentence.start for sentence in doc.sents]
            return _around(doc, [*doc.ents, *doc.noun_chunks], starts)
        if doc.has_annotation("TAG"):
            classes = penn_classes([token.text for token in doc], [token.tag_ for token in doc])
            return [*accumulate(map(len, phrases(classes, ATTACHED if self.attach else SMALL)))][:-1]
        if doc.has_annotation("ENT_IOB"):
            return _around(doc, doc.ents, [])
        message = f"The spaCy pipeline has only the components {self.nlp.pipe_names}, which know no phrase; "
        raise SegmentError(message + "give one with a parser, a tagger or an entity recogniser, or use train_tagger.")


def _whole(text: str) -> tuple[str, ...]:
    return (text,) if text else ()


def _around(doc: "Doc", spans: Iterable[Any], starts: Iterable[int]) -> list[int]:
    """The first token of each span and of what follows it; an end inside another span counts for nothing."""
    borders = {border for span in spans for border in (span.start, span.end)}
    inside = {place for span in spans for place in range(span.start + 1, span.end)}
    cut = [place in starts or place in borders - inside for place in range(len(doc) + 1)]
    for place, token in enumerate(doc):
        if cut[place] and _closes(token):
            cut[place], cut[place + 1] = False, True
    for place in range(len(doc) - 1, 0, -1):
        if cut[place] and _opens(doc[place - 1]):
            cut[place], cut[place - 1] = False, True
    return [place for place in range(len(doc)) if cut[place]]


def _closes(token: Any) -> bool:
    """Whether it goes with the word before it; a quotation mark does if nothing parts them."""
    if token.is_quote:
        return token.i > 0 and not token.nbor(-1).whitespace_
    return (token.is_punct and not token.is_left_punct) or token.text in ("'s", "’s")


def _opens(token: Any) -> bool:
    """Whether it goes with the word after it."""
    return token.is_space or ((token.is_left_punct or token.is_quote) and not _closes(token))


def train_tagger(sentences: Sequence[TaggedSentence], *, epochs: int = 3, batch: int = 64, seed: int = 0) -> "Language":
    """A blank English pipeline with a tagger trained on these sentences alone; nothing is downloaded.

    Args:
        sentences: words and their Penn Treebank tags, such as those of `permjax.reversal.tagged.read_tagged`.
        epochs: how often each is seen.
        batch: sentences of a step.
        seed: of the weights and the order.

    Raises:
        ImportError: spaCy is not installed.
        SegmentError: there is no sentence.
    """
    if not sentences:
        raise SegmentError("A tagger needs tagged sentences to learn from, but there is none.")
    spacy = _spacy()
    spacy.util.fix_random_seed(seed)
    nlp = spacy.blank("en")
    nlp.add_pipe("tagger")
    examples = [_example(nlp, sentence) for sentence in sentences]
    optimizer = nlp.initialize(lambda: examples)
    rng = Random(seed)
    for _ in range(epochs):
        rng.shuffle(examples)
        for start in range(0, len(examples), batch):
            nlp.update(examples[start : start + batch], sgd=optimizer, drop=0.1)
    return nlp


def _example(nlp: "Language", sentence: TaggedSentence) -> Any:
    from spacy.tokens import Doc
    from spacy.training import Example

    return Example.from_dict(Doc(nlp.vocab, words=list(sentence.words)), {"tags": list(sentence.tags)})


def _spacy() -> Any:
    try:
        import spacy
    except ImportError:
        message = "A spaCy segmenter needs spaCy, which is not installed; it comes with the extra `permjax[text]`."
        raise ImportError(message) from None
    return spacy
