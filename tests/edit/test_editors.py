"""Editors on tiny random models: what they promise of the edited model, and their deltas from first principles."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.edit.alphaedit import AlphaEdit, alphaedit
from permjax.edit.base import Statistics
from permjax.edit.delta import apply_delta
from permjax.edit.memit import Memit, memit, mixed_keys
from permjax.edit.places import mlp_place
from permjax.edit.rome import CRome, Rome, c_rome, rome
from permjax.edit.values import Value, observe

pytestmark = pytest.mark.fast

LAYOUTS = ["gpt2", "llama", "gpt2, square", "llama, square"]
LAYER, LAYERS = 0, (0, 1)
BIAS = 0.5


@pytest.fixture(scope="module")
def drawn_values(edit_case):
    """Values that nobody searched, of random keys: what ROME writes without a look at the model."""

    @cache
    def draw(name):
        net, params, edits, _ = edit_case(name)
        place = mlp_place(net.config, LAYER)
        rng = np.random.default_rng(5)
        keys = rng.standard_normal((len(edits), 3, 12 if "square" in name else 20)).astype(np.float32)
        outputs = mapped(params[place.weight], keys, place) + BIAS
        delta = rng.standard_normal((len(edits), 12)).astype(np.float32)
        return Value(delta, outputs[:, 0], keys, outputs, np.full((len(edits), 4), np.nan, np.float32))

    return draw


@pytest.fixture(scope="module")
def block_values(edit_case):
    """Values that nobody searched, on top of what the model has after its last block."""

    @cache
    def draw(name):
        net, params, edits, _ = edit_case(name)
        seen = observe(net, params, edits, [mlp_place(net.config, LAYER), mlp_place(net.config, 1)])
        delta = np.random.default_rng(5).standard_normal(seen.block[:, 0].shape).astype(np.float32)
        keys = np.asarray(seen.keys[0])
        return Value(delta, np.asarray(seen.block[:, 0]), keys, keys, np.full((len(edits), 4), np.nan, np.float32))

    return draw


def mapped(weight, keys, place):
    """Values of keys without the bias, in float64."""
    weight = np.asarray(weight, np.float64)
    return np.asarray(keys, np.float64) @ (weight if place.orientation == "in_out" else weight.T)


def change_of(result, place):
    """dW as a map of keys to values."""
    value = np.asarray(result.delta[place.weight].dense().value, np.float64)
    return value.T if place.orientation == "in_out" else value


def constrained(covariance, direction, key, residual):
    """The change along `C^-1 direction` with `dW key = residual`, by plain inversion."""
    x = np.linalg.inv(covariance) @ direction
    return np.outer(residual, x / (x @ key))


# ROME


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("key", ["mixed", "mean", "bare"])
def test_the_edited_matrix_gives_the_key_its_value(edit_case, drawn_values, name, key):
    net, params, edits, covariances = edit_case(name)
    place, values = mlp_place(net.config, LAYER), drawn_values(name)
    result = rome(net, params, edits[:1], layer=LAYER, key=key, covariances=covariances, values=values)
    after = mapped(apply_delta(params, result.delta)[place.weight], values.keys[0], place) + BIAS
    wanted = values.start[0] + values.delta[0]
    got = {"mixed": after[0], "mean": after.mean(axis=0), "bare": after[0]}[key]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.linalg.matrix_rank(change_of(result, place)) == 1
    # an independent derivation in float64
    keys = np.asarray(values.keys[0], np.float64)
    direction = keys[0] if key == "bare" else keys.mean(axis=0)
    read = keys.mean(axis=0) if key == "mean" else keys[0]
    residual = wanted - (values.outputs[0].mean(axis=0) if key == "mean" else values.outputs[0, 0])
    independent = constrained(covariances[LAYER].matrix, direction, read, residual)
    edited = np.asarray(params[place.weight], np.float64) + (
        independent.T if place.orientation == "in_out" else independent
    )
    np.testing.assert_allclose(apply_delta(params, result.delta)[place.weight], edited, atol=1e-5)
    np.testing.assert_allclose(change_of(result, place), independent, rtol=1e-5, atol=1e-8)


def test_what_is_known_before_the_change_tells_its_size(edit_case, drawn_values):
    net, params, edits, covariances = edit_case("gpt2")
    place, values = mlp_place(net.config, LAYER), drawn_values("gpt2")
    result = rome(net, params, edits[:1], layer=LAYER, covariances=covariances, values=values)
    info, change, matrix = result.info, change_of(result, place), covariances[LAYER].matrix
    np.testing.assert_allclose(info.norm[0], np.linalg.norm(change), rtol=1e-6)
    np.testing.assert_allclose(info.norm[0], np.linalg.norm(values.delta[0]) / abs(info.denominator[0]), rtol=1e-5)
    weight = np.asarray(params[place.weight], np.float64)
    energy = np.trace(change @ matrix @ change.T) / np.trace(weight.T @ matrix @ weight)
    np.testing.assert_allclose(info.energy[0], np.sqrt(energy), rtol=1e-6)
    bare, mean = values.keys[0, 0], values.keys[0].mean(axis=0)
    np.testing.assert_allclose(info.cosine[0], bare @ mean / np.linalg.norm(bare) / np.linalg.norm(mean), rtol=1e-5)


def test_without_a_covariance_the_change_lies_along_the_key_itself(edit_case, drawn_values):
    net, params, edits, _ = edit_case("llama")
    place, values = mlp_place(net.config, LAYER), drawn_values("llama")
    result = c_rome(net, params, edits[:1], layer=LAYER, values=values)
    mean = values.keys[0].mean(axis=0).astype(np.float64)
    np.testing.assert_allclose(result.delta[place.weight].v[:, 0], mean / np.linalg.norm(mean), rtol=1e-6)
    norm = np.linalg.norm(change_of(result, place)) / np.linalg.norm(params[place.weight])
    np.testing.assert_allclose(result.info.energy[0], norm, rtol=1e-5)


# MEMIT and AlphaEdit, in two layers: what is missing is looked at again after the first


def by_hand(name, edit_case, values, solve):
    """The changes of both layers by the formula, `solve(layer, keys)`, and the model after them; all keys."""
    net, params, edits, _ = edit_case(name)
    places = [mlp_place(net.config, layer) for layer in LAYERS]
    wanted, changes, every = np.asarray(values.start, np.float64) + values.delta, [], []
    for i, place in enumerate(places):
        seen = observe(net, params, edits, places)
        keys = np.asarray(seen.keys[i], np.float64)
        every.append(((keys[:, 0] + keys[:, 1:].mean(axis=1)) / 2).T)
        missing = (wanted - seen.block[:, 0]).T / (2 - i)
        changes.append(missing @ solve(LAYERS[i], every[-1]).T)
        step = changes[-1].T if place.orientation == "in_out" else changes[-1]
        params = {**params, place.weight: params[place.weight] + jnp.float32(step)}
    return places, changes, params, every


@pytest.mark.parametrize("name", ["gpt2", "llama, square"])
def test_memit_is_its_closed_form_layer_by_layer(edit_case, block_values, name):
    net, params, edits, covariances = edit_case(name)
    values, shares = block_values(name), []

    def solve(layer, keys):
        inverse = np.linalg.inv(2.0 * covariances[layer].matrix + keys @ keys.T)
        shares.append(np.mean(np.diag(keys.T @ inverse @ keys)))
        return inverse @ keys

    result = memit(net, params, edits, layers=LAYERS, weight=2.0, covariances=covariances, values=values)
    for place, change in zip(*by_hand(name, edit_case, values, solve)[:2], strict=True):
        np.testing.assert_allclose(change_of(result, place), change, rtol=1e-5, atol=1e-5 * np.abs(change).max())
    np.testing.assert_allclose(result.info.share, shares, rtol=1e-5)
    np.testing.assert_allclose(result.info.norm, [np.linalg.norm(one.dense().value) for one in result.delta.values()])
    assert result.cache is None


@pytest.mark.parametrize("name", ["gpt2", "llama, square"])
def test_alphaedit_is_its_closed_form_and_spares_the_other_directions(edit_case, block_values, name):
    net, params, edits, covariances = edit_case(name)
    values, size = block_values(name), len(covariances[0].matrix)
    past = np.random.default_rng(0).standard_normal((size, 2))
    spectra = {layer: np.linalg.eigh(covariances[layer].matrix) for layer in LAYERS}

    def solve(layer, keys):
        small = spectra[layer][1][:, spectra[layer][0] < 0.2]
        bracket = small @ small.T @ (keys @ keys.T + past @ past.T) + 0.5 * np.eye(size)
        return np.linalg.solve(bracket, small @ small.T @ keys)

    given = {"layers": LAYERS, "threshold": 0.2, "ridge": 0.5, "covariances": covariances, "values": values}
    result = alphaedit(net, params, edits, cache=dict.fromkeys(LAYERS, past), **given)
    for layer, place, change in zip(LAYERS, *by_hand(name, edit_case, values, solve)[:2], strict=True):
        mine, large = change_of(result, place), spectra[layer][1][:, spectra[layer][0] >= 0.2]
        np.testing.assert_allclose(mine, change, rtol=1e-5, atol=1e-5 * np.abs(change).max())
        np.testing.assert_allclose(mine @ large, 0, atol=1e-9)
        np.testing.assert_array_equal(result.cache[layer][:, :2], past)


@pytest.mark.parametrize("editor", [Memit(LAYERS, weight=0.3), AlphaEdit(LAYERS, 0.3, ridge=0.1)])
def test_the_order_of_facts_does_not_matter(edit_case, block_values, editor):
    net, params, edits, covariances = edit_case("gpt2")
    values, order = block_values("gpt2"), np.asarray([2, 0, 1])
    one = editor(net, params, edits, covariances=covariances, values=values)
    shuffled = jax.tree.map(lambda x: x[order], values)
    other = editor(net, params, [edits[i] for i in order], covariances=covariances, values=shuffled)
    for name in one.delta:
        mine, theirs = (result.delta[name].dense().value for result in (one, other))
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(mine).max())


def test_the_relative_weight_counts_in_units_of_the_number_of_features(edit_case, block_values):
    net, params, edits, covariances = edit_case("gpt2")
    given = {"layers": LAYERS, "covariances": covariances, "values": block_values("gpt2")}
    relative = memit(net, params, edits, weight=0.5, relative=True, **given)
    absolute = memit(net, params, edits, weight=0.5 * 20, **given)
    weight = mlp_place(net.config, LAYER).weight
    np.testing.assert_allclose(relative.delta[weight].v, absolute.delta[weight].v, rtol=1e-9)


def test_remembered_keys_join_the_bracket_of_the_next_facts(edit_case, block_values):
    net, params, edits, covariances = edit_case("gpt2")
    values, editor = block_values("gpt2"), Memit(LAYERS, weight=2.0, remember=True)
    first = editor(net, params, edits, covariances=covariances, values=values)
    current = apply_delta(params, first.delta)
    seen = observe(net, current, edits, [mlp_place(net.config, layer) for layer in LAYERS])
    for layer, keys in zip(LAYERS, seen.keys, strict=True):  # the keys after the change are remembered
        np.testing.assert_allclose(first.cache[layer], mixed_keys(keys), atol=1e-5 * np.abs(keys).max())
    past = {layer: np.random.default_rng(layer).standard_normal((20, 2)) for layer in LAYERS}

    def solve(layer, keys):
        return np.linalg.inv(2.0 * covariances[layer].matrix + keys @ keys.T + past[layer] @ past[layer].T) @ keys

    second = editor(net, params, edits, covariances=covariances, values=values, cache=past)
    for place, change in zip(*by_hand("gpt2", edit_case, values, solve)[:2], strict=True):
        np.testing.assert_allclose(change_of(second, place), change, rtol=1e-5, atol=1e-5 * np.abs(change).max())
    assert second.cache[LAYER].shape == (20, 5)


def test_alphaedit_refuses_an_empty_null_space_and_a_missing_covariance(edit_case, block_values):
    net, params, edits, covariances = edit_case("gpt2")
    given = {"layers": LAYERS, "values": block_values("gpt2")}
    with pytest.raises(ValueError, match="Layer 0: The null space of the keys is empty"):
        alphaedit(net, params, edits, threshold=1e-3, covariances=covariances, **given)
    with pytest.raises(ValueError, match="layer 0 is asked for, but no covariances are given"):
        alphaedit(net, params, edits, **given)


# statistics


def test_covariances_of_another_model_are_refused(edit_case, drawn_values):
    net, params, edits, covariances = edit_case("gpt2")
    weight = mlp_place(net.config, LAYER).weight
    moved = {**params, weight: params[weight].at[0, 0].add(1e-3)}
    with pytest.raises(ValueError, match="collected with other parameters"):
        rome(net, moved, edits[:1], layer=LAYER, covariances=covariances, values=drawn_values("gpt2"))


def test_a_missing_or_singular_covariance_is_refused_by_its_layer(edit_case, drawn_values):
    net, params, edits, covariances = edit_case("gpt2")
    given = {"layer": LAYER, "values": drawn_values("gpt2")}
    with pytest.raises(ValueError, match="no covariance of layer 0, only of 1"):
        rome(net, params, edits[:1], covariances={1: covariances[1]}, **given)
    flat = dataclasses.replace(covariances[LAYER], matrix=np.ones((20, 20)))
    with pytest.raises(ValueError, match=r"layer 0, 20 x 20, is singular.*`ridge`"):
        rome(net, params, edits[:1], covariances={LAYER: flat}, **given)
    assert np.isfinite(rome(net, params, edits[:1], covariances={LAYER: flat}, ridge=1e-3, **given).info.norm).all()


def test_layers_that_are_not_there_or_out_of_order_are_refused(edit_case):
    net, params, edits, _ = edit_case("llama")
    with pytest.raises(ValueError, match=r"Layer 2 .* has 2 layers"):
        rome(net, params, edits[:1], layer=2)
    for layers in ((), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="ascending order"):
            memit(net, params, edits, layers=layers)
    with pytest.raises(ValueError, match="`weight` is 0"):
        memit(net, params, edits, layers=LAYERS, weight=0.0)


@pytest.mark.parametrize("editor", [Rome(LAYER), CRome(LAYER), Memit(LAYERS), AlphaEdit(LAYERS, 0.3)])
def test_a_model_that_has_collapsed_gives_a_change_that_is_not_finite_for_a_guard_to_refuse(
    edit_case, drawn_values, block_values, editor
):
    net, params, edits, covariances = edit_case("gpt2")
    statistics = Statistics.of(net, params, covariances)
    values = drawn_values("gpt2") if isinstance(editor, Rome) else block_values("gpt2")
    lost = jax.tree.map(lambda x: x * np.float32(np.nan), values)
    weight = mlp_place(net.config, LAYER).weight
    broken = {**params, weight: params[weight] * jnp.nan}
    result = editor(net, broken, edits, covariances=statistics, values=lost)
    assert not np.isfinite(result.delta[weight].dense().value).all()
