"""Sentences are read from text files and from lists of records, by corpus, or the file is refused in a sentence."""

import json
import os
from pathlib import Path

import pytest

from permjax.data.corpora import read_corpora
from permjax.data.dataset import MissingData

pytestmark = pytest.mark.fast

ME_PPL = Path(os.environ.get("PERMJAX_DATA", "nowhere")) / "editing" / "ME-PPL_50.json"
RECORDS = [
    {"Corpus": corpus, "Text": f"{corpus} {i}"} for corpus, count in (("C4", 5), ("Roots", 2)) for i in range(count)
]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_records_are_grouped_by_corpus_and_lines_by_file(tmp_path):
    records, lines = (
        write(tmp_path / "ME-PPL_50.json", RECORDS),
        write(tmp_path / "mine.txt", "One.\r\n\n  Two — 2. \n"),
    )
    found = read_corpora([records, str(lines)])
    assert found == {"C4": [f"C4 {i}" for i in range(5)], "Roots": ["Roots 0", "Roots 1"], "mine": ["One.", "Two — 2."]}


def test_files_of_one_name_are_one_corpus(tmp_path):
    (tmp_path / "more").mkdir()
    both = [write(tmp_path / "a.txt", "One."), write(tmp_path / "more" / "a.txt", "Two.")]
    assert read_corpora(both) == {"a": ["One.", "Two."]}


@pytest.mark.parametrize(
    ("most", "kept"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (4, [0, 2, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_few_sentences_are_taken_from_everywhere(tmp_path, most, kept):
    found = read_corpora([write(tmp_path / "x.json", RECORDS)], most=most)
    assert found["C4"] == [f"C4 {i}" for i in kept]
    assert all(len(texts) <= most for texts in found.values())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", " \n\n", "x.txt has no sentence"),
        ("x.json", "[]", "has no sentence"),
        ("x.json", "One.", "is no JSON"),
        ("x.json", {"Corpus": "C4", "Text": "One."}, "holds a JSON dict in place of a list"),
        ("x.json", [*RECORDS, {"Corpus": "C4"}], "record 7 has no text under 'Corpus' and 'Text'"),
        ("x.json", [{"Corpus": "C4", "Text": 3}], "record 0 has no text"),
        ("x.json", ["One."], "record 0 has no text"),
    ],
)
def test_a_file_that_holds_no_sentences_is_refused(tmp_path, name, content, says):
    with pytest.raises(ValueError, match=says):
        read_corpora([write(tmp_path / name, content)])


def test_a_missing_file_and_one_of_another_encoding_are_named(tmp_path):
    with pytest.raises(MissingData, match=r"none\.txt"):
        read_corpora([tmp_path / "none.txt"])
    (tmp_path / "x.txt").write_bytes("Ärger".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.txt is no text in UTF-8"):
        read_corpora([tmp_path / "x.txt"])


@pytest.mark.data
@pytest.mark.skipif(not ME_PPL.is_file(), reason="needs editing/ME-PPL_50.json under PERMJAX_DATA")
def test_the_small_me_ppl_has_fifty_sentences_of_seven_corpora():
    found = {corpus: len(texts) for corpus, texts in read_corpora([ME_PPL]).items()}
    assert sorted(found.values(), reverse=True) == [25, 12, 5, 3, 2, 2, 1]
    assert found["OpenWebText"] == 25
