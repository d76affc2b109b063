"""What PLeaS fits and what it leaves, BatchNorm, and the details of a fit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.merge.block_apply import block_apply
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.norms import wide_statistics
from permjax.merge.partial import partial_plan
from permjax.merge.pleas import pleas
from permjax.merge.wide import Wide
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

X = zoo.image(120, 5)


# what is fitted, and what is not


def test_leaves_that_cannot_be_fitted_are_averaged_and_named(drawn, plan_of):
    def apply(p, x):
        h = jnp.take(p["embed"], x, axis=0) + p["positions"]
        h = jax.nn.relu(h @ p["w"]) + jax.nn.relu(jnp.tanh(h) @ p["w"])
        h = jax.nn.relu(
            jax.lax.conv_transpose(h @ p["v"], p["up"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        )
        return (h @ (p["scaled"] * 2)).mean(1) @ p["head"]

    like = {
        "embed": zoo.shape(17, 4), "positions": zoo.shape(5, 4), "w": zoo.shape(4, 6), "v": zoo.shape(6, 6),
        "up": zoo.shape(3, 6, 5), "scaled": zoo.shape(5, 6), "head": zoo.shape(6, 3),
    }  # fmt: skip
    x, models = zoo.tokens(40, 5), [drawn(like, 0), drawn(like, 1)]
    spec = trace_spec(apply, like, x, verify=False)
    result = pleas(spec, models, plan_of(spec, 0), apply=apply, data=[x])
    assert result.info.layers == ("v", "head")
    assert result.info.averaged == ("embed", "positions", "scaled", "up", "w")
    for name in result.info.averaged:
        np.testing.assert_allclose(result.models[0][name], (models[0][name] + models[1][name]) / 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt-2", "llama, heads by broadcast"])
def test_tied_embeddings_are_averaged_and_the_layers_between_fitted(drawn, plan_of, name):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    models = [drawn(case.params, seed) for seed in (0, 1)]
    result = pleas(spec, models, plan_of(spec, 0), apply=case.apply, data=[zoo.tokens(24, 5)])
    tied = "wte.weight" if name == "gpt-2" else "embed"
    assert tied in result.info.averaged
    np.testing.assert_allclose(result.models[0][tied], (models[0][tied] + models[1][tied]) / 2, rtol=1e-6)
    assert (result.info.after <= result.info.before + 1e-9).all()
    with pytest.raises(ValueError, match=f"leaf '{tied}' is summed over group"):
        pleas(spec, models, plan_of(spec, 0.5), apply=case.apply, data=[zoo.tokens(24, 5)])


@pytest.mark.fast
def test_positions_that_look_like_a_bias_are_none(drawn, plan_of, differ):
    def apply(p, x):
        h = jax.lax.conv_general_dilated(x, p["k"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(h.reshape(len(x), 4, -1) + p["positions"]).mean(1) @ p["head"]

    like = {"k": zoo.shape(4, 4, 1, 6), "positions": zoo.shape(1, 4, 6), "head": zoo.shape(6, 3)}
    x, models = zoo.image(40, 8, 8, 1), [drawn(like, 0), drawn(like, 1)]
    spec = trace_spec(apply, like, x, verify=False)
    result = pleas(spec, models, plan_of(spec, 1), apply=apply, data=[x])
    assert result.info.averaged == ("positions",)
    found = jax.jit(block_apply(spec, plan_of(spec, 1), apply))(result.models[0], x)
    assert differ(found, (apply(models[0], x) + apply(models[1], x)) / 2) <= 1e-5


@pytest.mark.fast
def test_experts_with_biases_are_fitted_one_by_one(drawn, plan_of):
    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("ebd,edf->ebf", jnp.broadcast_to(x, (3, *x.shape)), p["w1"]) + p["b1"][:, None])
        return jnp.einsum("ebf,efo->ebo", h, p["w2"]).sum(0)

    like = {"w1": zoo.shape(3, 5, 4), "b1": zoo.shape(3, 4), "w2": zoo.shape(3, 4, 2)}
    models = [drawn(like, 0), drawn(like, 1)]
    spec = trace_spec(apply, like, X)
    result = pleas(spec, models, plan_of(spec, 0), apply=apply, data=[X], ridge=0)
    x = np.append(np.asarray(X, np.float64), np.ones((len(X), 1)), 1)
    for e in range(3):
        wanted = (models[0]["w1"][e] + models[1]["w1"][e]) / 2  # linear in the same inputs, so the mean fits exactly
        np.testing.assert_allclose(result.models[0]["w1"][e], wanted, rtol=1e-3, atol=1e-4)
        hidden = sum(np.maximum(x @ np.append(p["w1"][e], p["b1"][e][None], 0), 0) for p in models) / 2
        outputs = sum(np.maximum(x @ np.append(p["w1"][e], p["b1"][e][None], 0), 0) @ p["w2"][e] for p in models) / 2
        np.testing.assert_allclose(result.models[0]["w2"][e], np.linalg.lstsq(hidden, outputs)[0], rtol=1e-3, atol=1e-3)
    assert result.info.averaged == ()


# BatchNorm


def normalised(p, h, mean, var):
    h = (h - mean) * jax.lax.rsqrt(var + 1e-3) * p["gain"] + p["shift"]
    return jax.nn.relu(h) @ p["w2"]


NORMED = {
    "w1": zoo.shape(5, 8), "mean": zoo.shape(8), "var": zoo.shape(8), "gain": zoo.shape(8), "shift": zoo.shape(8),
    "w2": zoo.shape(8, 3),
}  # fmt: skip


def evaluated(p, x):
    return normalised(p, x @ p["w1"], p["mean"], p["var"])


def first_statistics(p, x):
    h = x @ p["w1"]
    return {**p, "mean": h.mean(0), "var": h.var(0)}


def batch_statistics(p, x):
    h = x @ p["w1"]
    mean, var = h.mean(0), h.var(0)
    normalised(p, h, mean, var)
    return {**p, "mean": mean, "var": var}


@pytest.fixture(scope="module")
def normed_setting(drawn):
    with jax.numpy_rank_promotion("allow"):
        spec = trace_spec(evaluated, NORMED, X, statistics=["mean", "var"])
        models = [batch_statistics(drawn(NORMED, seed), X) for seed in (0, 1)]
        return spec, [jax.tree.map(np.asarray, model) for model in models]


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_statistics_of_batches_follow_the_fitted_weights(normed_setting, mode):
    spec, models = normed_setting
    plan, data = partial_plan(spec, ratios={"w1:1": 0.5}), [X[:60], X[60:]]
    result = pleas(spec, models, plan, apply=evaluated, data=data, batch_statistics=batch_statistics, mode=mode)
    again = wide_statistics(Wide(spec, plan), result.models[0], [batch_statistics] * 2, [(x,) for x in data])
    for name in ("mean", "var"):
        np.testing.assert_allclose(result.models[0][name], again[name], rtol=1e-6)
    without = pleas(spec, models, plan, apply=evaluated, data=data, mode=mode)
    prior = wide_average(Wide(spec, plan), models, contracted_axes(evaluated, models[0], X))
    np.testing.assert_array_equal(without.models[0]["mean"], prior["mean"])
    np.testing.assert_array_equal(without.models[0]["gain"], prior["gain"])
    assert result.info.averaged == ()


@pytest.mark.fast
def test_parents_statistics_make_them_whole_again(normed_setting, plan_of, differ):
    spec, models = normed_setting
    plan = plan_of(spec, 1)
    result = pleas(spec, models, plan, apply=evaluated, data=[X])
    found = block_apply(spec, plan, evaluated)(result.models[0], X)
    assert differ(found, sum(evaluated(p, X) for p in models) / 2) <= 3e-6


@pytest.mark.fast
def test_fitting_on_the_merged_network_takes_a_function_that_runs_all_of_it(normed_setting, plan_of):
    spec, models = normed_setting
    fit = partial(pleas, spec, models, plan_of(spec, 0.5), apply=evaluated, data=[X], batch_statistics=first_statistics)
    assert fit().info.layers == ("w1", "w2")
    with pytest.raises(ValueError, match=r"`batch_statistics` contracts 1 leaves, `apply` 2.*has to run the whole"):
        fit(mode="sequential")
