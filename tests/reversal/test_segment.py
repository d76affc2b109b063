"""Units tile their text, under any Unicode; the plain cuts are what they say."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from permjax.reversal.entities import EntitySegmenter
from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import (
    NGramSegmenter,
    RandomSegmenter,
    Segmenter,
    SegmentError,
    SentenceSegmenter,
    WordSegmenter,
    check_units,
    cut_text,
    split_words,
)
from permjax.reversal.segmenters import SEGMENTERS, segmenter

pytestmark = pytest.mark.fast

HARD = ["", " ", "\n", "\t \n", ".", '"', '"""', "((", "))", "’", "a", " a ", "'s n't", "a\r\nb", "\ud800"]
HARD += ["👨‍👩‍👧 é̈ ok", "नमस्ते दुनिया", "你好，世界。", "\u200b \ufeff\x1c\x85", 'He said, "Stone Forest" \n\n (again)… ']
HARD += ["U.S.A. Mr. X's 1,000.5% -- e.g. x/y@z.com", "J. K. Rowling\u2028wrote 'it'..."]
TEXTS = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from([*HARD, "the", "dog's", " barks", "Ann Lee", ", ", "to", "very"]), max_size=30).map(
        "".join
    ),
)
NAMES = ["Ann Lee", "Lee", "É̈ 👨‍👩‍👧", "O'Neil-Smith Jr."]
EVERY = {
    **{name: make() for name, make in SEGMENTERS.items()},
    "names and words": EntitySegmenter(NAMES),
    "names and rules": EntitySegmenter(NAMES, RuleSegmenter()),
    "long rules": RuleSegmenter(attach=False, longest=30),
}


@pytest.mark.parametrize("name", EVERY)
@given(text=TEXTS)
def test_units_tile_any_text(name, text):
    assert isinstance(EVERY[name], Segmenter)
    units = EVERY[name](text)
    assert check_units(text, units) == units == EVERY[name](text)


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("name", EVERY)
def test_units_tile_hard_texts(name, text):
    check_units(text, EVERY[name](text))


@given(TEXTS, st.lists(st.integers(-3, 99)))
def test_cuts_anywhere_tile_the_text(text, cuts):
    units = check_units(text, cut_text(text, cuts))
    assert len(units) == len({cut for cut in cuts if 0 < cut < len(text)}) + bool(text)


@pytest.mark.parametrize(
    ("units", "words"),
    [
        (["The dog", "barks."], "Unit 1 is 'barks.', but the text has ' barks' at character 7"),
        (["The dog", "", " barks."], "Unit 1 is empty at character 7"),
        (["The dog"], "end at character 7 of 14"),
        (["The dog", " barks.", " "], "Unit 2 is ' '"),
        (["The Dog", " barks."], "Unit 0"),
        ([], "end at character 0"),
    ],
)
def test_units_that_do_not_tile_the_text_are_refused(units, words):
    with pytest.raises(SegmentError, match=words):
        check_units("The dog barks.", units)


def test_white_space_goes_with_the_word_after_it_and_the_last_of_it_with_the_last_word():
    assert split_words("  The dog\n barks. ") == ["  The", " dog", "\n barks. "]
    assert split_words(" \n") == [" \n"]


@given(TEXTS)
def test_the_baselines_agree_where_they_must(text):
    words = WordSegmenter()(text)
    assert NGramSegmenter(1)(text) == words == RandomSegmenter(1)(text)
    assert NGramSegmenter(1000)(text) == SentenceSegmenter()(text)


def test_runs_of_n_words_have_n_words():
    assert NGramSegmenter(2)("a b c d e") == ("a b", " c d", " e")


def test_random_runs_depend_on_the_text_and_the_seed_alone_and_take_all_lengths():
    text = " ".join("word" for _ in range(600))
    units = RandomSegmenter(3)(text)
    lengths = [len(unit.split()) for unit in units]
    assert {lengths.count(n) > 60 for n in (1, 2, 3)} == {True}
    assert units == RandomSegmenter(3)(text) != RandomSegmenter(3, seed=1)(text)


def test_names_stay_whole_and_keep_their_punctuation():
    cut = EntitySegmenter(["Ann Lee", "Lee", "Robert Downey Jr."])
    assert cut('Tom met "Ann Lee", then Lee\'s aunt.') == ("Tom", " met", ' "Ann Lee",', " then", " Lee's", " aunt.")
    assert cut("(Robert Downey Jr.) Ann, Lee Leeson") == ("(Robert Downey Jr.)", " Ann,", " Lee", " Leeson")
    assert cut("Ann\n Lee sat") == ("Ann\n Lee", " sat")


def test_what_lies_between_names_is_cut_by_another_segmenter():
    cut = EntitySegmenter(["of the dog"], NGramSegmenter(2))
    assert cut("a b c of the dog d e f") == ("a b", " c", " of the dog", " d e", " f")


def test_a_segmenter_without_names_is_the_one_for_the_rest():
    assert EntitySegmenter([])("a b") == WordSegmenter()("a b")


def test_bad_settings_and_names_are_refused():
    with pytest.raises(SegmentError, match="at least one word"):
        NGramSegmenter(0)
    with pytest.raises(SegmentError, match="at least one word"):
        RandomSegmenter(0)
    with pytest.raises(SegmentError, match="no letter or digit"):
        EntitySegmenter(["Ann", " - "])
    with pytest.raises(SegmentError, match=r"no segmenter 'ngram22'.*ngram2"):
        segmenter("ngram22")
