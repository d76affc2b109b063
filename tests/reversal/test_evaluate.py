"""Evaluation against a model that is a table of what follows what, and so can be worked out by hand."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.nets.base import stateless
from permjax.reversal import evaluate
from permjax.reversal.corpus import Corpus, Prompt
from permjax.reversal.questions import lay_out
from permjax.reversal.training import rows_of
from permjax.reversal.vocabulary import MASK, SPECIAL, Vocabulary

pytestmark = pytest.mark.fast

WORDS = Vocabulary((*SPECIAL, *"abcdefghijkl"))
V = len(WORDS)


def table_apply(params, tokens, *, positions, visible):
    """The token before a mask, and any other token itself, says what comes next."""
    return params[jnp.where(tokens == MASK, jnp.roll(tokens, 1, axis=1), tokens)]


NET = stateless(None, lambda key: jax.random.normal(key, (V, V)), table_apply, lambda _: ())
FORMS = ("causal", "masked", "copy")


def cycle(strength=20.0):
    """Each word is followed by the next one, and the last by the first."""
    table = np.zeros((V, V), np.float32)
    for number in range(len(SPECIAL), V):
        table[number, number + 1 if number + 1 < V else len(SPECIAL)] = strength
    return jnp.asarray(table)


def random_table():
    return NET.init(jax.random.key(0))


PROMPTS = [
    Prompt("long", "a b c", "d e f", "d e"),
    Prompt("short", "f", "g", "h"),
    Prompt("short", "k l", "a c"),
    Prompt("unknown", "g h i j", "", "k l"),
]


def followed(table, word, count):
    found = []
    for _ in range(count):
        word = int(np.argmax(np.asarray(table)[word]))
        found.append(word)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_greedy_answers_are_the_likeliest_tokens_one_after_the_other(form, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 3)
    questions = lay_out(PROMPTS, WORDS, form)
    found = evaluate.greedy(NET, table := random_table(), questions)
    assert found.shape == (4, 3)
    for prompt, row, known in zip(PROMPTS, found, questions.known, strict=True):
        expected = followed(table, WORDS.ids(prompt.text)[-1], 3)
        assert row[known].tolist() == expected[: known.sum()]


@pytest.mark.parametrize("form", FORMS)
def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens(form):
    questions = lay_out(PROMPTS, WORDS, form, length=16)
    found = evaluate.log_probabilities(NET, table := random_table(), questions)
    logs = np.asarray(jax.nn.log_softmax(table), np.float64)
    for prompt, value in zip(PROMPTS, found, strict=True):
        words = WORDS.ids(prompt.text)[-1:] + WORDS.ids(prompt.answer)
        expected = sum(logs[a, b] for a, b in pairwise(words))
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_an_answer_is_right_only_as_a_whole():
    questions = lay_out(PROMPTS, WORDS)
    right = np.maximum(questions.answers, 0)
    assert evaluate.exact(right, questions).tolist() == [True, True, True, False]
    right[:, -1] += 1
    assert evaluate.exact(right, questions).tolist() == [False, True, True, False]


def test_accuracies_are_by_kind_with_the_wrong_answers_that_were_named():
    found = evaluate.accuracies(NET, cycle(), PROMPTS, WORDS)
    assert found == {"long": 100, "short": 50, "long_wrong": 100, "short_wrong": 0, "unknown_wrong": 100}


def test_a_prefix_match_asks_for_the_first_words_alone():
    prompts = [prompt._replace(most=1) for prompt in PROMPTS[:3]]
    assert evaluate.accuracies(NET, cycle(), prompts, WORDS)["short"] == 100
    assert evaluate.bleus(NET, cycle(), prompts, WORDS) == evaluate.bleus(NET, cycle(), PROMPTS[:3], WORDS)


def test_bleu_of_a_sentence_by_hand():
    assert evaluate.bleu([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == 1
    assert evaluate.bleu([1, 2], [3, 4]) == evaluate.bleu([], [1]) == 0
    # 3 of 4 words, (1 + 1) of (3 + 1) pairs, (0 + 1) of (2 + 1) triples and (0 + 1) of (1 + 1) fours; 4 words for 5
    expected = np.exp(1 - 5 / 4) * (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    np.testing.assert_allclose(evaluate.bleu([1, 2, 9, 4], [1, 2, 3, 4, 5]), expected)


def test_bleu_is_averaged_by_kind():
    found = evaluate.bleus(NET, cycle(), PROMPTS[:3], WORDS)
    assert found["long"] == 100
    np.testing.assert_allclose(found["short"], 50 * (1 + np.sqrt(0.5 * 0.5)))


def test_the_right_name_is_above_a_random_one_where_the_model_knows_it():
    prompts = [Prompt("right", "a", "b c"), Prompt("right", "d", "e")]
    found = evaluate.compare_names(NET, cycle(), prompts, ["b c", "e", "h i"], WORDS)
    assert found.above == 1
    assert found.right > -0.1 > found.random
    blind = evaluate.compare_names(NET, cycle(0.0), prompts, ["b c", "e", "h i"], WORDS)
    assert blind.above == 0
    np.testing.assert_allclose([blind.right, blind.random], -np.log(V), rtol=1e-5)


def test_antecedents_are_first_for_a_model_that_runs_backward_and_by_chance_for_a_blind_one():
    corpus = Corpus(tuple((f"{b}", f" {a}") for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)), (), ())
    knows = evaluate.antecedent_probe(NET, cycle(), corpus, WORDS, candidates=4)
    assert knows == (1.0, 1.0, 4)
    blind = evaluate.antecedent_probe(NET, cycle(0.0), corpus, WORDS, candidates=4)
    assert blind == (2.5, 0.0, 4)
    with pytest.raises(ValueError, match="12 candidates"):
        evaluate.antecedent_probe(NET, cycle(), corpus, WORDS, candidates=12)


def test_perplexity_is_over_the_tokens_of_documents_and_not_of_rows():
    documents = [{"tokens": np.array(WORDS.ids(text), np.int32)} for text in ("a b c d", "f h", "k l a")]
    table = random_table()
    logs = np.asarray(jax.nn.log_softmax(table), np.float64)
    pairs = [pair for row in documents for pair in pairwise(row["tokens"])]
    expected = np.exp(-np.mean([logs[a, b] for a, b in pairs]))
    for packed, length in ((True, 6), (False, 4)):
        rows = rows_of(documents, length, packed=packed)
        np.testing.assert_allclose(evaluate.perplexity(NET, table, rows), expected, rtol=1e-5)


def test_questions_that_do_not_fit_a_row_are_refused():
    with pytest.raises(ValueError, match="rows of 8 tokens, not of 6"):
        lay_out(PROMPTS, WORDS, length=6)
