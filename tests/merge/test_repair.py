"""Statistics after merging: re-estimation against NumPy, REPAIR against the same layer by layer in NumPy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.merge import repair as repair_module
from permjax.merge.average import average
from permjax.merge.repair import Moments, Repair, joined, reestimate_statistics, repair
from permjax.steps import MergeState
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

SIZES = (6, 16, 12, 4)
LAYERS = ("l0", "l1", "l2")


def mlp(seed: int, backend=np):
    rng = np.random.default_rng(seed)
    params = {}
    for name, n, m in zip(LAYERS, SIZES, SIZES[1:], strict=False):
        weight = rng.standard_normal((n, m), np.float32) / np.float32(np.sqrt(n))
        params[name] = {
            "w": backend.asarray(weight),
            "b": backend.asarray(0.5 * rng.standard_normal(m).astype(np.float32)),
        }
    return params


def apply(params, x):
    for name in LAYERS:
        x = x @ params[name]["w"] + jnp.expand_dims(params[name]["b"], 0)
        x = x if name == LAYERS[-1] else jax.nn.relu(x)
    return x


SPEC = PermutationSpec.from_axes(
    {f"{name}/{kind}": leaf.shape for name, layer in mlp(0).items() for kind, leaf in layer.items()},
    {"l0/w": (None, "h0"), "l0/b": ("h0",), "l1/w": ("h0", "h1"), "l1/b": ("h1",), "l2/w": ("h1", None)},
)
X = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
DATA = [X[:25], (X[25:50],), [X[50:]]]  # a last batch of another size, and inputs in tuples


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def hand_capture(apply, spec, params, x):
    """What capture finds in the MLP above."""
    leaves = {}
    for name in LAYERS:
        output = x @ params[name]["w"]
        leaves[f"{name}/w"] = SimpleNamespace(output=output, out_axes=(1,), bias=f"{name}/b", stacked=0)
        x = jax.nn.relu(output + jnp.expand_dims(params[name]["b"], 0))
    return SimpleNamespace(leaves=leaves)


@pytest.fixture(params=["capture by hand", "capture"])
def capturing(request, monkeypatch):
    if request.param == "capture by hand":
        monkeypatch.setattr(repair_module, "capture", hand_capture)


def preactivations(params, x=X):
    found = []
    h = x.astype(np.float64)
    for name in LAYERS:
        weight, bias = (np.asarray(params[name][kind], np.float64) for kind in "wb")
        found.append(h @ weight + bias)
        h = np.maximum(found[-1], 0)
    return found


def repaired_in_numpy(parents, merged, shares=(0.5, 0.5)):
    """REPAIR with all data in one batch and in float64."""
    out = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), merged)
    for i, name in enumerate(LAYERS):
        there = [preactivations(p)[i] for p in parents]
        mean = sum(s * z.mean(0) for s, z in zip(shares, there, strict=True))
        std = sum(s * z.std(0) for s, z in zip(shares, there, strict=True))
        here = preactivations(out)[i]
        scale = std / here.std(0)
        bias = mean - scale * (here.mean(0) - out[name]["b"])
        out[name] = {"w": out[name]["w"] * scale, "b": bias}
    return out


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# moments


@given(cuts=st.lists(st.integers(1, 39), max_size=4), shift=st.sampled_from([0.0, 1e6]))
def test_joined_moments_are_those_of_all_samples(cuts, shift):
    x = np.random.default_rng(1).standard_normal((40, 3)) + shift
    parts = [part for part in np.split(x, sorted(cuts)) if len(part)]
    moments = [Moments(float(len(p)), p.mean(0), ((p - p.mean(0)) ** 2).sum(0)) for p in parts]
    total = moments[0]
    for part in moments[1:]:
        total = joined(total, part)
    assert total.count == 40
    np.testing.assert_allclose(total.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.std, x.std(0), rtol=1e-7)


# REPAIR


@pytest.mark.parametrize("backend", [np, jnp])
def test_repair_agrees_with_numpy_layer_by_layer(capturing, backend):
    parents = [mlp(1, backend), mlp(2, backend)]
    (merged,) = average(SPEC, parents).models
    result = repair(SPEC, parents, merged, apply=apply, data=DATA)
    assert_close(result.models[0], repaired_in_numpy(parents, merged))
    assert all(isinstance(leaf, jax.Array) == (backend is jnp) for leaf in jax.tree.leaves(result.models[0]))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(result.models[0]))
    assert result.plan is None


def test_every_channel_of_every_layer_gets_its_target(capturing):
    parents = [mlp(seed) for seed in (1, 2, 3)]
    (merged,) = average(SPEC, parents).models
    (fixed,) = repair(SPEC, parents, merged, apply=apply, data=DATA).models
    for i in range(len(LAYERS)):
        there = [preactivations(p)[i] for p in parents]
        np.testing.assert_allclose(preactivations(fixed)[i].mean(0), np.mean([z.mean(0) for z in there], 0), atol=1e-4)
        np.testing.assert_allclose(preactivations(fixed)[i].std(0), np.mean([z.std(0) for z in there], 0), rtol=1e-4)


def test_a_traced_spec_or_another_cut_of_the_data_changes_nothing():
    parents = [mlp(1), mlp(2)]
    (merged,) = average(SPEC, parents).models
    traced = trace_spec(apply, parents[0], X)
    one, other = (repair(spec, parents, merged, apply=apply, data=DATA) for spec in (SPEC, traced))
    assert_close(other.models[0], one.models[0])
    whole = repair(SPEC, parents, merged, apply=apply, data=[X])
    assert_close(whole.models[0], one.models[0])


def test_the_collapse_of_variance_is_reported_and_undone():
    parents = [mlp(1), mlp(2)]
    (merged,) = average(SPEC, parents).models
    result = repair(SPEC, parents, merged, apply=apply, data=DATA)
    assert result.info.layers == ("l0/w", "l1/w", "l2/w")
    assert result.info.skipped == ()
    assert (result.info.std_ratio < 0.9).all()
    again = repair(SPEC, parents, result.models[0], apply=apply, data=DATA)
    np.testing.assert_allclose(again.info.std_ratio, 1, rtol=1e-4)
    assert_close(again.models[0], result.models[0])


def test_a_model_merged_from_copies_of_itself_is_left_as_it_is():
    model = mlp(1)
    result = repair(SPEC, [model, model], model, apply=apply, data=DATA)
    assert_close(result.models[0], model)
    np.testing.assert_allclose(result.info.std_ratio, 1, rtol=1e-5)


def test_the_scale_of_the_merged_weights_does_not_matter():
    parents = [mlp(1), mlp(2)]
    (merged,) = average(SPEC, parents).models
    scaled = {layer: {kind: np.float32(3) * leaf for kind, leaf in leaves.items()} for layer, leaves in merged.items()}
    one, other = (repair(SPEC, parents, m, apply=apply, data=DATA).models[0] for m in (merged, scaled))
    assert_close(other, one)


def test_the_targets_follow_the_weights():
    parents = [mlp(1), mlp(2)]
    (merged,) = average(SPEC, parents, weights=[3, 1]).models
    result = repair(SPEC, parents, merged, apply=apply, data=DATA, weights=[3, 1])
    assert_close(result.models[0], repaired_in_numpy(parents, merged, (0.75, 0.25)))
    assert_close(repair(SPEC, parents, parents[0], apply=apply, data=DATA, weights=[1, 0]).models[0], parents[0])


def test_channels_that_do_not_vary_only_get_their_mean():
    parents = [mlp(1), mlp(2)]
    for p, constant in zip(parents, (1.0, 3.0), strict=True):
        p["l0"]["w"][:, 2] = 0
        p["l0"]["b"][2] = constant
    (merged,) = average(SPEC, parents).models
    merged["l0"]["b"][2] = -7
    parents[0]["l0"]["w"][:, 3], parents[1]["l0"]["w"][:, 3] = 1, 1  # varies in the parents, silent in the merged model
    merged["l0"]["w"][:, 3] = 0
    result = repair(SPEC, parents, merged, apply=apply, data=DATA)
    np.testing.assert_allclose(result.models[0]["l0"]["b"][2], 2.0, rtol=1e-6)
    assert (result.models[0]["l0"]["w"][:, [2, 3]] == 0).all()
    assert result.info.silent.tolist() == [2, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.models[0]))


def two_axes(params, x):
    h = jnp.tensordot(x, params["w"].transpose(1, 0, 2), axes=(1, 2)) + params["b"][None]
    h = jax.nn.relu(h) @ params["no bias"]
    h = jnp.einsum("bhe,ehk->bk", h, params["out"]) + params["c"][None]
    h = jnp.tanh(h @ params["tied"] + params["t"][None]) @ params["tied"]
    return jnp.tanh(h @ params["u"] + params["shared"][None]) @ params["v"] + params["shared"][None]


def test_output_channels_may_lie_on_several_axes_and_layers_without_a_bias_are_named():
    shapes = {"w": (4, 3, 6), "b": (3, 4), "no bias": (4, 5), "out": (5, 3, 2), "c": (2,), "tied": (2, 2), "t": (2,)}
    shapes |= {"u": (2, 2), "v": (2, 2), "shared": (2,)}
    spec = PermutationSpec.from_axes(shapes, {})
    parents = [
        {
            name: np.random.default_rng((seed, i)).standard_normal(s, np.float32)
            for i, (name, s) in enumerate(shapes.items())
        }
        for seed in range(2)
    ]
    (merged,) = average(spec, parents).models
    result = repair(spec, parents, merged, apply=two_axes, data=DATA)
    assert result.info.layers == ("w", "out")
    assert set(result.info.skipped) >= {"no bias", "tied", "u", "v"}
    first = lambda p: np.einsum("bi,dhi->bhd", X, p["w"]) + p["b"]  # noqa: E731
    np.testing.assert_allclose(
        first(result.models[0]).mean(0), np.mean([first(p).mean(0) for p in parents], 0), atol=1e-4
    )
    np.testing.assert_allclose(
        first(result.models[0]).std(0), np.mean([first(p).std(0) for p in parents], 0), rtol=1e-4
    )
    for name in set(shapes) - {"w", "b", "out", "c"}:
        np.testing.assert_array_equal(result.models[0][name], merged[name])


def conv(params, x):
    x = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x + params["b"][None, None, None])
    return x.mean((1, 2)) @ params["head"]


def test_positions_of_a_convolution_count_as_samples():
    shapes = {"k": (3, 3, 2, 5), "b": (5,), "head": (5, 3)}
    spec = PermutationSpec.from_axes(shapes, {"k": (None, None, None, "c"), "b": ("c",), "head": ("c", None)})
    rng = np.random.default_rng(0)
    parents = [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)]
    images = rng.standard_normal((12, 4, 4, 2), np.float32)
    (merged,) = average(spec, parents).models
    result = repair(spec, parents, merged, apply=conv, data=[images[:8], images[8:]])
    assert result.info.layers == ("k",)
    assert result.info.skipped == ("head",)

    def channels(p):
        wide = jax.lax.conv_general_dilated(images, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return np.asarray(wide, np.float64).reshape(-1, 5) + p["b"]

    fixed = channels(result.models[0])
    np.testing.assert_allclose(fixed.mean(0), np.mean([channels(p).mean(0) for p in parents], 0), atol=1e-4)
    np.testing.assert_allclose(fixed.std(0), np.mean([channels(p).std(0) for p in parents], 0), rtol=1e-4)


def test_the_step_repairs_the_weighted_mean_of_the_models():
    parents = (mlp(1), mlp(2))
    state = MergeState.create(SPEC, parents, key=jax.random.key(0), data=DATA, apply=apply)
    after = Repair(weights=(1.0, 3.0))(state)
    (mean,) = average(SPEC, parents, weights=[1, 3]).models
    expected = repair(SPEC, parents, mean, apply=apply, data=DATA, weights=[1, 3])
    assert_close(after.models, expected.models)
    assert after.infos[0].layers == expected.info.layers
    with raises("Repair needs `data`"):
        Repair()(MergeState.create(SPEC, parents, key=jax.random.key(0), apply=apply))


def test_bad_input_to_repair_is_refused():
    a, b = mlp(1), mlp(2)
    for data in ([], iter(DATA)):
        with raises("`data` gave no batches"):
            repair(SPEC, [a, b], a, apply=apply, data=data)
    b["l1"]["w"][0, 0] = np.nan
    with raises("'l1/w' of model 1 holds 1 NaN"):
        repair(SPEC, [a, b], a, apply=apply, data=DATA)


# BatchNorm


NORM = PermutationSpec.from_axes(
    {"w": (6, 3), "mean": (3,), "var": (3,)},
    {"w": (None, "h"), "mean": ("h",), "var": ("h",)},
    roles={"mean": "statistic", "var": "statistic"},
)


def of_batch(params, x):
    h = x @ params["w"]
    return {**params, "mean": h.mean(0), "var": h.var(0)}


@pytest.mark.parametrize("backend", [np, jnp])
def test_reestimated_statistics_are_the_mean_over_batches(backend):
    weight = backend.asarray(np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32))
    model = {"w": weight, "mean": backend.full(3, 9.0, np.float32), "var": backend.ones(3, np.float32)}
    fresh = reestimate_statistics(NORM, model, data=DATA, batch_statistics=of_batch)
    batches = [x @ np.asarray(weight, np.float64) for x in (X[:25], X[25:50], X[50:])]
    np.testing.assert_allclose(fresh["mean"], np.mean([h.mean(0) for h in batches], 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fresh["var"], np.mean([h.var(0) for h in batches], 0), rtol=1e-5)
    assert fresh["w"] is weight
    assert all(isinstance(leaf, jax.Array) == (backend is jnp) and leaf.dtype == np.float32 for leaf in fresh.values())
    np.testing.assert_array_equal(model["mean"], 9)


def test_reestimation_does_not_depend_on_the_old_statistics():
    model = {"w": np.ones((6, 3), np.float32), "mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    other = {**model, "mean": np.full(3, 5, np.float32)}
    a, b = (reestimate_statistics(NORM, m, data=DATA, batch_statistics=of_batch) for m in (model, other))
    assert_close(a, b, rtol=0, atol=0)


def test_bad_input_to_reestimation_is_refused():
    model = {"w": np.ones((6, 3), np.float32), "mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    with raises("no leaf of role statistic"):
        reestimate_statistics(SPEC, mlp(0), data=DATA, batch_statistics=of_batch)
    with raises("`data` gave no batches"):
        reestimate_statistics(NORM, model, data=[], batch_statistics=of_batch)
    with raises("'w' of model 0 is missing from model 1"):
        reestimate_statistics(
            NORM, model, data=DATA, batch_statistics=lambda p, _: {"mean": p["mean"], "var": p["var"]}
        )
    with raises("'mean' of the re-estimated statistics holds 3 NaN"):
        reestimate_statistics(NORM, model, data=[X * np.nan], batch_statistics=of_batch)
