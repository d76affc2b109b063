"""The search for the value that an edit writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.base import Statistics
from permjax.edit.delta import apply_delta
from permjax.edit.finetune import FtL
from permjax.edit.memit import Memit
from permjax.edit.places import mlp_place
from permjax.edit.rome import Rome, rome
from permjax.edit.values import ValueSettings, observe, solve_values
from permjax.nets.registry import build

pytestmark = pytest.mark.fast

LAYER = 0


@pytest.fixture(scope="module")
def searched(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    editor = Rome(LAYER)
    return editor, editor.solve(net, params, edits)


def test_the_search_is_that_of_a_plain_loop(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    edit, place, rows = edits[0], mlp_place(net.config, LAYER), np.arange(4)
    settings = ValueSettings(kl=3.0, clamp=0.2, weight_decay=1.5, learning_rate=0.3)  # so that all have a say
    found = solve_values(net, params, [edit], place, settings)
    tokens = jnp.concatenate([edit.tokens, edit.kl_tokens[None]])
    subject = np.asarray([*edit.subject, edit.kl_subject])
    answers = [edit.tokens[r, edit.lengths[r] - 2 : edit.lengths[r]] for r in range(3)]

    def run(delta):
        def hook(at, x):
            return x.at[rows, subject].add(delta) if at == place.value else x

        logs = jax.nn.log_softmax(net.apply(params, tokens, hook=hook))
        asked = [(r, edit.lengths[r] - 3 + i, answers[r][i]) for r in range(3) for i in range(2)]
        nll = -sum(logs[where] for where in asked) / 6
        return nll, logs[3, edit.kl_subject]

    scale = np.linalg.norm(found.start[0])

    @jax.jit
    @jax.value_and_grad
    def loss(delta):
        (nll, new), (_, old) = run(delta), run(jnp.zeros(12))
        length = jnp.sqrt(jnp.sum(delta**2) + 1e-30)
        return nll + 3.0 * jnp.sum(jnp.exp(new) * (new - old)) + 1.5 * length / scale**2

    delta, first, second, losses = np.zeros(12), 0.0, 0.0, []
    for step in range(1, 6):
        value, slope = loss(jnp.float32(delta))
        losses.append(float(value))
        slope = np.asarray(slope, np.float64)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        delta = delta - 0.3 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        delta *= min(1, 0.2 * scale / np.linalg.norm(delta))
    np.testing.assert_allclose(found.losses[0, :5], losses, rtol=1e-4)


@pytest.mark.parametrize("at", ["value", "block"])
@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_the_last_loss_is_that_of_the_whole_model_with_the_value_added(edit_case, layout, at):
    net, params, edits, _ = edit_case(layout)
    targets = edits[0].targets.copy()
    targets[1, : edits[0].lengths[1] - 2] = -1  # an answer of one token among others of two
    edit = edits[0]._replace(subject=edits[0].subject - np.asarray([1, 2, 0], np.int32), targets=targets)
    place = mlp_place(net.config, LAYER)
    settings = ValueSettings(steps=4, kl=0.0, weight_decay=0.0, learning_rate=0.1)
    found = solve_values(net, params, [edit, edits[1]], place, settings, at=at)

    def hook(name, x):
        return x.at[np.arange(3), edit.subject].add(found.delta[0]) if name == getattr(place, at) else x

    logs = np.asarray(jax.nn.log_softmax(net.apply(params, jnp.asarray(edit.tokens), hook=hook)))
    rows = [[-logs[r, t, wanted] for t, wanted in enumerate(edit.targets[r]) if wanted >= 0] for r in range(3)]
    assert [len(row) for row in rows] == [2, 1, 2]
    np.testing.assert_allclose(found.losses[0, 3], np.mean([np.mean(row) for row in rows]), rtol=1e-4)
    assert found.losses[0, 3] < found.losses[0, 0]


def test_the_value_starts_from_what_the_bare_prompt_has_and_lowers_the_loss(edit_case, searched):
    net, params, edits, _ = edit_case("gpt2")
    _, found = searched
    place = mlp_place(net.config, LAYER)
    bias = np.asarray(params[place.weight.replace("weight", "bias")])
    np.testing.assert_allclose(found.start, found.keys[:, 0] @ np.asarray(params[place.weight]) + bias, atol=1e-5)
    np.testing.assert_allclose(found.start, found.outputs[:, 0], atol=1e-6)
    np.testing.assert_allclose(found.keys, observe(net, params, edits, [place]).keys[0], atol=1e-5)
    assert (np.nanmin(found.losses, axis=1) < found.losses[:, 0] - 0.1).all()
    lengths = np.linalg.norm(found.delta, axis=1) / np.linalg.norm(found.start, axis=1)
    assert (lengths <= 4 * (1 + 1e-5)).all()


def test_edits_searched_side_by_side_find_what_each_finds_alone(edit_case, searched):
    net, params, edits, _ = edit_case("gpt2")
    editor, alone = searched
    together = editor.solve(net, params, edits, chunk=2)  # of three: the last chunk is filled up
    assert together.delta.shape == alone.delta.shape
    np.testing.assert_allclose(together.losses[:, :4], alone.losses[:, :4], rtol=1e-4)
    np.testing.assert_array_equal(np.isnan(together.losses), np.isnan(alone.losses))


def test_a_model_in_half_precision_is_edited_in_its_own_dtype(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    half = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    settings = ValueSettings(steps=4, relative=True)
    results = [rome(net, given, edits[:1], layer=LAYER, value=settings) for given in (half, params)]
    losses = results[0].info.losses
    np.testing.assert_allclose(losses, results[1].info.losses, rtol=0.1)
    edited = apply_delta(half, results[0].delta)
    assert {leaf.dtype for leaf in edited.values()} == {jnp.dtype(jnp.bfloat16)}
    assert sum(edited[name] is not half[name] for name in half) == 1


def test_a_search_ends_where_the_loss_is_low_enough(edit_case, searched):
    net, params, edits, _ = edit_case("gpt2")
    losses = searched[1].losses[0]
    for stop, steps in ((100.0, 1), (float(losses[2:4].mean()), 1 + int(np.argmax(losses < losses[2:4].mean())))):
        settings = dataclasses.replace(Rome(LAYER).value, stop=stop)
        found = solve_values(net, params, edits[:1], mlp_place(net.config, LAYER), settings)
        assert np.isfinite(found.losses).sum() == steps
        np.testing.assert_allclose(found.losses[0, :steps], losses[:steps], rtol=1e-5)
        assert found.delta.any() == (steps > 1)


def test_a_relative_search_does_not_see_the_scale_of_values(edit_case):
    """Values twice as large and what reads them half as large: the same model, and the same relative search."""
    net, params, edits, _ = edit_case("gpt2")
    settings = ValueSettings(weight_decay=0.1, relative=True)
    place = mlp_place(net.config, 1)
    names = [n for n in params if n.endswith(("wte.weight", "wpe.weight")) or "c_proj" in n]
    small = dataclasses.replace(net.config, layer_norm_epsilon=1e-9, tie_word_embeddings=False)
    head = {"lm_head.weight": params["transformer.wte.weight"]}
    large = {n: x * 2 if n in names else x for n, x in params.items()} | head
    found = [solve_values(build(small), p, edits[:1], place, settings) for p in (params | head, large)]
    np.testing.assert_allclose(found[1].losses, found[0].losses, rtol=1e-3)
    np.testing.assert_allclose(found[1].delta, 2 * found[0].delta, rtol=2e-2, atol=2e-2)


def test_searches_of_no_edit_of_unlike_edits_or_of_no_step_are_refused(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    longer = edits[0]._replace(tokens=np.pad(edits[0].tokens, ((0, 0), (0, 1))))
    for editor in (Rome(LAYER).solve, Rome(LAYER), Memit((0,)), FtL(LAYER)):
        with pytest.raises(ValueError, match="No edit was given"):
            editor(net, params, [])
    with pytest.raises(ValueError, match=r"shapes \(3, 8\) and \(3, 9\)"):
        Rome(LAYER).solve(net, params, [edits[0], longer])
    with pytest.raises(ValueError, match="`steps` is 0"):
        dataclasses.replace(Rome(LAYER).value, steps=0)


def test_several_facts_by_rome_are_written_one_after_the_other(edit_case):
    net, params, edits, covariances = edit_case("gpt2")
    both = rome(net, params, edits[:2], layer=LAYER, covariances=covariances)
    statistics = Statistics.of(net, params, covariances)
    first = rome(net, params, edits[:1], layer=LAYER, covariances=statistics)
    second = rome(net, apply_delta(params, first.delta), edits[1:2], layer=LAYER, covariances=statistics)
    weight = mlp_place(net.config, LAYER).weight
    wanted = first.delta[weight].dense().value + second.delta[weight].dense().value
    np.testing.assert_allclose(both.delta[weight].dense().value, wanted, rtol=1e-5, atol=1e-7)
    assert both.info.losses.shape == (2, 20)
