"""Hard edits found among others, and their controls."""

import pytest

from permjax.edit.facts import WorldConfig, edit_requests, make_world
from permjax.edit.hard_cases import is_hard, mine_hard_cases
from permjax.edit.requests import EditRequest
from permjax.io.tokenizers import WordTokenizer

pytestmark = pytest.mark.fast

WORDS = WordTokenizer(
    tuple("Ann Bea Lee lives works in as the home of is a Rome Paris New York baker , we said".split())
)


def test_hard_are_subjects_of_one_token_at_the_very_start():
    assert is_hard(EditRequest("{} lives in", "Ann", "Rome"), WORDS)
    assert not is_hard(EditRequest("{} lives in", "Ann Lee", "Rome"), WORDS)
    assert not is_hard(EditRequest("the home of {} is", "Ann", "Rome"), WORDS)


def test_the_generated_hard_edits_are_hard_and_their_controls_are_not():
    world = make_world(WorldConfig(6, 6, 1, 1000))
    for form, names, expected in (("first", "short", True), ("mid", "short", False), ("first", "full", False)):
        for request in edit_requests(world, form, count=6, names=names):
            assert is_hard(request, world.tokenizer) == expected


def test_controls_are_used_once_and_are_of_the_same_size():
    hard = [EditRequest("{} lives in", "Ann", "Rome"), EditRequest("{} lives in", "Bea", "New York")]
    near = [EditRequest("of {} is", "Ann", "New York"), EditRequest("of {} is", "Bea", "Paris")]
    far = EditRequest("we said , the home of {} is", "Lee", "Rome")
    found = mine_hard_cases([near[0], hard[0], far, near[1], hard[1]], WORDS)
    assert found.hard == hard
    assert found.controls == near[::-1]


def test_hard_edits_without_controls_are_left_out():
    hard = [EditRequest("{} lives in", name, "Rome") for name in ("Ann", "Bea", "Lee")]
    control = EditRequest("home of {} is", "Ann", "Rome")
    found = mine_hard_cases([*hard, control], WORDS)
    assert len(found.hard) == 1
    assert found.controls == [control]


def test_edits_with_no_hard_one_are_refused():
    with pytest.raises(ValueError, match="0 edits with a subject of one token at the start, and 1 with one further"):
        mine_hard_cases([EditRequest("home of {} is", "Ann", "Rome")], WORDS)
