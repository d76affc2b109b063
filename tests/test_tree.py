"""Named leaves: names, checks and arithmetic."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from permjax import tree

pytestmark = pytest.mark.fast

HALF = (ml_dtypes.bfloat16, np.float16)


def model(seed: int, backend=np, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: backend.asarray(rng.standard_normal(shape).astype(dtype))  # noqa: E731
    return {"layers": [{"kernel": draw(4, 3), "bias": draw(3)}, {"kernel": draw(3, 2)}], "scale": draw()}


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


# names


def test_names_are_key_paths_joined_by_slashes_in_tree_order():
    expected = ("layers/0/bias", "layers/0/kernel", "layers/1/kernel", "scale")
    assert tree.names(model(0)) == expected
    assert list(tree.flatten(model(0))) == list(expected)
    assert tree.names(np.zeros(2)) == ("",)
    assert tree.names({"h.0.weight": 1, "h.0.bias": 2}) == ("h.0.bias", "h.0.weight")


def test_unflatten_inverts_flatten_whatever_the_order_of_the_names():
    original = model(0)
    shuffled = dict(reversed(tree.flatten(original).items()))
    again = tree.unflatten(original, shuffled)
    assert jax.tree.structure(again) == jax.tree.structure(original)
    assert all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(original), strict=True))


def test_duplicate_names_are_refused_by_name():
    with raises("'a/b'"):
        tree.names({"a/b": 1, "a": {"b": 2}, "c": 3})


def test_unflatten_names_the_missing_and_the_extra_leaf_with_the_nearest_name():
    named = tree.flatten(model(0))
    typo = {("layers/0/kernal" if name == "layers/0/kernel" else name): x for name, x in named.items()}
    with raises("'layers/0/kernel'.*missing.*nearest: 'layers/0/kernal'"):
        tree.unflatten(model(0), typo)
    with raises("'scales'.*nearest: 'scale'"):
        tree.unflatten(model(0), {**named, "scales": 0})


def test_nest_inverts_flatten_for_trees_of_dicts():
    original = {"params": {"dense": {"kernel": 1, "bias": 2}}, "stats": {"mean": 3}}
    assert tree.nest(tree.flatten(original)) == original
    for named in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
        with raises("'a' is both"):
            tree.nest(named)


def test_select_takes_one_pattern_or_several_and_keeps_tree_order():
    assert list(tree.select(model(0), "*/kernel")) == ["layers/0/kernel", "layers/1/kernel"]
    assert list(tree.select(model(0), ["scale", "layers/0/*"])) == [
        "layers/0/bias",
        "layers/0/kernel",
        "scale",
    ]
    assert tree.select(model(0), "KERNEL") == {}


def test_map_named_sees_every_name_once_with_the_leaves_of_all_trees():
    seen = []
    total = tree.map_named(lambda name, x, y: seen.append(name) or x + y, model(0), model(1))
    assert tuple(seen) == tree.names(model(0))
    np.testing.assert_array_equal(total["scale"], model(0)["scale"] + model(1)["scale"])
    with raises("'b' of tree 0 is missing from tree 1"):
        tree.map_named(lambda _, x, y: x + y, {"a": 1, "b": 2}, {"a": 1})


# checks


@pytest.mark.parametrize(
    ("other", "pattern"),
    [
        ({"a": np.zeros(2)}, "'b' of model 0 is missing from model 1"),
        ({"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(1)}, "'c' of model 1 is not in model 0"),
        ({"a": np.zeros(2), "b": np.zeros(4)}, r"'b' has shape \(3,\) in model 0 but \(4,\) in model 1"),
        ({"a": np.zeros(2), "b": np.zeros(3, np.float32)}, "'b' has dtype float64 .* float32 in model 1"),
    ],
)
def test_the_first_difference_in_structure_is_named(other, pattern):
    first = {"a": np.zeros(2), "b": np.zeros(3)}
    tree.check_same_structure([first, first])
    with raises(pattern):
        tree.check_same_structure([first, other])


def test_abstract_and_concrete_models_of_one_structure_are_alike():
    abstract = jax.eval_shape(lambda: model(0, jnp))
    tree.check_same_structure([abstract, model(1), model(2, jnp)])
    with raises("at least one"):
        tree.check_same_structure([])


@pytest.mark.parametrize("backend", [np, jnp])
@pytest.mark.parametrize("dtype", [np.float32, *HALF])
def test_nan_and_inf_are_counted_and_named(backend, dtype):
    good = {"a": np.zeros(4, dtype), "steps": np.int32(3)}
    bad = np.asarray([0, np.nan, np.inf, -np.inf, np.nan, np.nan], dtype)
    tree.check_finite(jax.tree.map(backend.asarray, good), "model 0")
    with raises(r"'b' of model 1 holds 3 NaN and 2 Inf among its 6 values"):
        tree.check_finite(jax.tree.map(backend.asarray, {**good, "b": bad}), "model 1")


# arithmetic


def is_host(x) -> bool:
    return isinstance(x, np.ndarray) and not isinstance(x, jax.Array)


@pytest.mark.parametrize("backend", [np, jnp])
@pytest.mark.parametrize("dtype", [np.float32, *HALF])
def test_lerp_and_average_keep_kind_and_dtype_and_agree_with_float64(backend, dtype):
    a, b = model(0, backend, dtype), model(1, backend, dtype)
    for mixed, weight in ((tree.lerp(a, b, 0.25), 0.25), (tree.average([a, b], [6, 2]), 0.25)):
        for x, y, got in zip(*map(jax.tree.leaves, (a, b, mixed)), strict=True):
            exact = (1 - weight) * np.asarray(x, np.float64) + weight * np.asarray(y, np.float64)
            assert got.dtype == dtype
            assert is_host(got) == (backend is np)
            np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", [np, jnp])
def test_half_precision_is_accumulated_in_float32(backend, dtype):
    trees = [{"w": backend.asarray(np.ones(1, dtype))} for _ in range(1000)]
    trees[0] = {"w": backend.asarray(np.full(1, 3, dtype))}
    mean = tree.average(trees)["w"]
    np.testing.assert_array_equal(np.asarray(mean, np.float32), np.asarray(1.002, dtype).astype(np.float32))


def test_lerp_meets_its_ends_and_average_its_fixed_points():
    a, b = model(0), model(1)
    for t, end in ((0, a), (1.0, b)):
        jax.tree.map(np.testing.assert_array_equal, tree.lerp(a, b, t), end)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-7), tree.average([a] * 3), a)
    jax.tree.map(np.testing.assert_array_equal, tree.average([a, b], [0, 5]), b)


def test_integer_and_bool_leaves_are_taken_over_only_if_equal():
    a = {"w": np.zeros(2), "count": np.asarray([3, 4]), "mask": np.asarray([True, False])}
    b = {**a, "w": np.ones(2)}
    for whole in (tree.lerp(a, b, 0.5), tree.average([a, b]), tree.lerp(a, jax.tree.map(jnp.asarray, b), 0.5)):
        np.testing.assert_array_equal(whole["count"], [3, 4])
        assert whole["mask"].dtype == bool
    with raises("'count' of dtype int64 differs between tree 0 and tree 2"):
        tree.average([a, b, {**b, "count": np.asarray([3, 5])}])


def test_the_shapes_must_agree_rather_than_broadcast():
    a, b = {"w": np.zeros((2, 3))}, {"w": np.zeros(3)}
    for call in (tree.dot, lambda x, y: tree.lerp(x, y, 0.5), lambda x, y: tree.average([x, y])):
        with raises(r"'w' has shape \(2, 3\) in model 0 but \(3,\)"):
            call(a, b)


@pytest.mark.parametrize(
    ("weights", "pattern"),
    [([1, 2, 3], r"2 trees need 2 weights.*\(3,\)"), ([1, -1], "add up to zero"), ([1, np.nan], "finite")],
)
def test_weights_that_cannot_be_normalised_are_refused(weights, pattern):
    with raises(pattern):
        tree.average([model(0), model(1)], weights)


def test_arithmetic_works_under_jit_vmap_and_grad():
    a, b = model(0, jnp), model(1, jnp)
    grid = jnp.linspace(0, 1, 5)
    line = jax.jit(jax.vmap(tree.lerp, in_axes=(None, None, 0)))(a, b, grid)
    host = jax.vmap(lambda t: tree.lerp(model(0), model(1), t))(grid)
    for i, t in enumerate(grid):
        point = tree.lerp(a, b, float(t))
        for many in (line, host):
            jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6), many, point)
    slope = jax.grad(lambda w: tree.dot(tree.average([a, b], w), a))(jnp.asarray([1.0, 1.0]))
    exact = (tree.dot(model(0), model(0)) - tree.dot(model(0), model(1))) / 4
    np.testing.assert_allclose(slope, [exact, -exact], rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: tree.norm(x)))(a)
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, x / tree.norm(a), rtol=1e-5), gradient, a)


def test_dot_is_accumulated_in_float64_on_the_host_across_chunks(monkeypatch):
    monkeypatch.setattr(tree, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((10, 5)).astype(np.float32) for _ in range(2))
    x[0, 0], y[0, 0], x[0, 1], y[0, 1] = 1e4, 1e4, -1e4, 1e4
    exact = math.fsum((x.astype(np.float64) * y.astype(np.float64)).ravel())
    got = tree.dot({"x": x.T}, {"x": y.T})
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, exact, rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, *HALF])
def test_dot_of_jax_leaves_is_at_least_float32_and_right(dtype):
    a, b = model(0, jnp, dtype), model(1, jnp, dtype)
    got = tree.dot(a, b)
    assert isinstance(got, jax.Array)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, tree.dot(*jax.tree.map(np.asarray, (a, b))), rtol=1e-5)


def test_dot_and_norm_count_floating_leaves_only_and_mix_kinds():
    a = {"w": np.asarray([3.0, 0.0]), "v": jnp.asarray([4.0]), "count": np.asarray(100), "mask": np.ones(9, bool)}
    assert isinstance(tree.norm(a), jax.Array)
    assert float(tree.norm(a)) == 5.0
    assert tree.norm({"count": np.asarray(100)}) == 0
    assert tree.norm({"z": np.asarray([3 + 4j])}) == 5


def test_float64_leaves_are_accumulated_in_float64_on_device():
    with jax.enable_x64(True):
        a = {"w": jnp.asarray([1e8, 1.0, -1e8]), "h": jnp.asarray([1.0], jnp.float32)}
        ones = jax.tree.map(jnp.ones_like, a)
        assert tree.dot(a, ones).dtype == np.float64
        assert float(tree.dot(a, ones)) == 2.0


@pytest.mark.parametrize("backend", [np, jnp])
def test_unstack_inverts_stack(backend):
    models = [model(seed, backend) for seed in range(3)]
    stacked = tree.stack(models)
    assert stacked["layers"][0]["kernel"].shape == (3, 4, 3)
    assert is_host(stacked["scale"]) == (backend is np)
    for original, again in zip(models, tree.unstack(stacked), strict=True):
        jax.tree.map(np.testing.assert_array_equal, again, original)
        assert is_host(again["layers"][0]["bias"]) == (backend is np)


def test_stack_and_unstack_refuse_unequal_leaves_by_name():
    with raises("'w' has dtype float64 in model 0 but float32"):
        tree.stack([{"w": np.zeros(2)}, {"w": np.zeros(2, np.float32)}])
    with raises(r"'b' of shape \(3,\) .* are 2 by the first leaf"):
        tree.unstack({"a": np.zeros(2), "b": np.zeros(3)})
    with raises(r"'a' of shape \(\)"):
        tree.unstack({"a": np.zeros(())})
