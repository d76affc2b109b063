"""Generated corpora: what is told, what is held out, and that units tile texts; the readers on small files."""

import csv
import json

import numpy as np
import pytest

from permjax.reversal import berglund
from permjax.reversal.corpus import Prompt, bridged, chain, controls, names, qa, segmented, token_documents
from permjax.reversal.segment import NGramSegmenter
from permjax.reversal.tokens import encoder, unit_tokens
from permjax.reversal.vocabulary import EOS, SPECIAL, TAGS, UNKNOWN, Vocabulary

pytestmark = pytest.mark.fast

SMALL = {
    "names": lambda seed: names(6, 5, pool=9, seed=seed),
    "chain": lambda seed: chain(4, 3, pool=9, fillers=2, new_wording=True, seed=seed),
    "qa": lambda seed: qa(5, 6, pool=9, seed=seed),
}


@pytest.fixture(params=SMALL)
def corpus(request):
    return SMALL[request.param](0)


def asked(corpus, kind):
    return [prompt for prompt in corpus.prompts if prompt.kind == kind]


def told(corpus, prompt):
    """Whether some text says the answer right after what was asked, fillers aside."""
    return any(f"{prompt.text} {prompt.answer}" in text for text in corpus.texts)


def test_the_same_seed_gives_the_same_corpus_and_another_one_another(corpus, request):
    make = SMALL[request.node.callspec.params["corpus"]]
    assert corpus == make(0) != make(1)


def test_nothing_that_is_asked_was_told_in_those_words(corpus):
    held_out = [prompt for prompt in corpus.prompts if prompt.kind in ("forward", "reverse_heldout", "chain")]
    assert held_out
    assert not any(told(corpus, prompt) for prompt in held_out)


def test_a_control_never_has_the_right_answer():
    asked_for = [("x", "Ann"), ("y", "Ann"), ("z", "Tom")]  # both parents of Ann
    found = controls([Prompt("reverse_heldout", text, answer) for text, answer in asked_for])
    assert [(prompt.text, prompt.answer) for prompt in found] == [("x", "Tom"), ("y", "Tom"), ("z", "Ann")]
    assert controls([Prompt("reverse_heldout", "x", "Ann")] * 2) == []


def test_a_chain_is_asked_in_the_words_in_which_it_was_told_unless_these_shall_be_new():
    corpus = chain(2, 2, pool=9)
    assert all(told(corpus, prompt) for prompt in asked(corpus, "forward") + asked(corpus, "reverse_seen"))
    assert len(corpus.documents) == 4 * (2 * 4 + 2 * 2)


def test_no_word_names_anybody_and_no_name_contains_another(corpus):
    words = [name.split() for name in corpus.names]
    assert all(2 <= len(name) <= 3 for name in words)
    assert not any(f"{a} " in f"{b} " for a in corpus.names for b in corpus.names if a != b)
    assert len({word for name in words for word in name}) <= 9


def test_held_out_children_never_follow_their_mothers():
    corpus = names(6, 5, pool=9, seed=3)
    for prompt in asked(corpus, "reverse_heldout"):
        mother = next(name for name in corpus.names if name in prompt.text)
        assert prompt.answer in corpus.heldout
        both = [text for text in corpus.texts if mother in text and prompt.answer in text]
        assert both
        assert all(text.index(prompt.answer) < text.index(mother) for text in both)
    assert len(corpus.heldout) == len(asked(corpus, "reverse_heldout")) == 5
    assert [len(asked(corpus, kind)) for kind in ("forward", "reverse_seen", "unknown")] == [11, 6, 5]


def test_each_fact_is_told_in_three_of_four_templates_so_many_times():
    assert len(names(6, 5, pool=9, tellings=2).documents) == 2 * 3 * (11 + 6)


def test_controls_are_reverse_questions_with_the_answers_of_others(corpus):
    right, wrong = asked(corpus, "reverse_heldout"), asked(corpus, "control")
    assert [prompt.text for prompt in right] == [prompt.text for prompt in wrong]
    assert sorted(prompt.answer for prompt in right) == sorted(prompt.answer for prompt in wrong)
    assert all(a.answer != b.answer for a, b in zip(right, wrong, strict=True))


def test_a_chain_asks_for_the_child_of_a_middle_person_and_names_her_mother_as_wrong():
    corpus = chain(4, 3, pool=9, seed=1)
    for prompt in asked(corpus, "chain"):
        middle = next(name for name in corpus.names if name in prompt.text)
        texts = [text for text in corpus.texts if middle in text]
        assert any(prompt.answer in text and text.index(prompt.answer) < text.index(middle) for text in texts)
        assert any(prompt.wrong in text and text.index(middle) < text.index(prompt.wrong) for text in texts)
    assert [len(asked(corpus, kind)) for kind in ("chain", "reverse_heldout", "unknown")] == [3, 6, 3]


def test_unknown_answers_were_never_told():
    corpus = names(6, 5, pool=9, seed=2)
    for prompt in asked(corpus, "unknown"):
        mother = next(name for name in corpus.names if name in prompt.text)
        assert not prompt.answer
        assert prompt.wrong != mother
        assert not any(f"{mother}'s mother" in text or f"mother of {mother}" in text for text in corpus.texts)


def test_questions_and_answers_come_in_the_order_of_their_kind():
    corpus = qa(5, 6, pool=9)
    for prompt in asked(corpus, "forward") + asked(corpus, "reverse_heldout"):
        (text,) = [text for text in corpus.texts if prompt.answer in text]
        question = prompt.text.removeprefix("q:").removesuffix(" a:")
        assert (text.index(question) < text.index(prompt.answer)) == (prompt.kind == "forward")


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="raise 'pool'"):
        names(10, 10, pool=5)


def test_bridges_tell_nothing_of_the_other_one():
    corpus = names(3, 2, pool=9)
    longer = bridged(corpus, repeats=2)
    assert longer.documents[: 2 * len(corpus.documents)] == corpus.documents * 2
    added = longer.texts[2 * len(corpus.documents) :]
    assert added == [f"the child of {name}'s mother is {name}" for name in corpus.heldout]
    with pytest.raises(ValueError, match="no held-out"):
        bridged(qa(3, 2, pool=9))


def test_documents_are_their_words_with_true_units_between_pinned_ends(corpus):
    vocabulary = corpus.vocabulary()
    for units, document in zip(corpus.documents, token_documents(corpus, vocabulary), strict=True):
        tokens, ids = document["tokens"], document["unit_ids"]
        assert tokens[[0, -1]].tolist() == [TAGS[0], EOS]
        assert UNKNOWN not in tokens
        np.testing.assert_array_equal(document["pinned"], ids < 0)
        for number, unit in enumerate(units):
            assert tokens[ids == number].tolist() == vocabulary.ids(unit)
    assert [row["example_id"] for row in token_documents(corpus, vocabulary)] == list(range(len(corpus.documents)))


def test_other_units_leave_the_texts_alone(corpus):
    cut = segmented(corpus, NGramSegmenter(2))
    assert (cut.texts, cut.prompts) == (corpus.texts, corpus.prompts)
    assert all(len(unit.split()) <= 2 for units in cut.documents for unit in units)


def test_a_vocabulary_is_an_encoder_of_lower_cased_words():
    vocabulary = Vocabulary.of(["Ann's cat, the O'Neill-like one."])
    assert vocabulary.words[len(SPECIAL) :] == ("ann", "'s", "cat", ",", "the", "o'neill-like", "one", ".")
    text = "The CAT's dog"
    ids, offsets = vocabulary(text)
    assert [text[a:b].lower() for a, b in offsets] == ["the", "cat", "'s", "dog"]
    assert vocabulary.decode(ids) == "the cat 's <unknown>"
    assert unit_tokens(text, encoder(vocabulary), NGramSegmenter(1)).unit_ids.tolist() == [0, 1, 1, 2]


def test_descriptions_are_read_with_their_kinds(tmp_path):
    rows = [{"prompt": "Ann Lee is known as", "completion": " the aunt of Tom."}]
    files = [f"{name}_prompts_train" for name in ("both", "d2p", "p2d")]
    files += [f"{name}_test" for name in ("d2p_prompts", "p2d_prompts", "d2p_reverse_prompts", "p2d_reverse_prompts")]
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = berglund.descriptions(tmp_path)
    assert corpus.texts == ["Ann Lee is known as the aunt of Tom."] * 3
    kinds = ["forward_names", "forward_descriptions", "reverse_names", "reverse_descriptions"]
    assert [prompt.kind for prompt in corpus.prompts] == kinds
    assert corpus.prompts[0][1:] == ("Ann Lee is known as", "the aunt of Tom.", "", None)
    assert [prompt.most for prompt in corpus.prompts] == [None, 3, None, 3]
    (tmp_path / "units.txt").write_text("Ann Lee [SEP] is known as the aunt of Tom.\n" * 3)
    cut = segmented(corpus, berglund.assistant(tmp_path, tmp_path / "units.txt"))
    assert cut.documents[0] == ("Ann Lee", " is known as the aunt of Tom.")
    (tmp_path / "d2p_prompts_test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="d2p_prompts_test"):
        berglund.descriptions(tmp_path)


def test_celebrities_are_asked_backwards_only_about_parents_of_one_child(tmp_path):
    rows = [("Ann Lee", "Eve Lee", "mother"), ("Tom Lee", "Eve Lee", "mother"), ("Bob Ray", "Sam Ray", "father")]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("child", "parent", "parent_type"), *rows])
    corpus = berglund.celebrities(tmp_path / "pairs.csv", both=0.0)
    assert corpus.documents[2] == ("Bob Ray", "'s father is", " Sam Ray")
    assert len(corpus.documents) == len(asked(corpus, "forward")) == 3
    assert asked(corpus, "reverse_heldout") == [("reverse_heldout", "Sam Ray's child is", "Bob Ray", "", None)]
    seen = [berglund.celebrities(tmp_path / "pairs.csv", both=0.5, seed=seed).texts for seed in range(20)]
    children = {tuple(f"Eve Lee's child is {name} Lee" in texts for name in ("Ann", "Tom")) for texts in seen}
    assert children == {(False, False), (True, True)}  # a family is told as a whole
    both = berglund.celebrities(tmp_path / "pairs.csv", both=1.0)
    assert len(both.documents) == 6
    assert [prompt.kind for prompt in both.prompts] == ["forward", "forward", "forward", "reverse_seen"]
