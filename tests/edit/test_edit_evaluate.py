"""Scores in a world of bigrams, where the next word is known: a table of what follows what."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.delta import Dense
from permjax.edit.evaluate import evaluate, evaluate_each, prepare_probe, score_rows
from permjax.edit.prepare import Scored, prepare_all
from permjax.edit.requests import EditRequest
from permjax.io.tokenizers import WordTokenizer
from permjax.nets.base import Net
from permjax.nets.language import unchanged

pytestmark = pytest.mark.fast

WORDS = "is a Ann Bob likes hates tea green red cake now so says sees one two three four five six".split()
BEFORE = {"likes": "cake", "green": "tea", "tea": "red", "hates": "red", "sees": "one"}
REQUESTS = [
    EditRequest("{} likes", "Ann", "green tea", paraphrases=("Bob likes", "Ann hates"), neighbours=("Bob sees",)),
    EditRequest("{} hates", "Bob", "red", neighbours=("Ann likes", "Bob sees")),
]


def apply(params, tokens, *, positions=None, visible=None, hook=unchanged):
    hook("bigrams:key", tokens[..., None].astype(jnp.float32))
    return params["table"][tokens]


def table(**following):
    values = np.zeros((len(WORDS), len(WORDS)), np.float32)
    for word, after in (BEFORE | following).items():
        values[WORDS.index(word), WORDS.index(after)] = 5.0
    return {"table": jnp.asarray(values)}


@pytest.fixture(scope="module")
def world():
    tokenizer = WordTokenizer(tuple(WORDS))
    edits = prepare_all(REQUESTS, tokenizer, prefixes=["now so", "Ann sees"])
    probes = [prepare_probe(request, tokenizer, pad_to=8) for request in REQUESTS]
    same = lambda *_: None  # noqa: E731
    return Net(SimpleNamespace(positions=8), same, apply, same, same), edits, probes


def test_a_model_without_the_facts_scores_what_it_knows_by_chance(world):
    net, edits, probes = world
    scores = evaluate(net, table(), edits, probes=probes, before=table())
    np.testing.assert_allclose(scores.bare, [0.5, 1.0])  # "tea" after "green" is right
    np.testing.assert_allclose(scores.prefixed, [0.5, 1.0])
    np.testing.assert_allclose(scores.free, [0.0, 1.0])  # but "green" is never written
    np.testing.assert_allclose(scores.paraphrase, [0.5, np.nan])
    np.testing.assert_allclose(scores.locality, [1.0, 1.0])
    rest = np.log(np.exp(5.0) + len(WORDS) - 1)
    np.testing.assert_allclose(scores.nll, [rest - 2.5, rest - 5.0], rtol=1e-5)


def test_an_edit_that_takes_and_what_it_breaks_are_seen(world):
    net, edits, probes = world
    now = table(likes="green", sees="two")
    now["table"] = now["table"].at[WORDS.index("likes"), WORDS.index("cake")].set(0.0)
    now["table"] = now["table"].at[WORDS.index("sees"), WORDS.index("one")].set(0.0)
    scores = evaluate(net, now, edits, probes=probes, before=table())
    np.testing.assert_allclose(scores.free, [1.0, 1.0])
    np.testing.assert_allclose(scores.bare, [1.0, 1.0])
    np.testing.assert_allclose(scores.paraphrase, [0.75, np.nan])  # after "hates" only "tea" is right
    np.testing.assert_allclose(scores.locality, [0.0, 0.0])


def test_without_probes_nothing_is_asked_and_prefixes_may_be_missing(world):
    net, edits, _ = world
    bare = [edit._replace(**{n: getattr(edit, n)[:1] for n in ("tokens", "targets", "lengths")}) for edit in edits]
    scores = evaluate(net, table(), bare)
    for part in (scores.prefixed, scores.paraphrase, scores.locality):
        assert np.isnan(part).all()
    np.testing.assert_allclose(scores.bare, [0.5, 1.0])


def test_each_edit_is_scored_in_the_model_that_has_it_alone(world):
    net, edits, probes = world
    right = Dense(np.asarray(table(likes="green")["table"] - table()["table"]) * np.float32(2))
    wrong = Dense(np.asarray(table(hates="six")["table"] - table()["table"]) * np.float32(2))
    scores = evaluate_each(net, table(), [{"table": right}, {"table": wrong}], edits, probes=probes)
    np.testing.assert_allclose(scores.free, [1.0, 0.0])
    np.testing.assert_allclose(scores.locality, [1.0, 1.0])


def test_any_number_of_rows_is_scored_by_the_rows_alone(world):
    net, _, _ = world
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(WORDS), (70, 8)).astype(np.int32)
    targets = np.where(np.arange(8) == rng.integers(0, 8, (70, 1)), rng.integers(0, len(WORDS), (70, 8)), -1)
    rows = Scored(tokens, targets.astype(np.int32), np.full(70, 8, np.int32))
    params = {"table": jnp.asarray(rng.standard_normal((len(WORDS),) * 2).astype(np.float32))}
    scores = score_rows(net, params, rows)
    place = targets.argmax(axis=1)
    logits = np.asarray(params["table"])[tokens[np.arange(70), place]]
    wanted = targets[np.arange(70), place]
    np.testing.assert_array_equal(scores.next, logits.argmax(axis=1))
    np.testing.assert_array_equal(scores.right, logits.argmax(axis=1) == wanted)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(70), wanted]
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-5)


def test_probes_of_other_edits_are_refused(world):
    net, edits, probes = world
    with pytest.raises(ValueError, match="2 edits but 1 probes"):
        evaluate(net, table(), edits, probes=probes[:1])
