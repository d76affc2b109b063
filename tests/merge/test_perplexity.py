"""Perplexity is what NumPy says, by all three conventions, whatever the padding; energies are what data say."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.merge.energy import InputMoment, energies, input_moments
from permjax.merge.perplexity import (
    CONVENTIONS,
    Sentences,
    candidate_losses,
    compared,
    group_losses,
    padded,
    perplexity,
    perplexity_of,
    sentence_losses,
)

pytestmark = pytest.mark.fast

WORDS, WIDTH, HIDDEN = 7, 4, 6
SENTENCES = [[1, 2, 3], [4, 0], [6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4], [2, 2, 2, 2]]


def apply(params, tokens):
    """A language model that looks at one word only; `down` is stored `[out, in]`."""
    hidden = jax.nn.relu(jnp.take(params["table"], tokens, axis=0) @ params["up"])
    return jnp.einsum("sth,vh->stv", hidden, params["down"])


def side(params, candidate, tokens):
    return apply({**params, "down": params["down"] + jnp.outer(*candidate)}, tokens)


@functools.cache
def model(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"table": (WORDS, WIDTH), "up": (WIDTH, HIDDEN), "down": (WORDS, HIDDEN)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def by_hand(params, sentence):
    """Logits and -log p of every token but the first, in float64 NumPy."""
    table, up, down = (np.asarray(params[name], np.float64) for name in ("table", "up", "down"))
    logits = np.maximum(table[sentence[:-1]] @ up, 0) @ down.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p, -log_p[np.arange(len(sentence) - 1), sentence[1:]]


def losses_of(params, sentences, **how):
    return group_losses(apply, params, {"text": padded(sentences, **how)})["text"]


def test_the_three_conventions_are_those_of_numpy():
    losses = [by_hand(model(), sentence)[1] for sentence in SENTENCES]
    whole = sum(x.sum() for x in losses)
    expected = {
        "sentence_mean": np.mean([np.exp(x.mean()) for x in losses]),
        "token": np.exp(whole / sum(len(x) for x in losses)),
        "input_token": np.exp(whole / sum(len(x) + 1 for x in losses)),
    }
    found = losses_of(model(), SENTENCES)
    assert expected.keys() == set(CONVENTIONS)
    assert len({round(value, 3) for value in expected.values()}) == 3
    for convention, value in expected.items():
        assert float(perplexity_of(found, convention)) == pytest.approx(value, rel=1e-5)
    (batch,) = padded(SENTENCES, longest=8)
    cut = np.mean([np.exp(by_hand(model(), s[:8])[1].mean()) for s in SENTENCES])
    assert float(perplexity(apply, model(), *batch)) == pytest.approx(cut, rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_words():
    knows_nothing = {**model(), "down": jnp.zeros((WORDS, HIDDEN))}
    found = losses_of(knows_nothing, SENTENCES)
    assert float(perplexity_of(found, "sentence_mean")) == pytest.approx(WORDS, rel=1e-5)
    assert float(perplexity_of(found, "token")) == pytest.approx(WORDS, rel=1e-5)
    predicted, inputs = (sum(map(len, SENTENCES)) - k for k in (len(SENTENCES), 0))
    assert float(perplexity_of(found, "input_token")) == pytest.approx(WORDS ** (predicted / inputs), rel=1e-5)


def test_the_first_token_is_never_scored():
    """Words are foretold alike whatever comes before, so another first word changes nothing, a later one does."""

    def blind(params, tokens):
        return jnp.broadcast_to(params, (*tokens.shape, WORDS))

    def total(sentence):
        return float(perplexity(blind, jnp.arange(float(WORDS)), *padded([sentence])[0]))

    assert total([0, 3, 5]) == total([6, 3, 5]) != total([0, 4, 5])


def test_how_sentences_are_padded_and_batched_changes_nothing():
    some = losses_of(model(), SENTENCES, rows=1)
    other = losses_of(model(), SENTENCES[::-1], rows=5, longest=11)
    for convention in CONVENTIONS:
        assert float(perplexity_of(some, convention)) == pytest.approx(
            float(perplexity_of(other, convention)), rel=1e-6
        )
    tokens, mask = padded(SENTENCES, longest=8)[0]
    garbage = Sentences(np.where(mask, tokens, 3), mask)
    for x, y in zip(
        sentence_losses(apply, model(), Sentences(tokens, mask)), sentence_losses(apply, model(), garbage), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_batches_have_few_shapes_and_hold_every_sentence_once():
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 9, size).tolist() for size in rng.integers(2, 60, 50)]
    batches = padded([*given, [], [5]], rows=4, longest=24)
    assert {batch.tokens.shape for batch in batches} <= {(4, 8), (4, 16), (4, 24)}
    held = [tuple(t[m].tolist()) for batch in batches for t, m in zip(*batch, strict=True) if m.any()]
    assert Counter(held) == Counter(tuple(sentence[:24]) for sentence in given)
    for _, mask in batches:
        assert (mask == (np.arange(mask.shape[1]) < mask.sum(1)[:, None])).all(), "padded on the right"


def test_candidates_on_a_side_path_lose_what_edited_models_lose_in_chunks_of_any_size():
    rng = np.random.default_rng(1)
    edits = tuple(jnp.asarray(rng.standard_normal((4, n)), jnp.float32) for n in (WORDS, HIDDEN))
    (batch,) = padded(SENTENCES, longest=8)
    found = candidate_losses(side, model(), edits, batch, chunk=2)
    for i in range(4):
        edited = {**model(), "down": model()["down"] + jnp.outer(edits[0][i], edits[1][i])}
        expected = sentence_losses(apply, edited, batch)
        np.testing.assert_allclose(found.total[i], expected.total, rtol=1e-5)
        value = perplexity_of(found)[i]
        assert float(value) == pytest.approx(float(perplexity_of(expected)), rel=1e-5)
    np.testing.assert_allclose(found.total, candidate_losses(side, model(), edits, batch, chunk=4).total, rtol=1e-6)


def test_the_divergence_is_that_of_numpy_and_none_from_a_model_to_itself():
    (batch,) = padded(SENTENCES, longest=16, rows=4)[1:]
    sentence = batch.tokens[0][batch.mask[0]].tolist()
    found = compared(apply, model(0), model(1), batch)
    old, new = (by_hand(model(seed), sentence)[0] for seed in (0, 1))
    assert float(found.kl[0]) == pytest.approx((np.exp(old) * (old - new)).sum(), rel=1e-5)
    assert float(found.kl[1:].sum()) == 0
    np.testing.assert_allclose(found.after.total, sentence_losses(apply, model(1), batch).total)
    assert float(jnp.abs(compared(apply, model(), model(), batch).kl).max()) == 0


def test_words_that_a_model_rules_out_do_not_spoil_the_divergence():
    def ruled_out(params, tokens):
        return apply(params, tokens).at[:, :, 6].set(-jnp.inf)

    (batch,) = padded([[1, 2, 3]])
    assert np.isfinite(compared(ruled_out, model(0), model(1), batch).kl).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: padded([[3], []]), "no sentence of two tokens"),
        (lambda: padded(SENTENCES, rows=0), "rows must be at least 1"),
        (lambda: padded(SENTENCES, longest=1), "longest at least 2"),
        (lambda: perplexity_of(losses_of(model(), SENTENCES), "words"), "no convention 'words'.*sentence_mean"),
        (lambda: input_moments(apply, model(), []), "no batch"),
        (lambda: energies(model(), model(), {"dwn": InputMoment(np.eye(6), (1,))}), "'dwn'.*down"),
        (lambda: energies(model(), model(), {"down": InputMoment(np.eye(6), (0,))}), "6 inputs along the axes"),
    ],
)
def test_what_cannot_be_measured_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# energies


def inputs_of(params):
    """What goes into each matrix at every token of the sentences, padding left out."""
    flat = np.concatenate([np.asarray(s) for s in SENTENCES])
    first = np.asarray(params["table"], np.float64)[flat]
    return {"up": first, "down": np.maximum(first @ np.asarray(params["up"], np.float64), 0)}


def test_moments_are_those_of_the_inputs_without_padding():
    found = input_moments(apply, model(), padded(SENTENCES))
    expected = inputs_of(model())
    assert found.keys() == expected.keys()
    assert {name: one.axes for name, one in found.items()} == {"up": (0,), "down": (1,)}
    for name, x in expected.items():
        np.testing.assert_allclose(found[name].matrix, x.T @ x / len(x), rtol=1e-5)


def test_the_energy_is_what_a_change_adds_to_the_outputs_relative_to_them():
    after = {**model(), **{name: model()[name] + 0.3 * model(2)[name] for name in ("up", "down")}}
    found = jax.jit(energies)(model(), after, input_moments(apply, model(), padded(SENTENCES)))
    for name, x in inputs_of(model()).items():
        old, new = (np.asarray(params[name], np.float64) for params in (model(), after))
        old, new = (old.T, new.T) if name == "down" else (old, new)
        assert float(found[name]) == pytest.approx(np.linalg.norm(x @ (new - old)) / np.linalg.norm(x @ old), rel=1e-4)


def test_no_change_has_no_energy_and_a_broken_one_has_no_number():
    moments = input_moments(apply, model(), padded(SENTENCES))
    copy = jax.tree.map(jnp.array, model())
    assert [float(value) for value in energies(model(), copy, moments).values()] == [0, 0]
    zero = {**model(), "up": jnp.zeros_like(model()["up"])}
    assert float(energies(zero, dict(zero), moments)["up"]) == 0
    assert float(energies(zero, model(), moments)["up"]) == np.inf
    for bad in (np.nan, np.inf):
        broken = {**model(), "up": model()["up"].at[0, 0].set(bad)}
        assert np.isnan(float(energies(model(), broken, moments)["up"]))


def test_inputs_without_a_mask_count_all():
    x = np.random.default_rng(0).standard_normal((9, 5, WIDTH)).astype(np.float32)

    def layer(params, x):
        return x @ params["up"]

    found = input_moments(layer, {"up": model()["up"]}, [x[:4], (x[4:],)])["up"]
    flat = x.reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(found.matrix, flat.T @ flat / len(flat), rtol=1e-5)
