"""Gram statistics: laws of addition, explicit sums in NumPy float64, both ways through a convolution, files."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from permjax.merge import products
from permjax.merge.gram import Gram, check_finite, conv_gram, dot_gram, load_grams, save_grams
from permjax.merge.windows import Window, _is_shiftable, patch_sums, pick_positions, shift_sums

FIELDS = ("inputs", "cross", "targets")


@pytest.fixture
def chunks_of(monkeypatch):
    """`chunks_of(numbers)` makes chunks so small from here on, and compiles anew."""

    def set_chunk(numbers: int):
        monkeypatch.setattr(products, "_CHUNK", numbers)
        jax.clear_caches()

    yield set_chunk
    jax.clear_caches()


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def explicit(x, y, bias):
    """The Gram of rows, in NumPy float64."""
    x, y = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (x, y))
    x = np.concatenate([x, np.ones((len(x), int(bias)))], 1)
    return Gram(x.T @ x, x.T @ y, (y * y).sum(0), len(x), len(x), bias)


def assert_same(a, b, rtol=1e-12):
    for name in FIELDS:
        one, two = (np.asarray(getattr(g, name)) for g in (a, b))
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, two, rtol=0, atol=rtol * np.abs(two).max(), err_msg=name)
    assert (a.rows, a.bias) == (b.rows, b.bias)


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def group(gram, index):
    return Gram(*(getattr(gram, name)[index] for name in FIELDS), gram.rows, gram.samples, gram.bias)


def patches(x, window, strides, padding, dilation):
    """What a kernel sees, by loops over positions and places: `[samples * positions, prod(window) * channels]`."""
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    ranges = [
        range(0, n - d * (w - 1), s) for n, w, s, d in zip(padded.shape[1:-1], window, strides, dilation, strict=True)
    ]
    rows = []
    for image, start in product(padded, product(*ranges)):
        seen = [
            image[tuple(a + d * t for a, d, t in zip(start, dilation, tap, strict=True))] for tap in np.ndindex(*window)
        ]
        rows.append(np.concatenate(seen))
    return np.array(rows)


# dense layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(7,), (5, 4), (2, 3, 2)])
def test_a_dense_gram_holds_the_sums_over_all_rows(lead, bias):
    x, y = draw(*lead, 6), draw(*lead, 3, seed=1)
    gram = dot_gram(x, y, bias=bias)
    assert_same(gram, explicit(x, y, bias))
    assert gram.samples == lead[0]


def test_groups_are_separate_problems():
    x, y = draw(3, 5, 2, 4), draw(3, 5, 2, 6, seed=1)
    gram = dot_gram(x, y, bias=True, batched=True)
    assert (gram.rows, gram.samples, gram.inputs.shape) == (10, 5, (3, 5, 5))
    for i in range(3):
        assert_same(group(gram, i), explicit(x[i], y[i], True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_is_widened_before_the_product(dtype):
    x, y = jnp.asarray(1000 + draw(300, 5), dtype), jnp.asarray(draw(300, 2, seed=1), dtype)
    gram = dot_gram(x, y, bias=True)
    assert_same(gram, explicit(np.asarray(x, np.float64), np.asarray(y, np.float64), True), rtol=1e-14)


def test_the_gram_of_many_columns_is_put_together_exactly():
    x, y = draw(9, 2 * products._WHOLE + 3), draw(9, 2, seed=1)
    gram = dot_gram(x, y, bias=True)
    assert_same(gram, explicit(x, y, True))


@pytest.mark.parametrize("samples", [1, 7, 8])
def test_chunks_of_samples_add_up(chunks_of, samples):
    chunks_of(40)
    x, y = draw(samples, 5, 3, seed=samples), draw(samples, 5, 2, seed=1)
    assert_same(dot_gram(x, y, bias=True), explicit(x, y, True))


def test_grams_of_parts_add_up_to_that_of_all():
    x, y = draw(10, 3, 4), draw(10, 3, 2, seed=1)
    parts = Gram.empty(5, 2, bias=True) + dot_gram(x[:4], y[:4], bias=True) + dot_gram(x[4:], y[4:], bias=True)
    assert_same(parts, dot_gram(x, y, bias=True))
    assert parts.samples == 10


def test_a_gram_can_be_taken_inside_jit():
    x, y = draw(6, 3), draw(6, 2, seed=1)
    gram = jax.jit(lambda x, y: dot_gram(x, y, bias=True) + dot_gram(x, y, bias=True))(x, y)
    once = dot_gram(x, y, bias=True)
    assert_same(gram, once + once)
    assert (gram + once).rows == 18


@pytest.mark.parametrize("chunk", [10**6, 200])
def test_sharded_activations_give_the_same_grams(chunks_of, chunk):
    chunks_of(chunk)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    x, y = draw(16, 5, 5, 4), draw(16, 5, 5, 3, seed=1)
    spread = [jax.device_put(v, NamedSharding(mesh, PartitionSpec("batch"))) for v in (x, y)]
    assert len(spread[0].sharding.device_set) == 4
    assert_same(dot_gram(*spread, bias=True), explicit(x, y, True))
    how = {"window": (3, 3), "strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "bias": True}
    assert_same(conv_gram(*spread, **how), conv_gram(x, y, **how))


# convolutions

CASES = {
    "1-d": ((9,), (3,), (1,), ((1, 1),), (1,)),
    "1-d, strided, dilated, padded on one side": ((11,), (3,), (2,), ((0, 3),), (2,)),
    "2-d": ((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "2-d, asymmetric": ((6, 7), (3, 2), (2, 1), ((0, 1), (1, 0)), (1, 1)),
    "2-d, dilated": ((7, 6), (2, 3), (1, 1), ((1, 0), (2, 2)), (2, 2)),
    "2-d, one place": ((4, 5), (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "2-d, window as large as the image": ((3, 4), (3, 4), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "2-d, window larger than the image": ((2, 3), (5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "2-d, padded beyond the window": ((4, 4), (2, 2), (1, 1), ((3, 0), (0, 2)), (1, 1)),
    "3-d": ((4, 3, 3), (2, 3, 2), (1, 2, 1), ((1, 0), (1, 1), (0, 0)), (1, 1, 1)),
}


def geometry(name):
    spatial, window, strides, padding, dilation = CASES[name]
    return spatial, {"window": window, "strides": strides, "padding": padding, "dilation": dilation}


@pytest.fixture(params=CASES)
def case(request):
    return geometry(request.param)


def outputs_for(how, spatial, samples, channels):
    return draw(samples, *Window(*how.values()).outputs(spatial), channels, seed=1)


def test_a_convolution_has_the_gram_of_its_patches(case):
    spatial, how = case
    x = draw(3, *spatial, 2)
    y = outputs_for(how, spatial, 3, 4)
    gram = conv_gram(x, y, **how, bias=True)
    assert_same(gram, explicit(patches(x, **how), y, True))
    assert gram.samples == 3


@pytest.mark.parametrize("name", ["1-d", "2-d, asymmetric", "2-d, dilated", "3-d"])
@pytest.mark.parametrize(("groups", "inner", "outer"), [(2, 3, 2), (4, 1, 1), (3, 1, 2)])
def test_grouped_and_depthwise_convolutions_have_a_gram_for_every_group(name, groups, inner, outer):
    spatial, how = geometry(name)
    x = draw(2, *spatial, groups * inner)
    y = outputs_for(how, spatial, 2, groups * outer)
    gram = conv_gram(x, y, **how, groups=groups, bias=True)
    for i in range(groups):
        own_x, own_y = x[..., i * inner : (i + 1) * inner], y[..., i * outer : (i + 1) * outer]
        assert_same(group(gram, i), explicit(patches(own_x, **how), own_y, True))


def test_columns_are_ordered_like_the_rows_of_a_kernel():
    x, kernel = draw(2, 7, 6, 3), draw(3, 2, 3, 4, seed=1)
    how = {"strides": (2, 1), "padding": ((1, 0), (1, 1)), "dilation": (1, 2)}
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        how["strides"],
        how["padding"],
        rhs_dilation=how["dilation"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    gram = conv_gram(x, y, window=(3, 2), **how, bias=False)
    np.testing.assert_allclose(np.asarray(gram.inputs) @ kernel.reshape(-1, 4), gram.cross, atol=1e-4)


def test_both_ways_through_a_convolution_agree(case):
    spatial, how = case
    how["strides"] = (1,) * len(spatial)
    window = Window(*how.values())
    x, y = draw(3, *spatial, 2), outputs_for(how, spatial, 3, 4)
    with jax.enable_x64(True):
        found = (jax.jit(way, static_argnums=2)(x, y, window) for way in (patch_sums, shift_sums))
        one, two = (sums._replace(inputs=products.whole(sums.inputs)) for sums in found)
    scale = np.abs(one.inputs).max()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("chunk", [100, 2**22])
def test_wide_layers_take_shifts_and_give_the_same(chunks_of, chunk):
    chunks_of(chunk)
    how = {"window": (3, 3), "strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    x, y = draw(3, 14, 14, 64), draw(3, 14, 14, 2, seed=1)
    assert _is_shiftable(Window(*how.values()), (14, 14), 64)
    assert not _is_shiftable(Window(*how.values()), (14, 14), 4)
    assert not _is_shiftable(Window(*how.values())._replace(strides=(2, 2)), (14, 14), 64)
    assert_same(conv_gram(x, y, **how, bias=True), explicit(patches(x, **how), y, True))


# some positions


def test_picked_positions_are_equally_likely_and_spread():
    with jax.enable_x64(True):
        picks = np.asarray(pick_positions(jax.random.key(0), 20000, 7, 3))
    np.testing.assert_allclose(np.bincount(picks.ravel(), minlength=7) / 20000, 3 / 7, atol=0.02)
    assert (np.diff(picks, axis=1) >= 0).all()
    assert len(np.unique(picks, axis=0)) > 10


@pytest.mark.parametrize(("name", "groups"), [("1-d", 1), ("2-d, asymmetric", 1), ("2-d, dilated", 2), ("3-d", 1)])
def test_the_mean_over_positions_has_the_right_expectation(name, groups):
    spatial, how = geometry(name)
    x = draw(1, *spatial, 2)
    y = outputs_for(how, spatial, 1, 2)
    whole = conv_gram(x, y, **how, groups=groups, bias=True)
    count = max(1, whole.rows // 3)
    copies = 4000
    many = [np.broadcast_to(v, (copies, *v.shape[1:])) for v in (x, y)]
    some = conv_gram(*many, **how, groups=groups, bias=True, positions=count, key=jax.random.key(1))
    assert (some.rows, some.samples) == (copies * min(count, whole.rows), copies)
    for name in FIELDS:
        exact, found = (np.asarray(getattr(g, name)) / g.rows for g in (whole, some))
        np.testing.assert_allclose(found, exact, atol=0.12 * np.abs(exact).max())


def test_every_picked_row_is_a_true_row():
    how = {"window": (3, 3), "strides": (2, 1), "padding": ((1, 1), (0, 2)), "dilation": (1, 1)}
    x, y = draw(1, 5, 6, 2), draw(1, 3, 6, 1, seed=1)
    rows = patches(x, **how).astype(np.float64)
    for seed in range(20):
        gram = conv_gram(x, y, **how, bias=False, positions=1, key=jax.random.key(seed))
        distances = [np.abs(np.outer(r, r) - np.asarray(gram.inputs)).max() for r in rows]
        at = int(np.argmin(distances))
        assert distances[at] < 1e-12
        np.testing.assert_allclose(np.ravel(gram.cross), rows[at] * y.ravel()[at], atol=1e-12)


def test_as_many_positions_as_there_are_means_all():
    how = {"window": (3,), "strides": (1,), "padding": ((1, 1),), "dilation": (1,), "bias": True}
    x, y = draw(2, 6, 3), draw(2, 6, 2, seed=1)
    assert_same(conv_gram(x, y, **how, positions=6), conv_gram(x, y, **how))


# files


def test_grams_come_back_from_a_file(tmp_path):
    grams = {
        "a/kernel": dot_gram(draw(5, 3), draw(5, 2, seed=1), bias=True),
        "b": dot_gram(draw(2, 5, 3), draw(2, 5, 2, seed=1), bias=False, batched=True),
    }
    save_grams(tmp_path / "grams.safetensors", grams, {"data": "five rows"})
    back, metadata = load_grams(tmp_path / "grams.safetensors")
    assert metadata == {"data": "five rows"}
    assert list(back) == list(grams)
    for leaf, gram in grams.items():
        assert_same(back[leaf], gram, rtol=0)
        assert back[leaf].samples == 5
    assert_same(back["b"] + grams["b"], grams["b"] + grams["b"])


def test_files_of_others_are_refused(tmp_path):
    save_file({"w": draw(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("model", "text"):
        with raises(f"{name}.safetensors' holds no Grams"):
            load_grams(tmp_path / f"{name}.safetensors")


def test_damaged_grams_are_refused(tmp_path):
    gram = dot_gram(draw(5, 3), draw(5, 2, seed=1), bias=True)
    save_grams(tmp_path / "whole", {"w": gram})
    with safe_open(tmp_path / "whole", "np") as handle:
        arrays, header = load_file(tmp_path / "whole"), handle.metadata()
    damage = {
        "leaf 'w' do not fit together": {"targets/w": np.zeros(7)},
        "Activations of leaf 'w' are not finite": {"inputs/w": arrays["inputs/w"] * np.nan},
        "leaf 'w' is not float64": {"cross/w": arrays["cross/w"].astype(np.float32)},
        "cross/w": {"cross/w": None},
    }
    for message, change in damage.items():
        kept = {name: array for name, array in (arrays | change).items() if array is not None}
        save_file(kept, tmp_path / "broken", metadata=header)
        with raises(f"broken' holds no Grams of permjax .*{message}"):
            load_grams(tmp_path / "broken")


# bad input


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_activations_that_are_not_finite_are_refused_by_name(value, side):
    arrays = [draw(4, 6, 2), draw(4, 6, 2, seed=1)]
    arrays[side][2, 3, 1] = value
    with raises("Activations of 'fc1' are not finite"):
        dot_gram(*arrays, bias=False, what="'fc1'")
    with raises("Activations of 'conv1' are not finite"):
        conv_gram(*arrays, window=(3,), strides=(1,), padding=((1, 1),), dilation=(1,), bias=True, what="'conv1'")


def test_grams_from_inside_jit_can_be_checked_later():
    gram = jax.jit(lambda x, y: dot_gram(x, y, bias=False))(np.full((2, 2), np.nan, np.float32), draw(2, 1))
    with raises("Activations of 'fc1'"):
        check_finite(gram, "'fc1'")


def test_sizes_that_do_not_fit_are_refused_by_name():
    how = {"strides": (1,), "padding": ((1, 1),), "dilation": (1,), "bias": True, "what": "'conv1'"}
    with raises(r"'fc1' must have the same samples and positions.*\(4, 3\) and \(4, 2\)"):
        dot_gram(draw(4, 3, 2), draw(4, 2, 2), bias=True, what="'fc1'")
    with raises("'fc1' must have .* one or more"):
        dot_gram(draw(0, 2), draw(0, 2), bias=True, what="'fc1'")
    with raises(r"'conv1' must have .*\(4, 6\) and \(4, 5\)"):
        conv_gram(draw(4, 6, 2), draw(4, 5, 2), window=(3,), **how)
    with raises("'conv1' have 1 spatial axes"):
        conv_gram(draw(4, 6, 2), draw(4, 6, 2), window=(3, 3), **how)
    with raises("'conv1' do not split into 4 groups"):
        conv_gram(draw(4, 6, 2), draw(4, 6, 2), window=(3,), groups=4, **how)
    with raises("positions of 'conv1' takes a key"):
        conv_gram(draw(4, 6, 2), draw(4, 6, 2), window=(3,), positions=2, **how)


def test_grams_of_different_layers_do_not_add():
    one, other = dot_gram(draw(4, 3), draw(4, 2), bias=True), dot_gram(draw(4, 4), draw(4, 2), bias=False)
    with raises("belong to different layers"):
        one + other
