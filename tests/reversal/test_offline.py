"""Files of re-ordered copies: the same whatever the processes and the interruptions."""

import json
from collections import Counter

import pytest

from permjax.reversal import offline
from permjax.reversal.offline import permute_file
from permjax.reversal.texts import PermuteOptions, permute_text

pytestmark = pytest.mark.fast

TEXT = "Ann Lee is the mother of Bo Ray."
WORDS = PermuteOptions(segmenter="words", probs=(0.0, 1.0, 0.0))


def write(path, texts):
    path.write_text("".join(json.dumps({"id": f"x{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", [f"Person {i} is the mother of {'very ' * (i % 3)}Bo." for i in range(40)])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(offline, "_CHUNK", 7)


def test_reversed_words_keep_their_spaces():
    assert permute_text(TEXT, WORDS, 0, 0) == ("Ray. Bo of mother the is Lee Ann", "reversed")
    end = PermuteOptions(segmenter="words", probs=(0.0, 1.0, 0.0), keep_end=True)
    assert permute_text(TEXT, end, 0, 0)[0] == "Ray Bo of mother the is Lee Ann."
    assert permute_text(' He said "go." ', end, 0, 0)[0] == ' "go said He." '


@pytest.mark.parametrize("text", ["", "...", "word", "  two  words \n", "日本語のテキスト。", "é🙂 \u2028 x!"])
def test_odd_texts_lose_no_character_but_spaces(text):
    for copy in range(4):
        for keep_end in (False, True):
            options = PermuteOptions(segmenter="words", keep_end=keep_end)
            found, _ = permute_text(text, options, 0, copy)
            assert Counter("".join(found.split())) == Counter("".join(text.split()))


def test_the_original_order_is_the_text_itself():
    assert permute_text(TEXT, PermuteOptions(probs=(1.0, 0.0, 0.0)), 5, 1) == (TEXT, "original")


def test_a_file_has_each_text_and_its_copies(source, tmp_path):
    target, calls = tmp_path / "out.jsonl", []
    options = PermuteOptions(copies=3, tags=("<f> ", "<r> ", "<x> "), segmenter="words", example="id")
    written = permute_file(source, target, options, progress=calls.append)
    found = read(target)
    assert (written.texts, written.lines, len(found), written.resumed) == (40, 160, 160, 0)
    assert sum(calls) == source.stat().st_size
    assert written.orders == Counter(record["order"] for record in found)
    for record, given in zip(found[::4], read(source), strict=True):
        assert record == given | {"text": "<f> " + given["text"], "order": "original"}
    tags = {"original": "<f> ", "reversed": "<r> ", "random": "<x> "}
    assert all(record["text"].startswith(tags[record["order"]]) for record in found)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]


def test_the_copies_of_an_example_do_not_depend_on_its_line(source, tmp_path):
    options = PermuteOptions(copies=2, example="id", keep_original=False)
    lines = source.read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(lines[::-1]))
    for path in (source, turned):
        permute_file(path, path.with_suffix(".out"), options)
    first, second = (read(path.with_suffix(".out")) for path in (source, turned))
    key = lambda record: (record["id"], record["text"])  # noqa: E731
    assert sorted(first, key=key) == sorted(second, key=key)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(source, tmp_path, small_chunks):
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    permute_file(source, whole, PermuteOptions())

    def interrupt(done, calls=[]):  # noqa: B006
        calls.append(done)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute_file(source, target, PermuteOptions(), progress=interrupt)
    assert not target.exists()
    with (tmp_path / "out.jsonl.part").open("ab") as part:
        part.write(b'{"half a line')
    with pytest.raises(ValueError, match="of other options; repeat that command"):
        permute_file(source, target, PermuteOptions(seed=1))
    written = permute_file(source, target, PermuteOptions())
    assert 0 < written.resumed < written.texts == 40
    assert target.read_bytes() == whole.read_bytes()


def test_two_processes_write_what_one_writes(source, tmp_path, small_chunks):
    for processes in (1, 2):
        permute_file(source, tmp_path / f"{processes}.jsonl", PermuteOptions(copies=2), processes=processes)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_empty_lines_vanish(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('\n{"text": "a b"}\n\n')
    assert permute_file(source, tmp_path / "out", WORDS).texts == 1
    assert [record["text"] for record in read(tmp_path / "out")] == ["a b", "b a"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[1]", {}, "Line 1 has no text in a field 'text'"),
        ('{"text": 3}', {}, "Line 1 has no text in a field 'text'"),
        ('{"text": "a"}\n{', {}, "Line 2 is no JSON"),
        ('{"text": "a"}', {"example": "id"}, "Line 1 has no field 'id'"),
    ],
)
def test_bad_lines_are_named(content, options, message, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(ValueError, match=message):
        permute_file(source, tmp_path / "out", PermuteOptions(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probs": (0.5, 0.5, 0.5)}, "sum to one"),
        ({"segmenter": "word"}, "no segmenter 'word'"),
        ({"copies": 0, "keep_original": False}, "0 copies"),
    ],
)
def test_bad_options_are_refused(options, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        permute_file(source, tmp_path / "out", PermuteOptions(**options))


def test_no_file_is_overwritten_unasked(source, tmp_path):
    target = write(tmp_path / "out.jsonl", ["precious"])
    with pytest.raises(FileExistsError, match="exists; give the output another name"):
        permute_file(source, target, WORDS)
    with pytest.raises(ValueError, match="overwritten while it is read"):
        permute_file(source, source, WORDS, force=True)
    with pytest.raises(ValueError, match="There is no file"):
        permute_file(tmp_path / "none", target, WORDS, force=True)
    assert permute_file(source, target, WORDS, force=True).lines == 80
