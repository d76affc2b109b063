"""Ordinary text as sentences: nothing is lost but white space, and the test part is the end."""

import pytest

from permjax.data.text import invented
from permjax.io.tokenizers import WORD
from permjax.reversal.prose import prose
from permjax.reversal.segment import WordSegmenter
from permjax.reversal.vocabulary import SPECIAL, UNKNOWN

pytestmark = pytest.mark.fast


def test_the_sentences_are_the_text_in_its_order():
    text = invented(0, 3000)
    found = prose(text, longest=5)
    pieces = [*found.train.texts, *found.test.texts]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(len(WORD.findall(piece)) for piece in pieces) <= 5
    assert len(found.test.documents) == round(0.1 * len(pieces))


def test_the_most_frequent_words_of_the_first_part_are_known():
    found = prose("a a b. a c d. b b a. z z z.", words=3, test_share=0.25)
    assert found.words.words[len(SPECIAL) :] == ("a", "b", ".")
    assert found.words.ids("z a <unk>")[0] == UNKNOWN
    assert found.test.texts == ["z z z."]


def test_units_are_those_of_the_segmenter_and_an_unknown_mark_is_a_word():
    found = prose("the <unk> barks. it sleeps.", test_share=0.5, segmenter=WordSegmenter())
    assert found.train.documents == (("the", " unk", " barks."),)


def test_a_text_of_one_sentence_is_refused():
    with pytest.raises(ValueError, match="1 sentences"):
        prose("only one")
