"""Canonical scale: the function stays, copies that differ by a rescaling become equal, and nothing else is touched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax import tree
from permjax.merge.scale import CanonicalScale, canonical_scale
from permjax.nets.registry import build, config_from_dict
from permjax.steps import MergeState
from permjax.symmetry.spec import PermutationSpec, Product, Sum
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


@pytest.fixture
def ordinary_promotion():
    """Flax needs the standard rules."""
    with jax.numpy_dtype_promotion("standard"):
        yield


IMAGE = [8, 8, 1]
NETS = {
    "mlp": {"model_type": "mlp", "hidden": [12, 10], "input_shape": [6]},
    "mlp with layer norm": {"model_type": "mlp", "hidden": [12, 10], "input_shape": [6], "norm": "layer"},
    "vgg": {"model_type": "vgg", "layers": [4, "M", 6], "hidden": [5], "input_shape": IMAGE, "norm": "none"},
    "resnet": {"model_type": "resnet", "channels": [4, 6], "blocks": [1, 1], "input_shape": IMAGE, "norm": "batch"},
    "vit": {"model_type": "vit", "width": 12, "depth": 1, "heads": 3, "mlp": 16, "input_shape": IMAGE},
}
KINDS = {
    "mlp": ("plain", "plain"),
    "mlp with layer norm": ("after norm", "after norm"),
    "vgg": ("plain", "plain", "plain"),
    "resnet": ("after norm",) * 4,
    "vit": ("after norm",),
}


def weights(like, seed=1):
    """Random weights; vectors, running statistics among them, in [0.5, 1.5)."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.uniform(0.5, 1.5, leaf.shape) if len(leaf.shape) < 2 else 0.4 * rng.standard_normal(leaf.shape)
        return values.astype(np.float32)

    return jax.tree.map(draw, like)


@pytest.fixture(scope="module", params=NETS)
def case(request):
    net = build(config_from_dict(NETS[request.param]))
    x = net.example_inputs(8)[0]
    with jax.numpy_dtype_promotion("standard"):
        params = weights(jax.eval_shape(net.init, jax.random.key(0)))
        spec = trace_spec(net.apply, params, x, verify=False)
        result = canonical_scale(spec, params, apply=net.apply, inputs=x)
    return request.param, net.apply, spec, params, x, result


def change(apply, a, b, x):
    one, two = (np.asarray(jax.jit(apply)(p, x)) for p in (a, b))
    return np.abs(one - two).max() / np.abs(one).max()


def assert_close(a, b, tolerance):
    for name, leaf in tree.flatten(a).items():
        np.testing.assert_allclose(tree.flatten(b)[name], leaf, rtol=tolerance, atol=tolerance, err_msg=name)


def test_the_function_is_preserved_and_every_group_accounted_for(case):
    name, apply, spec, params, x, result = case
    (scaled,), plan, info = result
    assert change(apply, params, scaled, x) <= 1e-5
    assert info.change <= 1e-5
    assert plan is None
    assert info.kinds == KINDS[name]
    assert sorted((*info.groups, *info.left)) == sorted(g.name for g in spec.groups)
    moved = {n for n, leaf in tree.flatten(params).items() if not np.array_equal(leaf, tree.flatten(scaled)[n])}
    assert moved
    assert not any(n.startswith("batch_stats") for n in moved)


def test_it_is_idempotent(case):
    _, apply, spec, _, x, result = case
    again = canonical_scale(spec, result.models[0], apply=apply, inputs=x)
    assert again.info[:3] == result.info[:3]
    assert_close(result.models[0], again.models[0], 1e-5)


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_what_writes_a_unit_has_norm_one(name):
    net = build(config_from_dict(NETS[name]))
    x = net.example_inputs(8)[0]
    params = weights(jax.eval_shape(net.init, jax.random.key(0)))
    spec = trace_spec(net.apply, params, x, verify=False)
    (scaled,), _, info = canonical_scale(spec, params, apply=net.apply, inputs=x)
    leaves = tree.flatten(scaled)
    for group in info.groups:
        kernel = group.split(":")[0]
        writers = [leaves[kernel].reshape(-1, spec.group(group).size), leaves[kernel.replace("kernel", "bias")][None]]
        np.testing.assert_allclose(np.linalg.norm(np.concatenate(writers), axis=0), 1, rtol=1e-5)


# rescaled by hand


def factors(seed, n):
    return (10 ** np.random.default_rng(seed).uniform(-3, 3, n)).astype(np.float32)


def rescale(params, changes):
    """Multiply leaves along an axis: leaf -> [(axis, factors)]."""
    named = dict(tree.flatten(params))
    for leaf, steps in changes.items():
        for axis, s in steps:
            shape = [-1 if i == axis else 1 for i in range(named[leaf].ndim)]
            named[leaf] = named[leaf] * s.reshape(shape)
    return tree.unflatten(params, named)


def by_hand(name):
    """A rescaling of some groups of a network, written out."""
    if name == "mlp":
        s, t = factors(1, 12), factors(2, 10)
        layers = [f"params/Dense_{i}" for i in range(3)]
        return {
            f"{layers[0]}/kernel": [(1, s)],
            f"{layers[0]}/bias": [(0, s)],
            f"{layers[1]}/kernel": [(0, 1 / s), (1, t)],
            f"{layers[1]}/bias": [(0, t)],
            f"{layers[2]}/kernel": [(0, 1 / t)],
        }
    if name == "vgg":
        s, t, u = factors(1, 4), factors(2, 6), factors(3, 5)
        return {
            "params/Conv_0/kernel": [(3, s)],
            "params/Conv_0/bias": [(0, s)],
            "params/Conv_1/kernel": [(2, 1 / s), (3, t)],
            "params/Conv_1/bias": [(0, t)],
            "params/Dense_0/kernel": [(0, 1 / np.tile(t, 16)), (1, u)],  # 4 x 4 positions of 6 channels
            "params/Dense_0/bias": [(0, u)],
            "params/Dense_1/kernel": [(0, 1 / u)],
        }
    if name == "mlp with layer norm":
        s = factors(1, 12)
        norm = {f"params/LayerNorm_0/{leaf}": [(0, s)] for leaf in ("scale", "bias")}
        return {**norm, "params/Dense_1/kernel": [(0, 1 / s)]}
    if name == "resnet":
        s, t, u = factors(1, 4), factors(2, 6), factors(3, 4)
        norms = {"params/BatchNorm_0": s, "params/BasicBlock_0/BatchNorm_1": s, "params/BasicBlock_1/BatchNorm_1": t}
        norms |= {"params/BasicBlock_1/BatchNorm_2": t, "params/BasicBlock_0/BatchNorm_0": u}
        readers = {"params/BasicBlock_0/Conv_0": s, "params/BasicBlock_0/Conv_1": u, "params/BasicBlock_1/Conv_0": s}
        readers |= {"params/BasicBlock_1/Conv_2": s}
        return {
            **{f"{norm}/{leaf}": [(0, f)] for norm, f in norms.items() for leaf in ("scale", "bias")},
            **{f"{conv}/kernel": [(2, 1 / f)] for conv, f in readers.items()},
            "params/Dense_0/kernel": [(0, 1 / t)],
        }
    s = factors(1, 12)
    attention = "params/Block_0/MultiHeadDotProductAttention_0"
    norms = ("params/Block_0/LayerNorm_0", "params/Block_0/LayerNorm_1", "params/LayerNorm_0")
    readers = ("params/Block_0/Dense_0", "params/head", *(f"{attention}/{part}" for part in ("query", "key", "value")))
    return {
        **{f"{norm}/{leaf}": [(0, s)] for norm in norms for leaf in ("scale", "bias")},
        **{f"{layer}/kernel": [(0, 1 / s)] for layer in readers},
    }


def test_copies_that_differ_by_a_rescaling_have_one_canonical_form(case):
    name, apply, spec, params, x, result = case
    copy = rescale(params, by_hand(name))
    assert change(apply, params, copy, x) <= 1e-4
    other = canonical_scale(spec, copy, apply=apply, inputs=x)
    assert other.info[:3] == result.info[:3]
    assert_close(result.models[0], other.models[0], 1e-4)


# hand-written networks with harder places


def check(spec, apply, params, copy, x, kinds, left=()):
    """Both copies compute the same and get the same form."""
    assert change(apply, params, copy, x) <= 1e-4
    one, two = (canonical_scale(spec, p, apply=apply, inputs=x) for p in (params, copy))
    assert one.info.kinds == two.info.kinds == kinds
    assert one.info.left == left
    assert change(apply, params, one.models[0], x) <= 1e-5
    assert_close(one.models[0], two.models[0], 1e-4)


def drawn(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {leaf.name: rng.standard_normal(leaf.shape).astype(np.float32) for leaf in spec.leaves}


X = np.random.default_rng(5).standard_normal((20, 6)).astype(np.float32)


def test_a_residual_stream_without_norms_has_several_writers_and_readers():
    axes = {"in": (None, "s"), "up": ("s", "h"), "up bias": ("h",), "down": ("h", "s"), "down bias": ("s",)}
    shapes = {"in": (6, 5), "up": (5, 7), "up bias": (7,), "down": (7, 5), "down bias": (5,), "out": (5, 3)}
    spec = PermutationSpec.from_axes(shapes, {**axes, "out": ("s", None)})

    def apply(p, x):
        x = jax.nn.relu(x @ p["in"])
        hidden = jax.nn.relu(x @ p["up"] + p["up bias"][None])
        return jax.nn.relu(x + hidden @ p["down"] + p["down bias"][None]) @ p["out"]

    params, s, h = drawn(spec), factors(1, 5), factors(2, 7)
    stream = {"in": [(1, s)], "up": [(0, 1 / s), (1, h)], "down": [(0, 1 / h), (1, s)], "out": [(0, 1 / s)]}
    copy = rescale(params, {**stream, "up bias": [(0, h)], "down bias": [(0, s)]})
    check(spec, apply, params, copy, X, ("plain", "plain"))


def test_a_recurrent_leaf_is_scaled_on_both_axes():
    spec = PermutationSpec.from_axes(
        {"in": (6, 5), "loop": (5, 5), "out": (5, 3)}, {"in": (None, "h"), "loop": ("h", "h"), "out": ("h", None)}
    )

    def apply(p, x):
        h = jax.nn.relu(x @ p["in"])
        for _ in range(2):
            h = jax.nn.relu(h @ p["loop"])
        return h @ p["out"]

    params, s = drawn(spec), factors(1, 5)
    copy = rescale(params, {"in": [(1, s)], "loop": [(0, 1 / s), (1, s)], "out": [(0, 1 / s)]})
    check(spec, apply, params, copy, X, ("plain",))


def test_units_inside_products_and_sums_take_their_own_factors():
    def apply(p, x):
        h = jax.nn.relu(x @ p["w"] + p["bias"][None])
        joined = h[:, :3, None] + h[:, 3:].reshape(-1, 3, 2)
        return joined.reshape(-1, 6) @ p["out"]

    rng = np.random.default_rng(0)
    shapes = {"w": (6, 9), "bias": (9,), "out": (6, 4)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    spec = trace_spec(apply, params, X, verify=False)
    (block,) = (g for g in spec.groups if not g.per)
    assert isinstance(spec.leaf("w").axes[1], Sum)
    assert isinstance(spec.leaf("out").axes[0], Product)
    s = factors(1, 3)
    along = np.concatenate([s, np.repeat(s, 2)])
    copy = rescale(params, {"w": [(1, along)], "bias": [(0, along)], "out": [(0, 1 / np.repeat(s, 2))]})
    left = tuple(g.name for g in spec.groups if g.name != block.name)
    check(spec, apply, params, copy, X, ("plain",), left)


def test_a_depthwise_convolution_passes_the_scale_on():
    spec = PermutationSpec.from_axes(
        {"in": (1, 5), "taps": (3, 1, 5), "taps bias": (5,), "out": (5, 2)},
        {"in": (None, "c"), "taps": (None, None, "c"), "taps bias": ("c",), "out": ("c", None)},
    )

    def apply(p, x):
        x = jax.nn.relu(x[:, :, None] @ p["in"])
        x = jax.lax.conv_general_dilated(
            x, p["taps"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=5
        )
        return jax.nn.relu(x + p["taps bias"][None, None]).mean(1) @ p["out"]

    params, s = drawn(spec), factors(1, 5)
    check(
        spec,
        apply,
        params,
        rescale(params, {"in": [(1, s)], "taps bias": [(0, s)], "out": [(0, 1 / s)]}),
        X,
        ("plain",),
    )


def test_what_is_not_homogeneous_is_left_alone_to_the_bit():
    spec = PermutationSpec.from_axes({"w": (6, 5), "out": (5, 3)}, {"w": (None, "h"), "out": ("h", None)})
    params = drawn(spec)
    for activation in (jnp.tanh, jax.nn.gelu, jax.nn.sigmoid):
        result = canonical_scale(spec, params, apply=lambda p, x, f=activation: f(x @ p["w"]) @ p["out"], inputs=X)
        assert result.info == ((), (), ("h",), 0.0)
        for name in params:
            np.testing.assert_array_equal(result.models[0][name], params[name])


def test_units_of_norm_zero_keep_their_scale():
    spec = PermutationSpec.from_axes({"w": (6, 5), "out": (5, 3)}, {"w": (None, "h"), "out": ("h", None)})
    params = drawn(spec)
    params["w"][:, 2] = 0
    (scaled,), _, _ = canonical_scale(spec, params, apply=lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"], inputs=X)
    np.testing.assert_array_equal(scaled["w"][:, 2], 0)
    np.testing.assert_array_equal(scaled["out"][2], params["out"][2])


def test_leaves_keep_their_kind_and_dtype():
    spec = PermutationSpec.from_axes({"w": (6, 5), "out": (5, 3)}, {"w": (None, "h"), "out": ("h", None)})
    params = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in drawn(spec).items()}
    (scaled,), _, info = canonical_scale(spec, params, apply=lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"], inputs=X)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16 for leaf in scaled.values())
    assert 0 < info.change < 0.02  # the rounding


def test_the_step_scales_every_model_by_itself():
    spec = PermutationSpec.from_axes({"w": (6, 5), "out": (5, 3)}, {"w": (None, "h"), "out": ("h", None)})

    def apply(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["out"]

    models = [drawn(spec, seed) for seed in (1, 2)]
    state = MergeState.create(spec, models, key=jax.random.key(0), apply=apply, data=[X[:9], X[9:]])
    after = CanonicalScale()(state)
    for model, found in zip(models, after.models, strict=True):
        expected = canonical_scale(spec, model, apply=apply, inputs=X[:9]).models[0]
        np.testing.assert_array_equal(found["w"], expected["w"])
    assert [info.groups for info in after.infos[0]] == [("h",)] * 2
    with pytest.raises(ValueError, match="CanonicalScale needs `data`"):
        CanonicalScale()(dataclasses.replace(state, data=None))
    with pytest.raises(ValueError, match="`data` gave no batches"):
        CanonicalScale()(dataclasses.replace(state, data=[]))


def test_bad_input_is_refused():
    spec = PermutationSpec.from_axes({"w": (6, 5), "out": (5, 3)}, {"w": (None, "h"), "out": ("h", None)})
    params = drawn(spec)
    for model, inputs, hyper, message in (
        ({**params, "w": params["w"][:, :4]}, X, {}, "leaf 'w', axis 1: the model has size 4"),
        ({**params, "w": np.full((6, 5), np.nan, np.float32)}, X, {}, "'w' of the model holds 30 NaN"),
        (params, X, {"tolerance": 0.0}, "The tolerance is 0.0"),
        (params, np.full((2, 6), np.inf, np.float32), {}, "outputs of the model on these inputs are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            canonical_scale(spec, model, apply=lambda p, x: x @ p["w"] @ p["out"], inputs=inputs, **hyper)
