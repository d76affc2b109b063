"""Collapse measured: side paths against edited copies, states, signals, and the knob at the first token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.collapse import (
    SHIFT,
    State,
    retained,
    shift_first_token,
    side_efficacy,
    side_kl,
    side_losses,
    side_scores,
    state_of,
    unit_direction,
)
from permjax.edit.covariance import fingerprint
from permjax.edit.delta import Dense, LowRank, apply_delta
from permjax.edit.evaluate import evaluate_each, score_rows
from permjax.edit.places import mlp_place
from permjax.edit.prepare import Scored
from permjax.edit.signals import auc, roc, spearman
from permjax.merge.perplexity import Sentences, group_compared, group_losses, perplexity_of

pytestmark = pytest.mark.fast


def _deltas(case, count, *, dense=False):
    place = mlp_place(case.net.config, 1)
    rng = np.random.default_rng(0)
    inputs, outputs = np.shape(case.params[place.weight])[:: 1 if place.orientation == "in_out" else -1]
    found = []
    for _ in range(count):
        u, v = (0.5 * rng.standard_normal((size, 1)) for size in (outputs, inputs))
        change = LowRank(u, v, place.orientation)
        found.append({place.weight: change.dense() if dense else change})
    return found


def _probe(seed):
    tokens = np.random.default_rng(seed).integers(0, 23, (4, 8)).astype(np.int32)
    return {"text": [Sentences(tokens, np.arange(8)[None] < np.array([8, 8, 5, 3])[:, None])]}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request, edit_case):
    return edit_case(request.param)


@pytest.mark.parametrize("dense", [False, True])
def test_losses_beside_a_model_are_those_of_edited_copies(edit_case, dense):
    case = edit_case("gpt2")
    deltas = _deltas(case, 3, dense=dense)
    found = side_losses(case.net, case.params, deltas, _probe(0), chunk=2)["text"]
    for i, delta in enumerate(deltas):
        assert isinstance(delta[mlp_place(case.net.config, 1).weight], Dense if dense else LowRank)
        copy = group_losses(case.net.apply, apply_delta(case.params, delta), _probe(0))["text"]
        np.testing.assert_allclose(found.total[i], copy.total, rtol=2e-5)
        np.testing.assert_array_equal(found.predicted[i], copy.predicted)


def test_divergences_beside_a_model_are_those_of_edited_copies(edit_case):
    case = edit_case("gpt2")
    first, _ = deltas = _deltas(case, 2)
    deltas = [first, jax.tree.map(np.zeros_like, first)]
    found = side_kl(case.net, case.params, deltas, _probe(0))["text"]
    copy = group_compared(case.net.apply, case.params, apply_delta(case.params, first), _probe(0))["text"]
    np.testing.assert_allclose(found[0], copy.kl.sum() / copy.before.predicted.sum(), rtol=2e-5)
    assert found[0] > 1e-4
    assert found[1] == 0


def test_efficacy_and_scores_beside_a_model_are_those_of_edited_copies(edit_case):
    """Free running is computed from forced tokens, and must be what the model itself writes."""
    case = edit_case("gpt2")
    deltas = _deltas(case, len(case.edits))
    own = [_says_itself(case, delta, edit) for delta, edit in zip(deltas, case.edits, strict=True)]
    edits = [own[0], *case.edits[1:]]  # the first one takes
    found = side_efficacy(case.net, case.params, deltas, edits)
    scores = evaluate_each(case.net, case.params, deltas, edits)
    assert found.free[0] == 1
    for kind in ("bare", "prefixed", "free"):
        np.testing.assert_allclose(getattr(found, kind), getattr(scores, kind), err_msg=kind)
    rows = Scored(edits[0].tokens, edits[0].targets, edits[0].lengths)
    shares = side_scores(case.net, case.params, deltas, {"task": rows})["task"]
    for share, delta in zip(shares, deltas, strict=True):
        assert share == np.mean(score_rows(case.net, apply_delta(case.params, delta), rows).right == 1)
    assert shares[0] > 0


def _says_itself(case, delta, edit):
    """The edit whose target is what the edited model writes after the bare prompt."""
    tokens, targets = edit.tokens.copy(), edit.targets.copy()
    for place in np.flatnonzero(targets[0] >= 0):
        logits = case.net.apply(apply_delta(case.params, delta), jnp.asarray(tokens[:1]))
        targets[0, place] = tokens[0, place + 1] = int(jnp.argmax(logits[0, place]))
    return edit._replace(tokens=tokens, targets=targets)


def test_the_state_of_a_model_is_its_perplexity_and_its_share_of_exact_answers(edit_case):
    case = edit_case("gpt2")
    rows = Scored(case.edits[0].tokens, case.edits[0].targets, case.edits[0].lengths)
    state = state_of(case.net, case.params, _probe(0), {"task": rows})
    losses = group_losses(case.net.apply, case.params, _probe(0))["text"]
    assert state.perplexity["text"] == pytest.approx(float(perplexity_of(losses, "token")))
    assert state.tasks["task"] == np.mean(score_rows(case.net, case.params, rows).right == 1)


def test_what_is_retained_is_a_mean_of_shares():
    base = State({}, {"a": 0.8, "b": 0.5, "never": 0.0})
    assert State({}, {"a": 0.4, "b": 0.5, "never": 0.3}).retained(base) == pytest.approx(0.75)
    many = retained({"a": np.array([0.8, 0.0]), "b": np.array([0.5, 0.0])}, {"a": 0.8, "b": 0.5})
    np.testing.assert_allclose(many, [1, 0])
    with pytest.raises(ValueError, match="no right answer in any task"):
        retained({"a": 1.0}, {"a": 0.0})


# the knob


def test_the_knob_changes_the_first_token_and_adds_up(case):
    tokens = jnp.asarray(case.edits[0].tokens)
    direction = unit_direction(12, 0)
    assert np.linalg.norm(direction) == pytest.approx(1)
    plain = case.net.apply(case.params, tokens)
    off, there = (shift_first_token(case.net, case.params, direction, strength) for strength in (0.0, 3.0))
    np.testing.assert_allclose(off[0].apply(off[1], tokens), plain, atol=1e-5)
    logits = there[0].apply(there[1], tokens)
    assert float(jnp.abs(logits - plain)[:, 0].max()) > 1e-2
    net, twice = shift_first_token(*shift_first_token(case.net, case.params, direction, 1.0), direction, 2.0)
    assert net is there[0]
    np.testing.assert_allclose(net.apply(twice, tokens), logits, atol=1e-4)
    assert fingerprint(there[1]) != fingerprint(off[1])


def test_rows_without_a_first_position_are_left_alone(edit_case):
    """So that a later token of a cached text is not taken for the first."""
    case = edit_case("llama")
    tokens = jnp.asarray(case.edits[0].tokens)
    positions = 1 + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    net, params = shift_first_token(case.net, case.params, unit_direction(12, 0), 5.0)
    assert {*params} - {*case.params} == {SHIFT}
    there, plain = (one.apply(p, tokens, positions=positions) for one, p in ((net, params), (case.net, case.params)))
    np.testing.assert_allclose(there, plain, atol=1e-6)


# signals


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    signal, broken = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(signal[broken], signal[~broken])]
    assert auc(signal, broken) == pytest.approx(np.mean(pairs))
    assert auc(np.exp(signal), broken) == pytest.approx(np.mean(pairs))
    assert auc(-signal, broken) == pytest.approx(1 - np.mean(pairs))
    curve = roc(signal, broken)
    assert np.trapezoid(curve.found, curve.false_alarms) == pytest.approx(np.mean(pairs))


def test_what_is_no_number_is_the_worst_of_all():
    broken = np.array([True, False, False, True])
    assert auc(np.array([np.nan, 1.0, 2.0, np.inf]), broken) == 1
    assert np.isnan(auc(np.arange(3.0), np.zeros(3, bool)))


def test_correlation_is_that_of_ranks():
    a = np.array([1.0, 5.0, 2.0, 9.0])
    assert spearman(a, -np.exp(a)) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2.0, np.nan, 4.0]), np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(1)
    assert np.isnan(spearman(a, np.ones(4)))
