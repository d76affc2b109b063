"""Phrases from spaCy: by a parser, a tagger trained here, or entities alone; always the text."""

import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from permjax.reversal.segment import SegmentError, check_units
from permjax.reversal.spacy_segmenter import SpacySegmenter, train_tagger
from permjax.reversal.tagged import parse

pytestmark = pytest.mark.fast

TAGGED = """The_DT small_JJ dog_NN sees_VBZ Ann_NNP Lee_NNP ._.
A_DT bird_NN in_IN the_DT tree_NN sings_VBZ ,_, and_CC the_DT cat_NN sleeps_VBZ ._.
Tom_NNP Hill_NNP gives_VBZ the_DT big_JJ bird_NN to_TO Ann_NNP ._.
She_PRP sees_VBZ a_DT small_JJ tree_NN near_IN the_DT dog_NN ._."""


def test_without_spacy_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"not installed; .*permjax\[text\]"):
        train_tagger(list(parse(TAGGED.splitlines())))


def test_a_tagger_needs_sentences():
    with pytest.raises(SegmentError, match="needs tagged sentences"):
        train_tagger([])


@pytest.fixture(scope="module")
def spacy():
    import spacy

    return spacy


@pytest.fixture(scope="module")
def tagger(spacy):
    return train_tagger(list(parse(TAGGED.splitlines())) * 4, epochs=12, batch=8)


def test_a_tagger_trained_from_scratch_finds_the_phrases_that_it_saw(tagger):
    text = "A small bird near the dog sees Tom Hill, and she gives the cat to Ann."
    small = SpacySegmenter(tagger, attach=False)(text)
    assert {"A small bird", " near", " the dog", " Tom Hill,", " the cat"} <= set(small)
    assert " near the dog" in SpacySegmenter(tagger)(text)


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(["the dog", " ", '"', "'s", "👩", "\n"])).map("".join)))
def test_units_of_a_tagger_tile_any_text(tagger, text):
    check_units(text, SpacySegmenter(tagger)(text))


def test_a_parser_gives_noun_chunks_entities_and_what_lies_between(spacy):
    def parsed(text):
        words = ["(", "The", "small", "dog", ")", "often", "sees", "Ann", "Lee", "'s", "bird", ".", "It", "sings", "."]
        spaces = [word not in ("(", "dog", "Lee", "bird", "sings") for word in words[:-1]] + [False]
        heads = [3, 3, 3, 6, 3, 6, 6, 8, 10, 8, 6, 6, 13, 13, 13]
        deps = "punct det amod nsubj punct advmod ROOT compound poss case dobj punct nsubj ROOT punct".split()
        pos = "PUNCT DET ADJ NOUN PUNCT ADV VERB PROPN PROPN PART NOUN PUNCT PRON VERB PUNCT".split()
        doc = spacy.tokens.Doc(nlp.vocab, words, spaces, heads=heads, deps=deps, pos=pos)
        assert doc.text == text
        doc.ents = [spacy.tokens.Span(doc, 7, 9, label="PERSON")]
        return doc

    nlp = spacy.blank("en")
    nlp.make_doc = parsed
    text = "(The small dog) often sees Ann Lee's bird. It sings."
    assert SpacySegmenter(nlp)(text) == ("(The small dog)", " often sees", " Ann Lee's bird.", " It", " sings.")


def test_entities_alone_are_units_with_the_rest_between(spacy):
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Ann Lee"}])
    text = 'Tom met "Ann Lee", then slept.  '
    assert SpacySegmenter(nlp)(text) == ("Tom met", ' "Ann Lee",', " then slept.  ")
    assert SpacySegmenter(nlp)("") == ()


def test_a_pipeline_that_knows_no_phrase_is_refused(spacy):
    with pytest.raises(SegmentError, match="know no phrase"):
        SpacySegmenter(spacy.blank("en"))("The dog barks.")
