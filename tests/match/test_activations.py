"""Activation matching: units that fire alike are brought together, whatever the batches and the scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.match.activations import ActivationMatching, activation_matching
from permjax.permutation import identity
from permjax.steps import MergeState, chain

pytestmark = pytest.mark.fast


def perceptron(p, x):
    for i in range(2):
        x = jnp.tanh(x @ p[f"{i}/kernel"] + p[f"{i}/bias"][None])
    return x @ p["2/kernel"] + p["2/bias"][None]


def attend(query, key, value):
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key) / 4, axis=-1)
    return jnp.einsum("bhts,bshd->bthd", scores, value).reshape((*value.shape[:2], -1))


def transformer(p, tokens):
    x = p["embed"][tokens]
    batch = x.shape[:2]
    query, key, value = jnp.split(x @ p["qkv/kernel"] + p["qkv/bias"][None, None], (15, 30), axis=-1)
    x = x + attend(query.reshape((*batch, 3, 5)), key.reshape((*batch, 3, 5)), value.reshape((*batch, 3, 4))) @ p["out"]
    x = x + jnp.tanh(x * p["norm"][None, None] @ p["up"]) @ p["down"]
    return x @ p["embed"].T


def grouped(p, tokens):
    x = p["embed"][tokens]
    batch = x.shape[:2]
    query, key = (x @ p["q"]).reshape((*batch, 2, 3, 4)), (x @ p["k"]).reshape((*batch, 2, 4))
    scores = jax.nn.softmax(jnp.einsum("btkqd,bskd->bkqts", query, key) / 4, axis=-1)
    value = (x @ p["v"]).reshape((*batch, 2, 3))
    x = x + jnp.einsum("bkqts,bskd->btkqd", scores, value).reshape((*batch, -1)) @ p["o"]
    return x @ p["embed"].T


def tokens(seed: int = 0):
    return [jnp.asarray(np.random.default_rng(seed + i).integers(0, 20, (8, 9))) for i in range(2)]


def points(batches: int = 3):
    return [jnp.asarray(np.random.default_rng(i).standard_normal((50, 6)), jnp.float32) for i in range(batches)]


CASES = {
    "perceptron": (perceptron, points),
    "attention with heads": (transformer, tokens),
    "grouped queries": (grouped, tokens),
}


def assert_same_permutations(one, two):
    for group in one:
        np.testing.assert_array_equal(one[group], two[group], err_msg=group)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_a_planted_order_is_recovered_exactly(networks, plant, name, seed):
    apply, data = CASES[name]
    a, b, truth = plant(networks[name], seed)
    result = activation_matching(networks[name], [a, b], apply=apply, data=data())
    assert_same_permutations(result.plan.permutations(1), truth)
    assert result.models[0] is a
    for leaf in a:
        np.testing.assert_array_equal(result.models[1][leaf], a[leaf])


@pytest.mark.parametrize("statistic", ["correlation", "covariance", "moment"])
def test_every_statistic_recovers_it_under_noise(networks, plant, statistic):
    a, b, truth = plant(networks["perceptron"], 3, noise=0.05)
    result = activation_matching(networks["perceptron"], [a, b], apply=perceptron, data=points(), statistic=statistic)
    assert_same_permutations(result.plan.permutations(1), truth)


def test_correlation_does_not_see_the_scale_of_units(write_chain, plant):
    spec = write_chain((6, 9, 4))

    def apply(p, x):
        return jax.nn.relu(x @ p["0/kernel"] + p["0/bias"][None]) @ p["1/kernel"] + p["1/bias"][None]

    a, b, truth = plant(spec, 1)
    scale = np.random.default_rng(0).uniform(0.01, 100, 9).astype(np.float32)
    b = {
        **b,
        "0/kernel": b["0/kernel"] * scale,
        "0/bias": b["0/bias"] * scale,
        "1/kernel": b["1/kernel"] / scale[:, None],
    }
    result = activation_matching(spec, [a, b], apply=apply, data=points())
    assert_same_permutations(result.plan.permutations(1), truth)


def test_batches_can_be_cut_anywhere(networks, draw_params):
    spec = networks["perceptron"]
    models = [draw_params(spec, 1), draw_params(spec, 2)]
    whole = jnp.concatenate(points())
    one = activation_matching(spec, models, apply=perceptron, data=[whole])
    cut = activation_matching(spec, models, apply=perceptron, data=[whole[:1], whole[1:100], whole[100:]])
    assert_same_permutations(one.plan.permutations(1), cut.plan.permutations(1))
    np.testing.assert_allclose(one.info.after, cut.info.after, atol=1e-5)


def test_the_reported_correlations_are_those_of_the_units_side_by_side(networks, draw_params):
    spec = networks["perceptron"]
    a, b = draw_params(spec, 1), draw_params(spec, 2)
    result = activation_matching(spec, [a, b], apply=perceptron, data=points())
    assert result.info.groups == ("h1", "h2")
    x = np.concatenate(points()).astype(np.float64)
    for model, found in ((b, result.info.before), (result.models[1], result.info.after)):
        units = [x @ m["0/kernel"] for m in (a, model)]
        expected = np.mean([np.corrcoef(units[0][:, i], units[1][:, i])[0, 1] for i in range(12)])
        assert found[0, 0] == pytest.approx(expected, abs=1e-4)
    assert (result.info.after > result.info.before).all()


def test_equal_models_stay_also_with_dead_units(networks, draw_params):
    spec = networks["perceptron"]
    a = draw_params(spec)
    a = {**a, "0/kernel": a["0/kernel"] * (np.arange(12) > 4), "1/kernel": a["1/kernel"] * 0}
    result = activation_matching(spec, [a, a], apply=perceptron, data=points())
    assert_same_permutations(result.plan.permutations(1), identity(spec))
    assert np.isfinite(result.info.after).all()


def test_every_other_model_is_aligned_to_the_first(networks, plant):
    spec = networks["perceptron"]
    a, b, truth = plant(spec, 1)
    result = activation_matching(spec, [a, b, a], apply=perceptron, data=points())
    assert_same_permutations(result.plan.permutations(1), truth)
    assert_same_permutations(result.plan.permutations(2), identity(spec))
    assert result.info.after.shape == (2, 2)


def test_batches_may_be_tuples_of_inputs(networks, plant):
    spec = networks["perceptron"]
    a, b, truth = plant(spec, 1)
    data = [(x[:, :3], x[:, 3:]) for x in points()]
    result = activation_matching(
        spec, [a, b], apply=lambda p, x, y: perceptron(p, jnp.concatenate([x, y], -1)), data=data
    )
    assert_same_permutations(result.plan.permutations(1), truth)


def test_the_step_does_what_the_function_does(networks, draw_params):
    spec = networks["perceptron"]
    models = [draw_params(spec, 1), draw_params(spec, 2)]
    state = MergeState.create(spec, models, key=jax.random.key(0), apply=perceptron, data=points())
    after = chain(ActivationMatching("covariance"))(state)
    expected = activation_matching(spec, models, apply=perceptron, data=points(), statistic="covariance")
    assert_same_permutations(after.plan.permutations(1), expected.plan.permutations(1))
    assert dataclasses.asdict(ActivationMatching()) == {"statistic": "correlation", "solver": "auto"}
    with pytest.raises(ValueError, match="ActivationMatching needs `data`"):
        ActivationMatching()(dataclasses.replace(state, data=None))


def test_bad_input_is_refused(networks, draw_params):
    spec = networks["perceptron"]
    a = draw_params(spec)
    for models, data, hyper, message in (
        ([a], points(), {}, "two models or more"),
        (
            [a, {**a, "0/bias": np.full_like(a["0/bias"], np.inf)}],
            points(),
            {},
            "'0/bias' of model 1 holds 0 NaN and 12 Inf",
        ),
        ([a, a], [], {}, "data gave no batches"),
        ([a, a], points(), {"statistic": "cosine"}, "no statistic 'cosine'; choose from"),
        ([a, a], [jnp.full((5, 6), jnp.nan)], {}, "cost of group 'h1'.* not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            activation_matching(spec, models, apply=perceptron, data=data, **hyper)


def test_data_that_can_be_read_only_once_is_refused_where_it_is_read_twice(networks, plant):
    a, b, _ = plant(networks["grouped queries"])
    with pytest.raises(ValueError, match="can be read again"):
        activation_matching(networks["grouped queries"], [a, b], apply=grouped, data=iter(tokens()))
