"""Input alignment against plain NumPy, for dense, convolutional and stacked layers; the output bound is a bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ortho_group

from permjax.lmc.inputs import input_alignment, output_gap_bound
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# inputs along singular vectors


def test_dense_layers_agree_with_numpy_over_batches_of_any_size():
    params = {"a": normal(6, 9), "b": normal(9, 4)}
    x = normal(50, 6)

    def apply(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    spec = trace_spec(apply, params, x[:2])
    found = input_alignment(apply, spec, params, [x[:20], x[20:23], (x[23:],)])
    for name, z in (("a", x), ("b", np.maximum(x @ params["a"], 0))):
        u, s, _ = np.linalg.svd(params[name], full_matrices=False)
        z = z[np.linalg.norm(z, axis=1) > 0]
        wanted = np.abs(z @ u) / np.linalg.norm(z, axis=1, keepdims=True)
        np.testing.assert_allclose(found.alignment[name], wanted.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.singular_values[name], s, rtol=1e-5)


def test_inputs_along_one_singular_vector_excite_only_that_and_zero_inputs_do_not_count():
    params = {"w": normal(6, 4)}

    def apply(p, x):
        return x @ p["w"]

    vectors = np.linalg.svd(params["w"])[0]
    x = np.stack([-3 * vectors[:, 1], 0 * vectors[:, 1], 0.1 * vectors[:, 1]])
    spec = trace_spec(apply, params, x[:2])
    np.testing.assert_allclose(input_alignment(apply, spec, params, [x]).alignment["w"], [0, 1, 0, 0], atol=1e-6)
    assert not input_alignment(apply, spec, params, [0 * x]).alignment["w"].any()


def test_a_convolution_agrees_with_its_patches():
    params = {"conv": normal(3, 3, 2, 5), "head": normal(5, 3)}
    x = normal(4, 6, 6, 2)

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "VALID", dimension_numbers=numbers)
        return jax.nn.relu(y).mean(axis=(1, 2)) @ p["head"]

    spec = trace_spec(apply, params, x[:2])
    found = input_alignment(apply, spec, params, [x[:2], x[2:]])
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))  # [n, y, x, in, ky, kx]
    z = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 18)
    _, s, vt = np.linalg.svd(params["conv"].reshape(18, 5).T, full_matrices=False)
    along = np.abs(z @ vt.T)
    wanted = (along / np.linalg.norm(along, axis=1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.alignment["conv"], wanted, rtol=1e-4)
    np.testing.assert_allclose(found.singular_values["conv"], s, rtol=1e-5)


def test_a_layer_inside_a_scan_gets_one_row_for_every_step():
    params = {"loop": normal(3, 4, 4)}
    x = normal(10, 4)

    def apply(p, x):
        return jax.lax.scan(lambda z, w: (jnp.tanh(z @ w), None), x, p["loop"])[0]

    spec = trace_spec(apply, params, x[:2])
    found = input_alignment(apply, spec, params, [x]).alignment["loop"]
    assert found.shape == (3, 4)
    z = x
    for layer, w in zip(found, params["loop"], strict=True):
        u = np.linalg.svd(w)[0]
        np.testing.assert_allclose(layer, (np.abs(z @ u) / np.linalg.norm(z, axis=1, keepdims=True)).mean(0), rtol=1e-4)
        z = np.tanh(z @ w)


def test_a_leaf_used_twice_has_two_entries_and_grouped_convolutions_have_none():
    params = {"square": normal(4, 4), "depthwise": normal(1, 1, 1, 4), "head": normal(4, 2)}
    x = normal(3, 5, 5, 4)

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jnp.tanh(jnp.tanh(x @ p["square"]) @ p["square"])
        x = jax.lax.conv_general_dilated(
            x, p["depthwise"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )
        return x.mean(axis=(1, 2)) @ p["head"]

    spec = trace_spec(apply, params, x[:2])
    assert [*input_alignment(apply, spec, params, [x]).alignment] == ["square", "square'", "head"]
    assert [*input_alignment(apply, spec, params, [x], "h*").alignment] == ["head"]


def test_without_data_or_leaves_it_is_refused():
    params = {"w": normal(3, 2)}

    def apply(p, x):
        return x @ p["w"]

    spec = trace_spec(apply, params, normal(2, 3))
    with pytest.raises(ValueError, match="no batch"):
        input_alignment(apply, spec, params, [])
    with pytest.raises(ValueError, match="No leaf that matches 'x'"):
        input_alignment(apply, spec, params, [normal(2, 3)], "x")


# the output bound


def layer(seed, left, right, s):
    """A matrix of given singular values, its vectors near the first columns of `left` and `right`."""
    rng = np.random.default_rng(seed)
    q = [np.linalg.qr(side + 0.1 * rng.standard_normal(side.shape))[0] for side in (left, right)]
    return q[0] * s @ q[1].T


S = 0.7 ** np.arange(8)
Z = np.random.default_rng(3).standard_normal((40, 8))


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_of_two_layers_never_exceeds_its_bound(seed):
    rng = np.random.default_rng(seed)
    left, right = (ortho_group.rvs(8, random_state=seed + i) for i in (0, 100))
    a = left * S @ right.T
    for b in (rng.standard_normal((8, 8)), layer(seed, left, right, S), -a):
        for k in (0, 1, 3, 8):
            gap = np.linalg.norm(np.maximum(Z @ a.T, 0) - np.maximum(Z @ b.T, 0), axis=1)
            assert (gap <= output_gap_bound(a, b, Z, k) + 1e-12).all()
            half = np.linalg.norm(np.tanh(Z @ a.T / 2) - np.tanh(Z @ b.T / 2), axis=1)
            assert (half <= output_gap_bound(a, b, Z, k, 0.5) + 1e-12).all()


def test_with_all_directions_the_bound_of_a_linear_layer_is_exact_and_with_none_it_knows_norms_only():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 8))
    np.testing.assert_allclose(output_gap_bound(a, b, Z, 5), np.linalg.norm(Z @ (a - b).T, axis=1))
    norms = [np.linalg.norm(Z @ w.T, axis=1) for w in (a, b)]
    np.testing.assert_allclose(output_gap_bound(a, b, Z, 0), sum(norms))
    np.testing.assert_allclose(output_gap_bound(a, a, Z, 5), 0, atol=1e-12)


def test_the_dominant_part_is_the_double_sum_over_singular_triplets():
    a, b = np.random.default_rng(1).standard_normal((2, 6, 8))
    (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(w, full_matrices=False) for w in (a, b))
    x, y, k = Z @ va.T * sa, Z @ vb.T * sb, 3
    cross = np.einsum("si,sj,ij->s", x[:, :k], y[:, :k], (ua.T @ ub)[:k, :k])
    dominant = np.sqrt((x[:, :k] ** 2 + y[:, :k] ** 2).sum(1) - 2 * cross)
    rest = np.sqrt((x[:, k:] ** 2).sum(1)) + np.sqrt((y[:, k:] ** 2).sum(1))
    np.testing.assert_allclose(output_gap_bound(a, b, Z, k), dominant + rest, rtol=1e-9)


def test_aligning_the_dominant_directions_lowers_the_bound_and_aligning_the_others_does_not():
    def turned(start, stop, seed):
        """A rotation of all directions but some."""
        q, others = np.eye(8), [i for i in range(8) if not start <= i < stop]
        q[np.ix_(others, others)] = ortho_group.rvs(len(others), random_state=seed)
        return q

    def bound(*aligned):
        layers = [turned(*aligned, i) * S @ turned(*aligned, i + 100).T for i in range(20)]
        return np.mean([output_gap_bound(np.diag(S), b, Z, 3) for b in layers])

    nothing, top, rest = bound(0, 0), bound(0, 3), bound(5, 8)
    assert top < 0.5 * nothing
    assert 0.95 < rest / nothing < 1.05


def test_directions_that_no_input_excites_do_not_matter():
    a = np.diag(S)
    b = np.diag(np.where(np.arange(8) < 4, S, -S))
    z = Z * (np.arange(8) < 4)
    np.testing.assert_allclose(output_gap_bound(a, b, z, 4), 0, atol=1e-9)
    assert output_gap_bound(a, b, Z, 4).min() > 0
