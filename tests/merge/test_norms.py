"""BatchNorm in merged networks: statistics against the plain re-estimation, and against every parent's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.norms import statistics_of_views, wide_statistics
from permjax.merge.partial import partial_plan
from permjax.merge.repair import reestimate_statistics
from permjax.merge.wide import Wide
from permjax.symmetry.spec import PermutationSpec

SHAPES = {"w1": (5, 8), "mean": (8,), "var": (8,), "w2": (8, 3)}
AXES = {"w1": (None, "h"), "mean": ("h",), "var": ("h",), "w2": ("h", None)}
SPEC = PermutationSpec.from_axes(SHAPES, AXES, roles={"mean": "statistic", "var": "statistic"})
RNG = np.random.default_rng(0)
DATA = [(RNG.standard_normal((n, 5)).astype(np.float32) + 1,) for n in (12, 20, 7)]


def model(seed, backend=np):
    rng = np.random.default_rng(seed)
    return {name: backend.asarray(rng.uniform(0.5, 1.5, shape), np.float32) for name, shape in SHAPES.items()}


def normalised(p, x, mean, var):
    h = (x @ p["w1"] - jnp.expand_dims(mean, 0)) * jax.lax.rsqrt(jnp.expand_dims(var, 0) + np.float32(1e-3))
    return jax.nn.relu(h) @ p["w2"]


def apply(p, x):
    return normalised(p, x, p["mean"], p["var"])


def batch_statistics(p, x):
    h = x @ p["w1"]
    return {**p, "mean": h.mean(0), "var": h.var(0)}


def merged(plan, *models):
    wide = Wide(SPEC, plan)
    return wide, wide_average(wide, models, contracted_axes(apply, models[0], *DATA[0]))


@pytest.mark.parametrize("backend", [np, jnp])
def test_a_plain_merge_gets_the_plain_statistics(backend):
    wide, params = merged(partial_plan(SPEC, {}), model(0, backend), model(1, backend))
    found = wide_statistics(wide, params, (batch_statistics,) * 2, DATA)
    wanted = reestimate_statistics(SPEC, params, data=DATA, batch_statistics=batch_statistics)
    for name, leaf in found.items():
        assert isinstance(leaf, type(params[name]))
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6)


@pytest.mark.parametrize("models", [2, 3])
def test_models_kept_apart_keep_their_own_statistics(models):
    parents = [model(seed) for seed in range(models)]
    wide, params = merged(partial_plan(SPEC, ratios={"h": 1}, models=models), *parents)
    found = wide_statistics(wide, params, (batch_statistics,) * models, DATA)
    own = [reestimate_statistics(SPEC, p, data=DATA, batch_statistics=batch_statistics) for p in parents]
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], np.concatenate([p[name] for p in own]), rtol=1e-6)
    np.testing.assert_array_equal(found["w1"], params["w1"])


def test_shared_units_get_the_statistics_of_the_merged_network():
    wide, params = merged(partial_plan(SPEC, {"h": 3}), model(0), model(1))
    found = wide_statistics(wide, params, (batch_statistics,) * 2, DATA)
    features = [x @ params["w1"] for (x,) in DATA]
    np.testing.assert_allclose(found["mean"], np.mean([h.mean(0) for h in features], 0), rtol=1e-5)
    np.testing.assert_allclose(found["var"], np.mean([h.var(0) for h in features], 0), rtol=1e-5)
    assert found["mean"].shape == (13,)


def test_statistics_of_views_are_joined_by_the_mean():
    wide, params = merged(partial_plan(SPEC, {"h": 6}), model(0), model(1))
    views = [{**model(0), "mean": np.full(8, m, np.float32), "var": np.full(8, m + 5, np.float32)} for m in (1, 3)]
    found = jax.jit(lambda params, views: statistics_of_views(wide, params, views))(params, views)
    np.testing.assert_array_equal(found["mean"], [2] * 6 + [1] * 2 + [3] * 2)
    np.testing.assert_array_equal(found["var"], [7] * 6 + [6] * 2 + [8] * 2)
    assert tree.names(found) == tree.names(params)


def test_networks_without_statistics_and_batches_that_break_them_are_refused():
    bare = PermutationSpec.from_axes({"w1": (5, 8)}, {"w1": (None, "h")})
    with pytest.raises(ValueError, match="The spec has no leaf of role statistic; name them by `statistics=`"):
        wide_statistics(Wide(bare, partial_plan(bare, {})), {"w1": np.ones((5, 8))}, (batch_statistics,) * 2, DATA)
    wide, params = merged(partial_plan(SPEC, {}), model(0), model(1))
    nan = [(np.full((4, 5), np.nan, np.float32),)]
    with pytest.raises(ValueError, match="Leaf 'mean' of the re-estimated statistics holds 8 NaN"):
        wide_statistics(wide, params, (batch_statistics,) * 2, nan)
    with pytest.raises(ValueError, match="`data` gave no batches"):
        wide_statistics(wide, params, (batch_statistics,) * 2, [])
