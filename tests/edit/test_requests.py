"""Requests and the files they come from."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from permjax.edit.requests import EditRequest, read_requests, request_of, sift_requests

pytestmark = pytest.mark.fast

COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux spoke", "Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "rephrase": "What does UniFirst make?",
    "alt": "aircraft",
    "answers": ["uniform", "uniforms"],
    "loc": "nq question: who is it",
    "loc_ans": "Walter",
}
EASYEDIT = {
    "prompt": "David Robinson plays",
    "subject": "David Robinson",
    "target_new": "baseball",
    "ground_truth": "basketball",
    "rephrase_prompt": "The sport of David Robinson is",
    "locality_prompt": "Shaquille O'Neal plays",
    "locality": {"neighborhood": {"prompt": ["Larry Bird plays"], "ground_truth": ["basketball"]}},
}
READ = (
    EditRequest(
        "The mother tongue of {} is",
        "Danielle Darrieux",
        "English",
        "French",
        ("Danielle Darrieux spoke", "Darrieux, a native"),
        ("The mother tongue of Léon Blum is",),
    ),
    EditRequest(
        "What is the product made by {}?",
        "UniFirst",
        "aircraft",
        "uniform",
        ("What does UniFirst make?",),
        ("nq question: who is it",),
    ),
    EditRequest(
        "{} plays",
        "David Robinson",
        "baseball",
        "basketball",
        ("The sport of David Robinson is",),
        ("Shaquille O'Neal plays", "Larry Bird plays"),
    ),
)
RECORDS = (COUNTERFACT, ZSRE, EASYEDIT)


def written(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def lines(records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


def test_records_of_each_form_are_read_from_lists_and_from_lines(tmp_path):
    for content in (json.dumps(RECORDS, indent=2), "\n" + lines(RECORDS)):
        assert read_requests(written(tmp_path / "edits", content)) == list(READ)


def test_requests_come_back_from_their_own_form(tmp_path):
    path = written(tmp_path / "edits.jsonl", lines(map(asdict, READ)))
    assert read_requests(path) == list(READ)


def test_a_request_knows_its_text_and_where_the_subject_ends():
    request = READ[0]
    assert request.text == "The mother tongue of Danielle Darrieux is"
    assert request.text[: request.subject_end].endswith("Darrieux")
    assert EditRequest("{ {} }", "a b ", "c").subject_end == 5


BROKEN = {
    "subject not in": (EASYEDIT | {"subject": "Ann"}, "The subject 'Ann' does not occur in the prompt"),
    "subject twice": (EASYEDIT | {"prompt": "David Robinson, David Robinson"}, "occurs 2 times"),
    "two slots": (EASYEDIT | {"prompt": "{} and {}"}, "has 2 slots"),
    "empty target": (EASYEDIT | {"target_new": " "}, "The target of the prompt '{} plays' is empty"),
    "empty subject": (EASYEDIT | {"subject": ""}, "0 slots"),
    "no subject": ({"prompt": "a", "target_new": "b"}, "'subject' of the record is missing"),
    "number": (EASYEDIT | {"prompt": 3}, "'prompt' of the record is 3"),
    "paraphrases": (EASYEDIT | {"rephrase_prompt": [3]}, "a text or a list of texts"),
    "rewrite": ({"requested_rewrite": 3}, "must be an object with"),
    "unknown form": ({"question": "a"}, "has the keys 'question', but none of"),
    "unknown key": ({"prompt": "{}", "subject": "a", "target": "b", "paraphrase": "c"}, "unknown keys 'paraphrase'"),
    "no object": (3, "must be an object with keys, not int"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_impossible_records_are_refused_with_their_line(tmp_path, name):
    record, reason = BROKEN[name]
    path = written(tmp_path / "edits.jsonl", lines([ZSRE, record]))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is looked at below)
        read_requests(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_that_are_no_json_are_named(tmp_path):
    with pytest.raises(ValueError, match="line 3 is no JSON"):
        read_requests(written(tmp_path / "edits.jsonl", lines([ZSRE]) + "\n{'prompt'\n"))
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_requests(written(tmp_path / "edits.json", '[{"a": 1},\n oops]'))


def test_a_file_without_an_edit_is_refused(tmp_path):
    for content in ("", "[]", "\n\n"):
        with pytest.raises(ValueError, match="holds no edit"):
            read_requests(written(tmp_path / "edits.jsonl", content))


def test_impossible_records_can_be_left_out_and_are_told(tmp_path):
    bad = EASYEDIT | {"target_new": " "}
    path = written(tmp_path / "edits.jsonl", lines([bad, ZSRE]) + "no record\n" + lines([COUNTERFACT]))
    found = sift_requests(path)
    assert found.requests == [READ[1], READ[0]]
    assert [reason.split(":")[0] for reason in found.refused] == [f"{path}, line 1", found.refused[1]]
    assert found.refused[1].startswith(f"{path}, line 3 is no JSON")
    records = sift_requests(written(tmp_path / "edits.json", json.dumps([ZSRE, bad])))
    assert (records.requests, len(records.refused)) == ([READ[1]], 1)
    assert records.refused[0].startswith(f"{tmp_path / 'edits.json'}, record 2: The target of")


def test_of_a_file_without_a_good_record_nothing_can_be_left_out(tmp_path):
    path = written(tmp_path / "edits.jsonl", lines([EASYEDIT | {"target_new": ""}]))
    with pytest.raises(ValueError, match=r"edits\.jsonl holds no edit; .* line 1: The target"):
        sift_requests(path)
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        sift_requests(written(tmp_path / "edits.json", '[{"a": 1},\n oops]'))


def test_a_subject_that_stands_twice_can_be_marked():
    assert request_of("Ann is {}", "Ann", "here").subject_end == len("Ann is Ann")


@pytest.mark.data
@pytest.mark.skipif("PERMJAX_DATA" not in os.environ, reason="PERMJAX_DATA is not set")
def test_records_as_they_are_published_are_read(tmp_path):
    folder = Path(os.environ["PERMJAX_DATA"]) / "editing"
    for file in ("counterfact-edit-1k.json", "zsre_mend_train-1k.json"):
        records = json.loads((folder / file).read_text())
        good = [record for record in records if record.get("alt") != ""]
        assert sift_requests(folder / file).requests == read_requests(written(tmp_path / "good", json.dumps(good)))
        assert len(good) > 990
        requests = read_requests(written(tmp_path / file, json.dumps(good)))
        assert len(requests) == len(good)
        assert all(one.target and one.target_true and one.paraphrases and one.neighbours for one in requests)
