"""The action on models: the gather convention, laws, kinds of leaves, transformations, optimizer states."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.action import permute, permute_state
from permjax.permutation import as_matrix, compose, identity, invert
from permjax.symmetry.spec import Fixed, Of, PermutationSpec, Product, Sum

pytestmark = pytest.mark.fast

seeds = st.integers(0, 2**16)
CYCLE = np.asarray([1, 2, 0], np.int32)


def on_device(values):
    return jax.tree.map(jnp.asarray, values)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


# The definition, position by position: `out[h, d] = in[pH[h], pD[h, d]]`, read off the axis trees.


def units_at(spec, axis, position: int) -> dict[str, int]:
    """Group -> unit at a position of an axis, where that is told without choosing a segment of a sum."""
    match axis:
        case Of(group):
            return {group: position}
        case Product(factors):
            digits = np.unravel_index(position, [spec.size(f) for f in factors])
            return {g: u for f, d in zip(factors, digits, strict=True) for g, u in units_at(spec, f, int(d)).items()}
        case _:
            return {}


def source_at(spec, axis, position: int, p, units: dict[str, int]) -> int:
    match axis:
        case Fixed():
            return position
        case Of(group):
            rows = p[group] if group in spec else np.arange(spec.group(group).size)
            for outer in spec.group(group).per if group in spec else ():
                rows = rows[units[outer]]
            return int(rows[position])
        case Product(factors):
            sizes = [spec.size(f) for f in factors]
            digits = [int(d) for d in np.unravel_index(position, sizes)]
            inside = {**units, **units_at(spec, axis, position)}
            sources = [source_at(spec, f, d, p, inside) for f, d in zip(factors, digits, strict=True)]
            return int(np.ravel_multi_index(sources, sizes))
        case Sum(segments):
            offset = 0
            for segment in segments:
                if position < offset + spec.size(segment):
                    return offset + source_at(spec, segment, position - offset, p, units)
                offset += spec.size(segment)
    raise AssertionError(axis)


def permuted_by_definition(spec, p, params):
    moved = {}
    for leaf in spec.leaves:
        out = np.empty_like(params[leaf.name])
        for place in itertools.product(*map(range, leaf.shape)):
            units = {g: u for a, i in zip(leaf.axes, place, strict=True) for g, u in units_at(spec, a, i).items()}
            source = tuple(source_at(spec, a, i, p, units) for a, i in zip(leaf.axes, place, strict=True))
            out[place] = params[leaf.name][source]
        moved[leaf.name] = out
    return moved


def test_permuting_is_what_the_definition_says_for_numpy_and_for_jax(zoo_spec, draw_params, draw_permutations):
    for seed in range(3):
        params, p = draw_params(zoo_spec, seed), draw_permutations(zoo_spec, seed)
        expected = permuted_by_definition(zoo_spec, p, params)
        assert_equal(permute(zoo_spec, p, params), expected)
        assert_equal(permute(zoo_spec, p, on_device(params)), expected)


def test_a_position_receives_the_unit_that_its_index_names():
    spec = PermutationSpec.from_axes({"w": (3, 2), "v": (2, 3)}, {"w": ("g", None), "v": (None, "g")})
    params = {"w": np.asarray([[10, 11], [20, 21], [30, 31]]), "v": np.asarray([[1, 2, 3], [4, 5, 6]])}
    moved = permute(spec, {"g": CYCLE}, params)
    assert moved["w"].tolist() == [[20, 21], [30, 31], [10, 11]]
    assert moved["v"].tolist() == [[2, 3, 1], [5, 6, 4]]


def test_units_within_heads_are_indexed_by_the_target_head(zoo, draw_permutations):
    spec = zoo["attention, fused and split"]
    p = {**identity(spec), "head": CYCLE, "qk": draw_permutations(spec, 3)["qk"]}
    params = {leaf.name: np.zeros(leaf.shape, np.int32) for leaf in spec.leaves}
    params["split"] = np.arange(36, dtype=np.int32).reshape(3, 3, 4)
    out = permute(spec, p, params)["split"]
    for h, d in itertools.product(range(3), range(4)):
        assert (out[:, h, d] == params["split"][:, CYCLE[h], p["qk"][h, d]]).all()


# laws


@given(seed=seeds)
def test_composition_acts_by_the_second_first(zoo_spec, draw_params, draw_permutations, seed):
    params, p, q = draw_params(zoo_spec, seed), draw_permutations(zoo_spec, seed), draw_permutations(zoo_spec, seed + 1)
    assert_equal(permute(zoo_spec, compose(zoo_spec, p, q), params), permute(zoo_spec, p, permute(zoo_spec, q, params)))


@given(seed=seeds)
def test_the_inverse_undoes_and_the_identity_does_nothing(zoo_spec, draw_params, draw_permutations, seed):
    params, p = draw_params(zoo_spec, seed), draw_permutations(zoo_spec, seed)
    moved = permute(zoo_spec, p, params)
    assert_equal(permute(zoo_spec, invert(zoo_spec, p), moved), params)
    assert_equal(permute(zoo_spec, identity(zoo_spec), params), params)
    assert any((moved[name] != params[name]).any() for name in params)


def test_an_mlp_computes_the_same_function_after_permuting(zoo, draw_params, draw_permutations):
    spec = zoo["mlp"]

    def apply(params, x):
        x = np.maximum(x @ params["a/kernel"] + params["a/bias"], 0)
        x = np.maximum(x @ params["b/kernel"] - params["b/mean"], 0)
        return x @ params["c/kernel"]

    params, x = draw_params(spec), np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)
    moved = permute(spec, draw_permutations(spec, 5), params)
    np.testing.assert_allclose(apply(moved, x), apply(params, x), rtol=1e-5, atol=1e-5)
    wrong = {**moved, "a/bias": params["a/bias"]}
    assert np.abs(apply(wrong, x) - apply(params, x)).max() > 0.1


def test_one_group_on_two_axes_of_a_leaf_acts_by_conjugation(zoo, draw_params, draw_permutations):
    spec = zoo["same group on two axes"]
    params, p = draw_params(spec), draw_permutations(spec, 2)
    matrix = as_matrix(p["h"])
    moved = permute(spec, p, params)
    np.testing.assert_array_equal(moved["square"], matrix @ params["square"] @ matrix.T)
    np.testing.assert_array_equal(moved["bias"], matrix @ params["bias"])


def test_statistics_move_with_their_units(zoo, draw_params, draw_permutations):
    spec = zoo["mlp"]
    params, p = draw_params(spec), draw_permutations(spec, 1)
    np.testing.assert_array_equal(permute(spec, p, params)["b/mean"], params["b/mean"][p["h1"]])


# kinds of leaves


def test_numpy_leaves_stay_numpy_and_jax_leaves_stay_jax(zoo, draw_params, draw_permutations):
    spec = zoo["attention, fused and split"]
    params, p = draw_params(spec), draw_permutations(spec)
    for permutations in (p, on_device(p)):
        assert all(type(x) is np.ndarray for x in permute(spec, permutations, params).values())
        assert_equal(permute(spec, permutations, params), permute(spec, p, params))
    assert all(isinstance(x, jax.Array) for x in permute(spec, p, on_device(params)).values())


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.bool_, jnp.bfloat16])
@pytest.mark.parametrize("backend", [np, jnp])
def test_dtypes_are_kept_and_values_only_moved(zoo, draw_params, draw_permutations, dtype, backend):
    spec = zoo["mlp"]
    p = draw_permutations(spec)
    with jax.enable_x64(dtype is np.float64):
        params = {name: backend.asarray((10 * x).astype(dtype)) for name, x in draw_params(spec).items()}
        moved = permute(spec, p, params)
        assert all(x.dtype == dtype for x in moved.values())
        assert_equal(moved, permuted_by_definition(spec, p, jax.tree.map(np.asarray, params)))


def test_inputs_are_left_alone_and_leaves_that_do_not_move_are_not_copied():
    spec = PermutationSpec.from_axes({"w": (3, 2), "fixed": (2,)}, {"w": ("g", None)})
    params = {"w": np.arange(6.0).reshape(3, 2), "fixed": np.zeros(2)}
    before = params["w"].copy()
    moved = permute(spec, {"g": CYCLE}, params)
    np.testing.assert_array_equal(params["w"], before)
    assert moved["fixed"] is params["fixed"]
    assert not np.shares_memory(moved["w"], params["w"])


def test_the_structure_of_the_model_is_kept():
    spec = PermutationSpec.from_axes({"0/w": (3,), "1/0": (3,)}, {"0/w": ("g",), "1/0": ("g",)})
    moved = permute(spec, {"g": CYCLE}, [{"w": np.arange(3)}, (np.arange(3),)])
    assert isinstance(moved, list)
    assert isinstance(moved[1], tuple)
    assert moved[1][0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_any_integer_dtype_of_permutations_will_do(zoo, draw_params, draw_permutations, dtype):
    spec = zoo["attention, fused and split"]
    params, p = draw_params(spec), draw_permutations(spec)
    other = {g: rows.astype(dtype) for g, rows in p.items()}
    for leaves in (params, on_device(params)):
        assert_equal(permute(spec, other, leaves), permute(spec, p, leaves))


# transformations


TRACED = ["attention, fused and split", "stacked layers", "dependent axis before its outer axis"]


@pytest.mark.parametrize("name", TRACED)
def test_permuting_works_under_jit_with_traced_permutations_and_numpy_leaves(zoo, draw_params, draw_permutations, name):
    spec = zoo[name]
    params, p = draw_params(spec), draw_permutations(spec)
    expected = permute(spec, p, params)
    assert_equal(jax.jit(lambda q, x: permute(spec, q, x))(p, params), expected)
    assert_equal(jax.jit(lambda q: permute(spec, q, params))(p), expected)
    assert_equal(jax.jit(lambda x: permute(spec, p, x))(params), expected)


@pytest.mark.parametrize("name", TRACED)
def test_permuting_maps_over_models_and_over_permutations(zoo, draw_params, draw_permutations, name):
    spec = zoo[name]
    models = [draw_params(spec, i) for i in range(3)]
    ps = [draw_permutations(spec, i) for i in range(3)]
    stacked, stacked_p = (jax.tree.map(lambda *x: np.stack(x), *trees) for trees in (models, ps))
    act = lambda p, x: permute(spec, p, x)  # noqa: E731
    pairs, by_model, by_permutation = jax.jit(
        lambda p, x: [jax.vmap(act)(p, x), jax.vmap(act, (None, 0))(ps[0], x), jax.vmap(act, (0, None))(p, models[0])]
    )(stacked_p, stacked)
    for i in range(3):
        pick = lambda x, i=i: jax.tree.map(lambda leaf: leaf[i], x)  # noqa: E731
        assert_equal(pick(pairs), act(ps[i], models[i]))
        assert_equal(pick(by_model), act(ps[0], models[i]))
        assert_equal(pick(by_permutation), act(ps[i], models[0]))


def test_the_gradient_at_a_permuted_model_is_the_permuted_gradient(zoo, draw_params, draw_permutations):
    spec = zoo["mlp"]
    x = np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)

    def loss(params):
        h = jax.nn.relu(jnp.expand_dims(params["a/bias"], 0) + x @ params["a/kernel"])
        return jnp.mean(jnp.square(jnp.tanh(h @ params["b/kernel"]) @ params["c/kernel"]))

    params, p = draw_params(spec, backend=jnp), draw_permutations(spec, 3)
    there = jax.grad(loss)(permute(spec, p, params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        there,
        permute(spec, p, jax.grad(loss)(params)),
    )


@pytest.mark.parametrize("name", TRACED)
def test_the_pullback_of_permuting_is_permuting_by_the_inverse(zoo, draw_params, draw_permutations, name):
    spec = zoo[name]
    params, p = draw_params(spec), draw_permutations(spec, 3)
    cotangent = draw_params(spec, 9)
    pulled = jax.jit(lambda x, y: jax.vjp(lambda z: permute(spec, p, z), x)[1](y)[0])(params, cotangent)
    assert_equal(pulled, permute(spec, invert(spec, p), cotangent))


# optimizer states


@pytest.fixture
def nested(zoo, draw_params):
    def split(named):
        layers = {}
        for name, leaf in named.items():
            layer, kind = name.split("/")
            layers.setdefault(layer, {})[kind] = leaf
        return layers

    spec = zoo["mlp"]
    return spec, [split(draw_params(spec, seed, jnp)) for seed in range(3)]


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-2),
        optax.sgd(1e-2, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), optax.ema(0.9)),
        optax.sgd(1e-2),
    ],
    ids=["adam", "momentum", "chain with ema", "sgd"],
)
def test_training_a_permuted_model_with_its_permuted_state_is_permuted_training(nested, draw_permutations, optimizer):
    spec, (params, gradient, second) = nested
    p = draw_permutations(spec, 4)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        updates, after = optimizer.update(second, state, params)
        moved = permute_state(spec, p, state)
        assert jax.tree.structure(moved) == jax.tree.structure(state)
        updates_there, after_there = optimizer.update(permute(spec, p, second), moved, permute(spec, p, params))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # noqa: E731
    jax.tree.map(close, updates_there, permute(spec, p, updates))
    jax.tree.map(close, after_there, permute_state(spec, p, after))


def test_a_state_of_the_names_and_shapes_of_the_model_moves_like_the_model(nested, draw_permutations):
    spec, (params, average, _) = nested
    p = draw_permutations(spec, 4)
    moved = permute_state(spec, p, {"ema": average, "params": params, "step": 3})
    assert_equal(moved, {"ema": permute(spec, p, average), "params": permute(spec, p, params), "step": 3})


def test_a_state_leaf_that_mirrors_no_leaf_is_refused_by_name(nested):
    spec, (params, *_) = nested
    with raises(r"'row/a/kernel' of shape \(3,\) mirrors no leaf"):
        permute_state(spec, identity(spec), {"row": {"a": {"kernel": jnp.zeros(3)}}})
    with raises("'noise' of shape"):
        permute_state(spec, identity(spec), {"noise": jnp.zeros(5), "mu": params})


def test_the_longest_name_decides_which_leaf_a_state_leaf_mirrors():
    spec = PermutationSpec.from_axes({"w": (3,), "a/w": (3,)}, {"a/w": ("g",)})
    model = {"w": np.arange(3), "a": {"w": np.arange(3)}}
    moved = permute_state(spec, {"g": CYCLE}, {"mu": model})["mu"]
    assert moved["w"].tolist() == [0, 1, 2]
    assert moved["a"]["w"].tolist() == [1, 2, 0]


# bad input


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        ({"w": np.zeros((3, 2)), "x": np.zeros(1)}, "params has the leaf 'x', which the spec does not know"),
        ({}, r"params lacks the leaf 'w' of shape \(3, 2\)"),
        ({"w": np.zeros((3, 4))}, "leaf 'w', axis 1: params has size 4, the spec expects 2"),
        ({"w": np.zeros(3)}, "leaf 'w' of params has 1 axes"),
    ],
)
def test_a_model_that_does_not_fit_the_spec_is_refused_by_leaf_and_axis(params, pattern):
    spec = PermutationSpec.from_axes({"w": (3, 2)}, {"w": ("g", None)})
    with raises(pattern):
        permute(spec, {"g": CYCLE}, params)


def test_bad_permutations_are_refused_before_anything_moves():
    spec = PermutationSpec.from_axes({"w": (3, 2)}, {"w": ("g", None)})
    for act in (permute, permute_state):
        with raises("'g' is no bijection"):
            act(spec, {"g": np.asarray([0, 0, 1])}, {"w": np.zeros((3, 2))})
        with raises(r"missing \['g'\]"):
            act(spec, {}, {"w": np.zeros((3, 2))})


def test_a_group_without_its_outer_group_beside_it_is_refused_by_name(zoo):
    groups = zoo["attention, fused and split"].groups
    alone = PermutationSpec.from_axes(
        {"w": (3, 4), "b": (4,)}, {"w": ("head", "qk"), "b": ("qk",)}, per={"qk": ("head",)}
    )
    assert [g.name for g in alone.groups] == [g.name for g in groups if g.name in ("head", "qk")]
    with raises("'qk' is per 'head', which does not stand beside it"):
        permute(alone, identity(alone), {"w": np.zeros((3, 4)), "b": np.zeros(4)})
