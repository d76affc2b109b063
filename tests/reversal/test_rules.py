"""Phrases by rules: what belongs together stays together, in text and in words that are cut already."""

import os
from itertools import accumulate
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from permjax.reversal.grammar import ATTACHED, SMALL, noun_spans, phrases
from permjax.reversal.lexicon import word_class
from permjax.reversal.rules import RuleSegmenter, classify, pieces
from permjax.reversal.segment import join_words
from permjax.reversal.segment_metrics import compare, unsplit_rate
from permjax.reversal.tagged import held_out, parse, penn_classes, read_tagged

pytestmark = pytest.mark.fast

SMALL_RULES = RuleSegmenter(attach=False, longest=0)
MASC = Path(os.environ.get("PERMJAX_DATA", "nowhere")) / "text" / "masc_tagged.zip"


def cut(text, **options):
    return " | ".join(map(str.strip, RuleSegmenter(**options)(text)))


@pytest.mark.parametrize(
    ("attach", "expected"),
    [
        (False, "Mason Caldwell, | who | was | in | the old city | of | dreams, | left | by | the first train."),
        (True, "Mason Caldwell, | who was | in the old city | of dreams, | left | by the first train."),
    ],
)
def test_function_words_stand_alone_or_go_with_the_phrase_after_them(attach, expected):
    text = "Mason Caldwell, who was in the old city of dreams, left by the first train."
    assert cut(text, attach=attach, longest=0) == expected


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("We saw Kathleen McNulty Rooney today.", " Kathleen McNulty Rooney"),
        ("Sasha Calle's mother is Samira.", "Sasha Calle's mother"),
        ('She built the "Stone Forest" installation.', ' the "Stone Forest" installation.'),
        ("They met Dr. J. K. Rowling there.", " Dr. J. K. Rowling"),
        ("It has not been seen.", " has not been seen."),
        ("He wants to carefully explain the rule.", " wants to carefully explain"),
        ("A very quick dog sees us.", "A very quick dog"),
        ("It cost 1,000.50 dollars (or more).", " (or more)."),
    ],
)
def test_what_belongs_together_is_one_unit(text, unit):
    assert unit in RuleSegmenter(longest=0)(text)


def test_a_new_line_begins_a_unit():
    assert RuleSegmenter()("Ann Lee\nTom Hill\n") == ("Ann Lee", "\nTom Hill\n")


def test_joined_units_stay_within_the_limit_and_names_stay_alone():
    text = "He talked about the discovery of the gene with Ann Lee in the garden."
    for longest in (3, 4, 6, 9):
        segmenter = RuleSegmenter(longest=longest)
        units = segmenter(text)
        base = RuleSegmenter(longest=0)(text)
        assert all(len(pieces(unit)) <= longest or unit in base for unit in units)
        assert " with Ann Lee" in units
    assert len(RuleSegmenter(longest=9)(text)) < len(RuleSegmenter(longest=0)(text))


@given(
    st.lists(st.sampled_from(['"', "(", ".", ",", "the", "dog", "Ann", "runs", "to", "", "very", "'s"]), max_size=40)
)
def test_lengths_of_cut_words_sum_to_their_number(words):
    for segmenter in (RuleSegmenter(), SMALL_RULES, RuleSegmenter(longest=0), RuleSegmenter(attach=False)):
        lengths = segmenter.lengths(words)
        assert sum(lengths) == len(words)
        assert all(lengths)


def test_text_and_its_own_pieces_are_cut_alike():
    text = 'Ann Lee, "who" knows (the) U.S. law, didn\'t run 3.5 miles -- she walked.'
    segmenter = RuleSegmenter()
    assert join_words(pieces(text), segmenter.lengths([piece.strip() for piece in pieces(text)])) == segmenter(text)


@given(st.text(alphabet='djcnNsSuvmtgexrpikqo.("', max_size=60))
def test_phrases_cover_all_classes_without_loss(classes):
    for pattern in (SMALL, ATTACHED):
        parts = phrases(classes, pattern)
        assert sum(map(len, parts)) == len(classes)
        assert all(parts)


def test_reading_takes_linear_time_even_on_the_worst_words():
    for worst in ("jg", "rj", "dr", "x", "(", "ik", "c", 't"', "rg", "jr"):
        assert sum(map(len, phrases(worst * 20_000, ATTACHED))) == 20_000 * len(worst)


def test_punctuation_stays_with_its_phrase():
    assert phrases('dn.kv(n)."n"."vun".'.replace(")", ".")) == ["dn.", "k", "v", "(n..", "NNN.", "(v", "u", "n.."]


def test_the_class_of_a_word_does_not_depend_on_the_space_before_it():
    for word in ("The", "dogs", '"', ".", "Ann's", "didn’t", "Known", "3rd", "👩", "quickly"):
        assert word_class(word) == word_class(f"  {word}") == word_class(f"\t{word}\u00a0")


def test_words_are_read_by_their_neighbours():
    words = "He can open the open door , and that man 's dog wants to play".split()
    assert classify(words) == "umvdnn.kdnsnvtv"


# tagged text


def gold(sentence):
    return phrases(penn_classes(sentence.words, sentence.tags))


def test_tagged_lines_are_read_and_odd_pieces_left_out():
    (sentence,) = parse(["The_DT dog_NN file_name_NN x/y.txt no_tag _NN ._. ", "", "spoken/2nd_Gore-Bush.txt debate"])
    assert sentence.words == ("The", "dog", "file_name", ".")
    assert gold(sentence) == ["dnn."]


def test_noun_phrases_are_found_without_their_punctuation():
    assert noun_spans(["(djn.", "v", "u", "n.", "dN"]) == [(1, 4), (9, 11)]


def test_a_missing_or_foreign_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.zip"):
        read_tagged(tmp_path / "nothing.zip")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match="no ZIP archive"):
        read_tagged(tmp_path / "text.zip")


@pytest.mark.data
@pytest.mark.skipif(not MASC.is_file(), reason="needs text/masc_tagged.zip under PERMJAX_DATA")
def test_rules_find_the_phrases_of_held_out_tagged_text():
    _, sentences = held_out(read_tagged(MASC))
    spaced = [[sentence.words[0], *(f" {word}" for word in sentence.words[1:])] for sentence in sentences]
    wanted = [join_words(words, list(map(len, gold(s)))) for words, s in zip(spaced, sentences, strict=True)]
    found = [join_words(words, SMALL_RULES.lengths(words)) for words in spaced]
    wholes = []
    for words, sentence in zip(spaced, sentences, strict=True):
        ends = [0, *accumulate(map(len, words))]
        wholes.append([(ends[first] + bool(first), ends[last]) for first, last in noun_spans(gold(sentence))])
    scores = compare(found, wanted)
    assert scores.boundary_f1 > 0.95
    assert scores.span_f1 > 0.90
    assert unsplit_rate(found, wholes) > 0.92
