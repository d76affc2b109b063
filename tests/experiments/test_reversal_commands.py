"""`permjax reversal`: from the command line to the file."""

import json

import pytest

from permjax.cli import main

pytestmark = pytest.mark.fast


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"Ann {i} is the mother of Bo."}) + "\n" for i in range(5)))
    return path


def run(*arguments):
    return main(["reversal", *map(str, arguments)])


def test_permute_writes_the_file_and_tells_the_shares(source, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    options = ("--copies", 2, "--probs", 0, 1, 0, "--segmenter", "words", "--processes", 1, "--keep-end")
    assert run("permute", source, target, *options, "--no-progress") == 0
    texts = [json.loads(line)["text"] for line in target.read_text().splitlines()]
    assert texts[:3] == ["Ann 0 is the mother of Bo.", *["Bo of mother the is 0 Ann."] * 2]
    told = capsys.readouterr().out
    assert "15 lines of 5 texts" in told
    assert "reversed" in told


def test_segment_shows_units(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("one two three\n\nfour\n")
    assert run("segment", path, "--segmenter", "ngram2") == 0
    assert capsys.readouterr().out.startswith("one two| three\nfour\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--probs", 0.5, 0.5, 0.5), "sum to one"),
        (("--segmenter", "word"), "no segmenter 'word'"),
        (("--text", "body"), "Line 1 has no text in a field 'body'"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_reason(arguments, message, source, tmp_path, capsys):
    assert run("permute", source, tmp_path / "out", *arguments, "--processes", 1, "--no-progress") == 2
    assert message in capsys.readouterr().err
