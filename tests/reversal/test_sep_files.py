"""[SEP] files: faithful lines are kept, others repaired or rejected, and units are the text in every case."""

import csv
import json
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from permjax.reversal.segment import SegmentError, check_units, cut_text, split_words
from permjax.reversal.sep_files import SepFileSegmenter, align

pytestmark = pytest.mark.fast

TEXT = "Ann Lee, once the mayor of Rome, now paints."
DATA = Path(os.environ.get("PERMJAX_DATA", "nowhere")) / "reversal"


@given(st.text(max_size=50), st.text(max_size=50))
def test_units_are_the_text_whatever_the_line_says(line, text):
    for given_line in (line, f"{line}[SEP]{text}", text, text.replace(" ", " [SEP] ")):
        units, outcome = align(given_line, text)
        check_units(text, units)
        assert outcome != "rejected" or len(units) <= 1


@given(st.sets(st.integers(1, 8)))
def test_a_faithful_line_gives_back_its_own_units(places):
    words = split_words(TEXT)
    units = cut_text(TEXT, [sum(map(len, words[:place])) for place in places])
    assert align(" [SEP] ".join(map(str.strip, units)), TEXT) == (units, "kept")


def test_marks_before_punctuation_and_empty_units_are_read():
    units, outcome = align("Ann Lee [SEP] , once the mayor [SEP] [SEP] of Rome, now paints. [SEP]", TEXT)
    assert units == ("Ann Lee", ", once the mayor", " of Rome, now paints.")
    assert outcome == "kept"


@pytest.mark.parametrize(
    ("line", "places"),
    [
        ("Ann Lee, [SEP] once the great mayor [SEP] of Rome, [SEP] now paints.", (2, 5, 7)),
        ("Ann Lee, [SEP] once the mayor [SEP] of the Rome, [SEP] now paints", (2, 5, 7)),
        ("Ann Lee is, [SEP] once the mayor of Rome, [SEP] today [SEP] now paints.", (2, 7)),
    ],
)
def test_a_line_that_changes_words_is_repaired_where_words_agree(line, places):
    words = split_words(TEXT)
    wanted = cut_text(TEXT, [sum(map(len, words[:place])) for place in places])
    assert align(line, TEXT) == (wanted, "repaired")


def test_a_line_of_another_text_is_rejected_and_leaves_the_text_whole():
    assert align("Tom [SEP] paints houses in Rome.", TEXT) == ((TEXT,), "rejected")


def test_a_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "units.txt"
    path.write_text("The dog [SEP] barks.\n\nThe cats [SEP] sleep a lot now\nwrong\n", encoding="utf-8")
    texts = ["The dog barks.", "The cats sleep a lot", "A bird sings."]
    segmenter = SepFileSegmenter.read(path, texts)
    assert [segmenter(text) for text in texts] == [("The dog", " barks."), ("The cats", " sleep a lot"), (texts[2],)]
    assert segmenter.outcomes == ("kept", "repaired", "rejected")
    assert segmenter.count("kept") == 1
    assert segmenter("") == ()


def test_of_equal_texts_the_first_line_counts_that_cuts_them():
    segmenter = SepFileSegmenter.of(["wrong", "a b", "a [SEP] b", "[SEP] a b"], ["a b"] * 4)
    assert segmenter("a b") == ("a", " b")


def test_another_number_of_lines_another_encoding_and_unknown_texts_are_refused(tmp_path):
    path = tmp_path / "units.txt"
    path.write_text("The dog [SEP] barks.\n")
    with pytest.raises(SegmentError, match="has 1 lines, but there are 2 texts"):
        SepFileSegmenter.read(path, ["The dog barks.", "more"])
    with pytest.raises(SegmentError, match="has no line for the text 'The cat'"):
        SepFileSegmenter.read(path, ["The dog barks."])("The cat")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SegmentError, match="no text in UTF-8"):
        SepFileSegmenter.read(path, ["x"])


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs reversal/ under PERMJAX_DATA")
def test_the_lines_of_the_authors_are_kept_but_for_those_that_change_the_text():
    texts = []
    for part in ("both", "d2p", "p2d"):
        lines = (DATA / "descriptions" / f"{part}_prompts_train.jsonl").read_text(encoding="utf-8").splitlines()
        texts += [record["prompt"] + record["completion"] for record in map(json.loads, lines)]
    segmenter = SepFileSegmenter.read(DATA / "segmented" / "descriptions_train.txt", texts)
    assert segmenter.count("kept") == 3398
    assert segmenter.count("rejected") < 20
    for text in texts:
        check_units(text, segmenter(text))


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs reversal/ under PERMJAX_DATA")
@pytest.mark.parametrize(
    ("name", "template", "kept", "rejected"),
    [
        ("child2parent", "{child}'s {parent_type} is {parent}.", 1431, 35),
        ("parent2child", "{parent} is {child}'s {parent_type}.", 1407, 85),
    ],
)
def test_lines_that_echo_an_example_of_the_prompt_are_rejected(name, template, kept, rejected):
    with (DATA / "celebrities" / "parent_child_pairs.csv").open(encoding="utf-8", newline="") as file:
        texts = [template.format(**row) for row in csv.DictReader(file)]
    path = DATA / "segmented" / f"celebrities_{name}.0.txt"
    segmenter = SepFileSegmenter.read(path, texts)
    assert (segmenter.count("kept"), segmenter.count("rejected")) == (kept, rejected)
    assert path.read_text(encoding="utf-8").count("Survival of the Tastiest") == rejected
