"""Averages: laws of the mean and of the arc, kinds of leaves, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.action import permute
from permjax.merge.average import Average, Slerp, average, slerp
from permjax.permutation import invert
from permjax.steps import MergeState
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

SPEC = PermutationSpec.from_axes(
    {"kernel": (3, 5), "bias": (5,), "mean": (5,), "table": (4,), "steps": ()},
    {"kernel": (None, "h"), "bias": ("h",), "mean": ("h",)},
    roles={"mean": "statistic", "table": "frozen", "steps": "frozen"},
)


def model(seed: int, backend=np, dtype=np.float32):
    rng = np.random.default_rng(seed)
    leaves = {n: rng.standard_normal(SPEC.leaf(n).shape).astype(dtype) for n in ("kernel", "bias", "mean")}
    constants = {"table": np.arange(4, dtype=dtype), "steps": np.asarray(7, np.int32)}
    return {name: backend.asarray(leaf) for name, leaf in {**leaves, **constants}.items()}


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def vector(params) -> np.ndarray:
    return np.concatenate([np.asarray(params[n], np.float64).ravel() for n in ("kernel", "bias")])


def whole(*models):
    """The first model with the weights of all leaves of role weight scaled to norm one."""
    return tuple({**m, **{n: m[n] / np.float32(np.linalg.norm(vector(m))) for n in ("kernel", "bias")}} for m in models)


# averages


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
def test_the_average_is_the_weighted_mean_in_float64(weights):
    models = [model(seed) for seed in range(len(weights))]
    result = average(SPEC, models, weights=weights)
    (merged,), shares = result.models, np.asarray(weights) / np.sum(weights)
    for name in ("kernel", "bias", "mean"):
        exact = sum(w * m[name].astype(np.float64) for w, m in zip(shares, models, strict=True))
        np.testing.assert_allclose(merged[name], exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.info.weights, shares)
    assert result.plan is None


def test_without_weights_all_models_count_the_same():
    result = average(SPEC, [model(0), model(1), model(2)])
    assert_close(result.models[0], average(SPEC, [model(0), model(1), model(2)], weights=[2, 2, 2]).models[0])
    np.testing.assert_allclose(result.info.weights, 1 / 3)


def test_permuted_copies_brought_back_average_to_the_original(draw_permutations):
    original, p = model(0), draw_permutations(SPEC, 1)
    copies = [original, *(permute(SPEC, p, original) for p in (draw_permutations(SPEC, 1), draw_permutations(SPEC, 2)))]
    ways_back = [{"h": np.arange(5)}, *(invert(SPEC, draw_permutations(SPEC, seed)) for seed in (1, 2))]
    aligned = [permute(SPEC, q, m) for q, m in zip(ways_back, copies, strict=True)]
    assert_close(average(SPEC, aligned).models[0], original)
    assert np.abs(average(SPEC, copies).models[0]["kernel"] - original["kernel"]).max() > 0.1
    assert p["h"].tolist() != list(range(5))


def test_averaging_commutes_with_a_common_permutation(draw_permutations):
    models, p = [model(0), model(1)], draw_permutations(SPEC, 3)
    there = average(SPEC, [permute(SPEC, p, m) for m in models]).models[0]
    assert_close(there, permute(SPEC, p, average(SPEC, models).models[0]))


@pytest.mark.parametrize("method", [average, slerp])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("backend", [np, jnp])
def test_kinds_and_dtypes_of_leaves_are_kept(method, dtype, backend):
    models = [model(seed, backend, dtype) for seed in range(2)]
    (merged,), single = method(SPEC, models).models, method(SPEC, [model(0), model(1)]).models[0]
    for name, leaf in merged.items():
        assert leaf.dtype == models[0][name].dtype
        assert isinstance(leaf, jax.Array) == (backend is jnp)
        np.testing.assert_allclose(np.asarray(leaf, np.float32), single[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", [average, slerp])
def test_frozen_leaves_are_taken_over_and_must_be_equal(method):
    a, b = model(0), model(1)
    (merged,) = method(SPEC, [a, b]).models
    np.testing.assert_array_equal(merged["table"], a["table"])
    assert merged["steps"] == 7
    for changed in ({"table": a["table"] + 1}, {"steps": np.asarray(8, np.int32)}):
        with raises(f"frozen leaf '{next(iter(changed))}' differs between model 0 and model 1"):
            method(SPEC, [a, {**b, **changed}])


@pytest.mark.parametrize(
    ("weights", "pattern"),
    [
        ([1, -0.5], "must not be negative"),
        ([0, 0], "must not add up to zero"),
        ([1, np.nan], "must be finite"),
        ([1, np.inf], "must be finite"),
        ([1], "2 trees need 2 weights"),
        (np.ones((2, 1)), "2 trees need 2 weights"),
    ],
)
def test_weights_that_make_no_mean_are_refused(weights, pattern):
    with raises(pattern):
        average(SPEC, [model(0), model(1)], weights=weights)


@pytest.mark.parametrize("method", [average, slerp])
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"bias": np.full(5, np.nan, np.float32)}, "'bias' of model 1 holds 5 NaN"),
        ({"bias": np.zeros(6, np.float32)}, r"'bias' has shape \(5,\) in model 0 but \(6,\) in model 1"),
        ({"bias": np.zeros(5, np.float16)}, "'bias' has dtype float32 in model 0 but float16"),
        ({"extra": np.zeros(5)}, "'extra' of model 1 is not in model 0"),
    ],
)
def test_models_that_cannot_be_merged_are_refused_by_leaf_and_model(method, change, pattern):
    with raises(pattern):
        method(SPEC, [model(0), {**model(1), **change}])


def test_models_of_another_architecture_than_the_spec_are_refused():
    other = PermutationSpec.from_axes({"w": (2,)}, {})
    with raises("'bias', which the spec does not know"):
        average(other, [model(0)])
    with raises("No model was given"):
        average(SPEC, [])


def test_averages_can_be_jitted_and_differentiated():
    a, b = model(0, jnp), model(1, jnp)
    merged = jax.jit(lambda x, y, w: average(SPEC, [x, y], weights=w).models[0])(a, b, jnp.asarray([1.0, 3.0]))
    assert_close(merged, average(SPEC, [a, b], weights=[1, 3]).models[0])
    bend = jax.jit(lambda x, y, t: slerp(SPEC, [x, y], t=t).models[0])(a, b, 0.25)
    assert_close(bend, slerp(SPEC, [a, b], t=0.25).models[0])
    slope = jax.grad(lambda w: average(SPEC, [a, b], weights=[w, 1.0]).models[0]["bias"].sum())(1.0)
    np.testing.assert_allclose(slope, (a["bias"] - b["bias"]).sum() / 4, rtol=1e-4)


# arcs


@pytest.mark.parametrize("per_leaf", [False, True])
def test_the_ends_of_an_arc_are_the_models(per_leaf):
    a, b = model(0), model(1)
    assert_close(slerp(SPEC, [a, b], t=0, per_leaf=per_leaf).models[0], a)
    assert_close(slerp(SPEC, [a, b], t=1, per_leaf=per_leaf).models[0], b)


@given(t=st.floats(0, 1))
def test_between_unit_vectors_the_norm_stays_one_and_the_angle_grows_evenly(t):
    a, b = whole(model(0), model(1))
    point = vector(slerp(SPEC, [a, b], t=t).models[0])
    angle = np.arccos(vector(a) @ vector(b))
    np.testing.assert_allclose(np.linalg.norm(point), 1, rtol=1e-6)
    np.testing.assert_allclose(point @ vector(a), np.cos(t * angle), atol=1e-6)
    np.testing.assert_allclose(point @ vector(b), np.cos((1 - t) * angle), atol=1e-6)


def test_the_arc_is_symmetric_and_equivariant(draw_permutations):
    a, b, p = model(0), model(1), draw_permutations(SPEC, 3)
    point = slerp(SPEC, [a, b], t=0.3).models[0]
    assert_close(slerp(SPEC, [b, a], t=0.7).models[0], point)
    assert_close(slerp(SPEC, [permute(SPEC, p, m) for m in (a, b)], t=0.3).models[0], permute(SPEC, p, point))


def test_a_quarter_turn_is_halved_exactly():
    spec = PermutationSpec.from_axes({"w": (2,)}, {"w": ("h",)})
    a, b = {"w": np.asarray([1.0, 0])}, {"w": np.asarray([0, 1.0])}
    np.testing.assert_allclose(slerp(spec, [a, b]).models[0]["w"], [0.5**0.5] * 2)
    np.testing.assert_allclose(average(spec, [a, b]).models[0]["w"], [0.5, 0.5])


def test_per_leaf_every_leaf_keeps_its_own_angle():
    a, b = model(0), model(1)
    result = slerp(SPEC, [a, b], t=0.3, per_leaf=True)
    for i, name in enumerate(("kernel", "bias")):
        x, y = a[name].ravel().astype(np.float64), b[name].ravel().astype(np.float64)
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        angle = np.arccos(cosine)
        exact = (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)
        np.testing.assert_allclose(result.models[0][name].ravel(), exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.info.cosine[i], cosine, rtol=1e-6)
    assert result.info.collinear.tolist() == [False, False]
    assert slerp(SPEC, [a, b]).info.cosine.shape == ()


def test_statistics_follow_the_line():
    a, b = model(0), model(1)
    np.testing.assert_allclose(
        slerp(SPEC, [a, b], t=0.3).models[0]["mean"], 0.7 * a["mean"] + 0.3 * b["mean"], rtol=1e-5
    )


@pytest.mark.parametrize("backend", [np, jnp])
@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
@pytest.mark.parametrize("per_leaf", [False, True])
def test_collinear_models_are_mixed_along_the_line(backend, factor, per_leaf):
    a = model(0, backend)
    b = {**a, "kernel": backend.float32(factor) * a["kernel"], "bias": backend.float32(factor) * a["bias"]}
    result = slerp(SPEC, [a, b], t=0.25, per_leaf=per_leaf)
    np.testing.assert_allclose(result.models[0]["kernel"], (0.75 + 0.25 * factor) * np.asarray(a["kernel"]), rtol=1e-5)
    assert np.all(result.info.collinear)
    np.testing.assert_allclose(result.info.cosine, np.sign(factor), atol=1e-6)


def test_near_the_line_arc_and_line_agree():
    a = model(0)
    b = {**a, "kernel": a["kernel"] + np.float32(0.02) * model(1)["kernel"]}
    result = slerp(SPEC, [a, b], t=0.4)
    assert not result.info.collinear
    line = average(SPEC, [a, b], weights=[0.6, 0.4]).models[0]
    np.testing.assert_allclose(result.models[0]["kernel"], line["kernel"], rtol=1e-3)


def test_slerp_asks_for_two_models():
    with raises("two models, not 3"):
        slerp(SPEC, [model(i) for i in range(3)])


# steps


@pytest.mark.parametrize(
    ("step", "call"),
    [
        (Average(), lambda models: average(SPEC, models)),
        (Average(weights=(1.0, 3.0)), lambda models: average(SPEC, models, weights=[1, 3])),
        (Slerp(t=0.2, per_leaf=True), lambda models: slerp(SPEC, models, t=0.2, per_leaf=True)),
    ],
)
def test_a_step_does_what_its_function_does(step, call):
    models = (model(0), model(1))
    after = step(MergeState.create(SPEC, models, key=jax.random.key(0)))
    expected = call(models)
    assert len(after.models) == 1
    assert_close(after.models[0], expected.models[0])
    jax.tree.map(np.testing.assert_array_equal, after.infos[0], expected.info)
    assert step == type(step)(**vars(step))
    assert hash(step) == hash(type(step)(**vars(step)))
