"""REPAIR at any width: as the plain one where everything is merged, and unit by unit against the parents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax import tree
from permjax.merge.average import average
from permjax.merge.block_apply import block_apply
from permjax.merge.block_repair import block_repair
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.merge.repair import repair
from permjax.merge.wide import Wide
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

X = zoo.image(60, 5)
MLP = {"w1": zoo.shape(5, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, 6), "b2": zoo.shape(6), "w3": zoo.shape(6, 3)}


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"]


@pytest.fixture(scope="module")
def mlp_spec():
    with jax.numpy_rank_promotion("allow"):
        return trace_spec(mlp, MLP, X)


@pytest.fixture
def parents(drawn):
    return [drawn(MLP, seed) for seed in (0, 1)]


@pytest.mark.parametrize("name", ["mlp", "depthwise and grouped convolutions"])
def test_a_plain_merge_is_repaired_as_by_the_plain_method(drawn, plan_of, name):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    models = [drawn(case.params, seed) for seed in (0, 1)]
    data = [
        np.random.default_rng(s).standard_normal((20, *case.inputs[0].shape[1:])).astype(np.float32) for s in (1, 2)
    ]
    found = block_repair(spec, models, plan_of(spec, 0), apply=case.apply, data=data)
    wanted = repair(spec, models, average(spec, models).models[0], apply=case.apply, data=data)
    assert set(found.info) == set(wanted.info.layers)
    for name, leaf in tree.flatten(wanted.models[0]).items():
        np.testing.assert_allclose(tree.flatten(found.models[0])[name], leaf, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("backend", [np, jnp])
def test_models_kept_apart_need_no_repair(mlp_spec, parents, plan_of, differ, backend):
    models = [jax.tree.map(backend.asarray, parent) for parent in parents]
    plan = plan_of(mlp_spec, 1)
    result = block_repair(mlp_spec, models, plan, apply=mlp, data=[X])
    prior = wide_average(Wide(mlp_spec, plan), models, contracted_axes(mlp, models[0], X))
    assert all(isinstance(leaf, type(models[0]["w1"])) for leaf in result.models[0].values())
    assert result.info == ("w1", "w2")
    for name, leaf in prior.items():
        np.testing.assert_allclose(result.models[0][name], leaf, rtol=1e-4, atol=1e-5)


def test_every_unit_gets_the_moments_of_its_parents(mlp_spec, parents):
    plan = partial_plan(mlp_spec, {"w1:1": 4, "w2:1": 3})
    (merged,), *_ = block_repair(mlp_spec, parents, plan, apply=mlp, data=[X[:25], X[25:]])
    hidden = [jax.nn.relu(X @ p["w1"] + p["b1"]) for p in parents]
    targets = [h @ p["w2"] + p["b2"] for h, p in zip(hidden, parents, strict=True)]
    seen = jax.jit(block_apply(mlp_spec, plan, mlp).last_features)(merged, X)  # after the ReLU
    assert seen.shape == (60, 9)
    first = X @ merged["w1"] + merged["b1"]
    own = [X @ p["w1"] + p["b1"] for p in parents]
    for moment in (np.mean, np.std):
        shared = (moment(own[0], axis=0) + moment(own[1], axis=0))[:4] / 2
        wanted = np.concatenate([shared, *(moment(z, axis=0)[4:] for z in own)])
        np.testing.assert_allclose(moment(first, axis=0), wanted, rtol=1e-4, atol=1e-5)
    wide = np.asarray(jax.nn.relu(first))  # shared, first, second: the layer after it sees all of them
    second = wide @ merged["w2"] + merged["b2"]
    np.testing.assert_allclose(jax.nn.relu(second), seen, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(second.std(0)[3:], np.concatenate([t.std(0)[3:] for t in targets]), rtol=1e-4)


def test_units_that_never_vary_only_get_their_mean(mlp_spec, parents):
    for p in parents:
        p["w1"][:, 0] = 0
    (merged,), *_ = block_repair(mlp_spec, parents, partial_plan(mlp_spec, {}), apply=mlp, data=[X])
    assert np.isfinite(merged["w1"]).all()
    assert not merged["w1"][:, 0].any()
    np.testing.assert_allclose(merged["b1"][0], (parents[0]["b1"][0] + parents[1]["b1"][0]) / 2, rtol=1e-6)
