import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from permjax.action import permute
from permjax.edit.delta import (
    Dense,
    LowRank,
    apply_delta,
    compose,
    invert,
    load_delta,
    permute_delta,
    save_delta,
    scale,
    side_path,
)
from permjax.edit.places import mlp_place
from permjax.io.checkpoint import CheckpointError
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

LAYOUTS = ["in_out", "out_in"]
HALF = (ml_dtypes.bfloat16, np.float16)


def drawn(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def low_rank(orientation, m=5, d=3, r=2, seed=0):
    return LowRank(drawn(d, r, seed=seed), drawn(m, r, seed=seed + 1), orientation)


def leaf_for(orientation, m=5, d=3):
    return drawn(*((m, d) if orientation == "in_out" else (d, m)), seed=9)


def mapped(leaf, key, orientation):
    return key @ leaf if orientation == "in_out" else leaf @ key


@pytest.mark.parametrize("size", [5, 3])  # 3: a square leaf, whose layout no shape tells
@pytest.mark.parametrize("orientation", LAYOUTS)
def test_an_applied_change_adds_u_v_k_to_every_value_whatever_the_layout(orientation, size):
    change, leaf, key = low_rank(orientation, m=size), leaf_for(orientation, m=size), drawn(size, seed=4)
    edited = apply_delta({"w": leaf}, {"w": change})["w"]
    wanted = mapped(leaf, key, orientation) + change.u @ (change.v.T @ key)
    np.testing.assert_allclose(mapped(edited, key, orientation), wanted, rtol=1e-12)


def test_other_leaves_are_the_very_same_objects():
    params = {"a": {"w": leaf_for("in_out")}, "b": jnp.ones(3)}
    edited = apply_delta(params, {"a/w": low_rank("in_out")})
    assert edited["b"] is params["b"]
    assert np.abs(edited["a"]["w"] - params["a"]["w"]).min() > 0


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((np, t) for t in (*HALF, np.float32, np.float64)), *((jnp, t) for t in (*HALF, np.float32))],
)
def test_a_leaf_keeps_its_dtype_and_is_rounded_once(dtype, backend):
    leaf, change = leaf_for("out_in").astype(dtype), low_rank("out_in")
    edited = apply_delta({"w": backend.asarray(leaf)}, {"w": change})["w"]
    assert edited.dtype == dtype
    exact = np.asarray(leaf, np.float64) + change.u @ change.v.T
    error = np.abs(np.asarray(edited, np.float64) - exact) / np.abs(exact)
    assert error.max() <= float(ml_dtypes.finfo(dtype).eps)


def test_deltas_add_up_scale_and_undo():
    params = {"w": leaf_for("in_out"), "x": drawn(2)}
    a, b = {"w": low_rank("in_out")}, {"w": low_rank("in_out", r=1, seed=5), "x": Dense(drawn(2, seed=7))}
    together, one_by_one = apply_delta(params, compose(a, b)), apply_delta(apply_delta(params, b), a)
    for name in params:
        np.testing.assert_allclose(together[name], one_by_one[name], rtol=1e-12)
    halves = apply_delta(apply_delta(params, scale(b, 0.5)), scale(b, 0.5))
    np.testing.assert_allclose(halves["w"], apply_delta(params, b)["w"], rtol=1e-12)
    np.testing.assert_allclose(apply_delta(params, compose(b, invert(b)))["x"], params["x"], rtol=1e-12)
    assert compose(a, b)["w"].u.shape == (3, 3)
    assert compose() == {}


def test_low_rank_and_dense_changes_of_a_leaf_compose_to_a_dense_one():
    a, b = low_rank("in_out"), Dense(leaf_for("in_out"))
    for both in (compose({"w": a}, {"w": b}), compose({"w": b}, {"w": a})):
        np.testing.assert_allclose(both["w"].value, a.v @ a.u.T + b.value, rtol=1e-12)


def test_changes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'weigth', which the model has not \(nearest: 'weight'\)"):
        apply_delta({"weight": leaf_for("in_out")}, {"weigth": low_rank("in_out")})
    with pytest.raises(ValueError, match=r"'w' has shape \(3, 5\), but the leaf has \(5, 3\)"):
        apply_delta({"w": leaf_for("in_out")}, {"w": low_rank("out_in")})
    with pytest.raises(ValueError, match="orientations 'in_out' and 'out_in'"):
        compose({"w": low_rank("in_out", m=3)}, {"w": low_rank("out_in", m=3)})
    with pytest.raises(ValueError, match=r"'w' have shapes \(3, 2\) and \(4, 2\)"):
        compose({"w": low_rank("in_out")}, {"w": low_rank("in_out", d=4)})
    with pytest.raises(ValueError, match=r"'w' have shapes \(2,\) and \(3,\)"):
        compose({"w": Dense(drawn(2))}, {"w": Dense(drawn(3))})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64])
def test_a_saved_delta_comes_back_bit_by_bit(tmp_path, dtype):
    low, dense = low_rank("out_in"), Dense(drawn(2, 3, 4).astype(dtype))
    low = LowRank(low.u.astype(dtype), jnp.asarray(low.v, jnp.float32), "out_in")
    save_delta(tmp_path / "edit.safetensors", {"a/b.weight": low, "c": dense})
    loaded = load_delta(tmp_path / "edit.safetensors")
    assert list(loaded) == ["a/b.weight", "c"]
    assert loaded["a/b.weight"].orientation == "out_in"
    for mine, theirs in (
        (loaded["a/b.weight"].u, low.u),
        (loaded["a/b.weight"].v, low.v),
        (loaded["c"].value, dense.value),
    ):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, np.asarray(theirs))


def test_a_file_without_a_delta_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no delta"):
        load_delta(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["gpt2", "llama, square"])
def test_a_side_path_gives_the_logits_of_the_changed_weights_for_many_candidates_at_once(edit_case, name):
    net, params, edits, _ = edit_case(name)
    tokens = jnp.asarray(edits[0].tokens)
    places = [mlp_place(net.config, layer) for layer in (0, 1)]
    sizes = [params[p.weight].shape if p.orientation == "in_out" else params[p.weight].shape[::-1] for p in places]

    def candidate(seed):
        changes = [
            low_rank(p.orientation, m, d, 1, seed + i) for i, (p, (m, d)) in enumerate(zip(places, sizes, strict=True))
        ]
        return {p.weight: change for p, change in zip(places, changes, strict=True)}

    candidates = [candidate(10 * seed) for seed in range(2)]
    dense = {name: change.dense() for name, change in candidates[0].items()}

    @jax.jit
    def run(params, stack, dense):
        beside = jax.vmap(lambda delta: net.apply(params, tokens, hook=side_path(net, delta)))(stack)
        inside = jax.lax.map(lambda delta: net.apply(apply_delta(params, delta), tokens), stack)
        return beside, inside, net.apply(params, tokens, hook=side_path(net, dense)), net.apply(params, tokens)

    stack = jax.tree.map(lambda *parts: jnp.stack(parts).astype(jnp.float32), *candidates)
    beside, inside, with_dense, plain = run(params, stack, jax.tree.map(jnp.float32, dense))
    np.testing.assert_allclose(beside, inside, atol=2e-4)
    np.testing.assert_allclose(with_dense, beside[0], atol=2e-4)
    assert np.abs(beside - plain[None]).max(axis=(1, 2, 3)).min() > 0.1


def test_a_side_path_beside_another_matrix_is_refused(edit_case):
    net = edit_case("gpt2").net
    with pytest.raises(ValueError, match=r"'transformer.h.0.mlp.c_fc.weight' \(nearest: '.*c_proj.weight'\)"):
        side_path(net, {"transformer.h.0.mlp.c_fc.weight": Dense(drawn(2, 2))})


def test_a_permuted_delta_changes_the_permuted_model_as_the_delta_the_model():
    axes = {"w": ("keys", "values"), "x": ("values", "keys"), "y": ("keys", None)}
    shapes = {"w": (5, 3), "x": (3, 5), "y": (5, 4)}
    spec = PermutationSpec.from_axes(shapes, axes)
    p = {"keys": np.asarray([1, 2, 3, 4, 0], np.int32), "values": np.asarray([1, 2, 0], np.int32)}
    params = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    delta = {
        "w": low_rank("in_out"),
        "x": low_rank("out_in", seed=3),
        "y": Dense(drawn(5, 4, seed=5)),
    }
    moved = permute_delta(spec, p, delta)
    assert isinstance(moved["w"], LowRank)
    there = apply_delta(permute(spec, p, params), moved)
    here = permute(spec, p, apply_delta(params, delta))
    for name in params:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-12)


def test_a_change_of_low_rank_whose_axes_move_together_becomes_dense():
    spec = PermutationSpec.from_axes({"w": (4, 4)}, {"w": ("units", "units")})
    p = {"units": np.asarray([1, 2, 3, 0], np.int32)}
    change = low_rank("in_out", m=4, d=4)
    moved = permute_delta(spec, p, {"w": change})["w"]
    np.testing.assert_allclose(moved.dense().value, permute(spec, p, {"w": change.dense().value})["w"], rtol=1e-12)
