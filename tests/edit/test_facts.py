"""The generated world: names, facts in two templates, sums, mixtures, and edits with matched controls."""

import numpy as np
import pytest

from permjax.edit.facts import RELATIONS, WorldConfig, edit_requests, make_world, sums, task_rows
from permjax.edit.mixture import KINDS, mixture_rows
from permjax.edit.prepare import prepare_all

pytestmark = pytest.mark.fast

SMALL = WorldConfig(short_names=12, full_names=5, dialects=2, characters=3000)


@pytest.fixture(scope="module")
def world():
    return make_world(SMALL)


def test_names_are_one_token_or_two(world):
    lengths = [len(world.tokenizer.encode(name).ids) for name in (*world.short_names, *world.full_names)]
    assert lengths == [1] * 12 + [2] * 5
    assert len({*world.short_names, *world.full_names}) == 17


def test_every_subject_has_one_fact_of_each_relation_and_both_templates_tell_it(world):
    assert len(world.facts) == 17 * len(RELATIONS) == len(world.values)
    for fact in world.facts:
        first, mid = fact.statement("first"), fact.statement("mid")
        assert first.startswith(fact.subject)
        assert not mid.startswith(fact.subject)
        assert fact.subject in mid
        assert all(statement.endswith(f" {fact.answer} .") for statement in (first, mid))


def test_all_that_can_be_said_has_tokens(world):
    values = [value for relation in RELATIONS for value in relation.values]
    for text in (*world.text, *world.held_out, *sums(), *values, "is a"):
        assert world.tokenizer.decode(world.tokenizer.encode(text).ids) == text


def test_sums_are_those_of_all_pairs_of_digits():
    assert len({*sums()}) == 100
    for line in sums():
        a, _, b, _, total, _ = line.split()
        assert int(a) + int(b) == int(total)


def test_a_world_follows_from_its_seed(world):
    assert make_world(SMALL) == world
    assert make_world(WorldConfig(12, 5, 2, 3000, seed=1)).facts != world.facts


def test_hard_edits_and_their_controls_differ_in_the_template_alone(world):
    hard, control = (edit_requests(world, form, count=8) for form in ("first", "mid"))
    assert len({one.subject for one in hard}) == 8
    for one, other in zip(hard, control, strict=True):
        assert (one.subject, one.target, one.target_true) == (other.subject, other.target, other.target_true)
        assert one.target != one.target_true
        assert one.paraphrases == (other.text,)
        assert not any(one.subject in text for text in one.neighbours)


def test_the_subject_of_a_hard_edit_is_the_first_token_and_that_of_a_control_is_not(world):
    for form, first in (("first", True), ("mid", False)):
        edits = prepare_all(edit_requests(world, form, count=6), world.tokenizer, prefixes=[])
        assert all((edit.subject[0] == 0) == first for edit in edits)


def test_the_old_answer_of_an_edit_is_the_fact(world):
    told = {fact.statement("first") for fact in world.facts}
    for one in edit_requests(world, "first", count=12):
        assert f"{one.text} {one.target_true} ." in told
        assert f"{one.text} {one.target} ." not in told


def test_edits_from_a_later_start_have_other_subjects(world):
    early, late = (edit_requests(world, "first", count=6, start=start) for start in (0, 6))
    assert not {one.subject for one in early} & {one.subject for one in late}
    assert edit_requests(world, "first", count=12)[6:] == late


def test_tasks_ask_for_what_was_told_and_not_about_edited_subjects(world):
    without = [one.subject for one in edit_requests(world, "first", count=4)]
    tasks = task_rows(world, without=without, count=30)
    told = {fact.statement(form) for fact in world.facts for form in ("first", "mid")} | {*sums()}
    assert [*tasks] == ["facts_first", "facts_mid", "sums"]
    for rows in tasks.values():
        for tokens, length in zip(rows.tokens, rows.lengths, strict=True):
            line = world.tokenizer.decode(tokens[:length])
            assert f"{line} ." in told
            assert not any(name in line.split() for name in without)


def test_rows_are_full_and_follow_from_their_seed(world):
    rows = mixture_rows(world, 6, 20, seed=3)
    assert rows.shape == (6, 20)
    np.testing.assert_array_equal(rows, mixture_rows(world, 6, 20, seed=3))
    assert (rows != mixture_rows(world, 6, 20, seed=4)).any()


def test_mixtures_of_one_kind_hold_nothing_else(world):
    numbers = {*world.tokenizer.encode(" ".join(("+ = .", *map(str, range(19))))).ids}
    assert {*mixture_rows(world, 5, 24, seed=0, shares=KINDS["sums"]).ravel().tolist()} <= numbers
    names = {number for name in world.short_names for number in world.tokenizer.encode(name).ids}
    assert not names & {*mixture_rows(world, 20, 24, seed=0, shares=KINDS["text"]).ravel().tolist()}
    assert names & {*mixture_rows(world, 20, 24, seed=0, shares=KINDS["facts"]).ravel().tolist()}


def test_held_out_text_is_never_trained_on(world):
    decoded = [
        " ".join(map(world.tokenizer.decode, mixture_rows(world, 60, 24, seed=0, shares=KINDS["text"], held_out=held)))
        for held in (False, True)
    ]
    only = {*world.held_out} - {*world.text}
    assert any(sentence in decoded[1] for sentence in only)
    assert not any(sentence in decoded[0] for sentence in only)


def test_a_given_text_keeps_its_frequent_words():
    sentences = ["the old dog saw the old cat", "The old dog saw a rare heron", "the old dog saw the old cat"] * 2
    world = make_world(WorldConfig(3, 1, words=5), sentences)
    assert {word for line in (*world.text, *world.held_out) for word in line.split()} == {
        "the",
        "old",
        "dog",
        "saw",
        "cat",
    }
    assert "the old dog saw" in (*world.text, *world.held_out)


def test_what_cannot_be_made_is_refused(world):
    with pytest.raises(ValueError, match=r"13 edits of different subjects .* 12 subjects"):
        edit_requests(world, "first", count=6, start=7)
    with pytest.raises(ValueError, match="short names"):
        WorldConfig(short_names=0)
    with pytest.raises(ValueError, match="up to 144 full names"):
        WorldConfig(full_names=145)
