"""Gram matrices of blocks: each is the objective's slope in one place of a group."""

import jax
import ml_dtypes
import numpy as np
import pytest

from permjax.match import costs
from permjax.match.costs import bend, gap, gram, growth, inner, is_root, roots, terms
from permjax.symmetry.blocks import extract, move, unfold
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_inner_product_is_taken_in_float64():
    a = np.float32([1e4, 1e-4, -1e4, 1e-4])
    assert inner(a, np.ones(4, np.float32)) == pytest.approx(2e-4, rel=1e-7)
    with jax.enable_x64(True):
        assert float(inner(jax.numpy.asarray(a), jax.numpy.ones(4, np.float32))) == pytest.approx(2e-4, rel=1e-7)


def test_a_gram_matrix_pairs_free_axes_and_keeps_batch_axes():
    a, b = draw((2, 3, 4, 5), 1), draw((2, 3, 4, 5), 2)
    np.testing.assert_allclose(gram(a, b, (), (2,)), np.einsum("abic,abjc->ij", a, b), rtol=1e-4, atol=1e-4)
    expected = np.einsum("aibj,aIbJ->bijIJ", a, b)
    np.testing.assert_allclose(gram(a, b, (2,), (1, 3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("batch", "free"), [((), (0,)), ((), (1,)), ((), (2,)), ((0,), (2,)), ((2,), (0, 1)), ((), (0, 2))]
)
def test_a_gram_matrix_does_not_depend_on_how_a_block_is_cut_or_laid_out(batch, free, dtype, monkeypatch):
    a, b = (draw((4, 5, 6), seed).astype(dtype) for seed in (1, 2))
    letters, other = "abc", "".join("abcABC"[3 + i if i in free else i] for i in range(3))
    out = "".join("abc"[i] for i in (*batch, *free)) + "".join("ABC"[i] for i in free)
    expected = np.einsum(f"{letters},{other}->{out}", a.astype(np.float64), b.astype(np.float64))
    whole = gram(a, b, batch, free)
    monkeypatch.setattr(costs, "_SLAB", 1)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gram(a, b, batch, free), expected, rtol=1e-5, atol=1e-5)


def test_a_gap_is_the_squared_distance():
    a, b = draw((3, 5000), 1), draw((3, 5000), 2)
    expected = float(np.square(a.astype(np.float64) - b).sum())
    assert gap(a, b) == pytest.approx(expected, rel=1e-12)
    assert gap(a, a) == 0
    with jax.enable_x64(True):
        assert float(gap(jax.numpy.asarray(a), jax.numpy.asarray(b))) == pytest.approx(expected, rel=1e-12)


def test_terms_tell_whether_what_is_held_lies_beside_what_is_free():
    axes = {"square": ("head", "in", "in"), "map": ("head", "in", None)}
    spec = PermutationSpec.from_axes({"square": (2, 3, 3), "map": (2, 3, 4)}, axes, per={"in": ("head",)})
    blocks = unfold(spec, ("square", "map"))
    assert [(t.block, t.apart) for t in terms(spec, blocks, "head")] == [(0, False), (0, False), (1, True)]


def test_the_trace_of_every_gram_matrix_is_the_inner_product(network, draw_params):
    a, b = draw_params(network, 1), draw_params(network, 2)
    blocks = unfold(network, tuple(leaf.name for leaf in network.leaves))
    for group in (g.name for g in network.groups if is_root(network, g.name)):
        for term in terms(network, blocks, group):
            x, y = (blocks_of(blocks[term.block], model) for model in (a, b))
            values = gram(x, y, term.batch, term.free)
            half = len(term.free)
            size = int(np.prod(values.shape[len(term.batch) : -half]))
            trace = values.reshape(-1, size, size).trace(axis1=1, axis2=2).sum()
            assert trace == pytest.approx(float(inner(x, y)), rel=1e-4, abs=1e-3)


def blocks_of(block, model):
    return extract(block, model[block.leaf])


def test_every_place_of_a_root_is_one_term(networks):
    spec = networks["recurrent"]
    blocks = unfold(spec, ("in", "loop", "out"))
    found = list(terms(spec, blocks, "h"))
    assert [(blocks[t.block].leaf, t.free) for t in found] == [
        ("in", (1,)),
        ("loop", (0,)),
        ("loop", (1,)),
        ("out", (0,)),
    ]
    assert [t.held for t in found] == [set(), {"h"}, {"h"}, set()]


def test_groups_below_stand_in_the_terms_of_their_root(networks):
    spec = networks["grouped queries"]
    blocks = unfold(spec, ("q", "k"))
    names = [tuple(blocks[t.block].names[i] for i in t.free) for t in terms(spec, blocks, "kv")]
    assert names == [("kv", "q", "qk"), ("kv", "qk")]
    assert all(t.held == {"res"} for t in terms(spec, blocks, "kv"))


def test_roots_are_what_no_free_group_indexes(zoo):
    spec = zoo["stacked layers"]
    assert {g.name for g in spec.groups if is_root(spec, g.name)} == {"ff", "head", "res"}
    assert roots(spec, "vo") == {"head"}
    assert roots(zoo["outer groups in another order"], "in") == {"x", "y"}


def test_the_gain_of_a_swap_is_linear_part_plus_bend():
    a, b = draw((2, 5, 5, 3), 1), draw((2, 5, 5, 3), 2)
    slope = gram(a, b, (0,), (1,)) + gram(a, b, (0,), (2,))
    curved = bend(a, b, (0,), (1, 2))
    order = np.array([0, 3, 2, 1, 4])
    for layer in range(2):
        linear = slope[layer, 1, 3] + slope[layer, 3, 1] - slope[layer, 1, 1] - slope[layer, 3, 3]
        swapped = b[layer][order][:, order]
        gain = (a[layer] * (swapped - b[layer])).sum()
        assert linear + curved[layer, 1, 3] == pytest.approx(gain, rel=1e-3)


def test_growth_starts_where_most_is_known_and_goes_to_neighbours():
    parts = [
        (10, frozenset("a")),
        (30, frozenset("ab")),
        (30, frozenset("bc")),
        (9, frozenset("c")),
        (1, frozenset("d")),
    ]
    assert growth(parts) == ["d", "a", "b", "c"]


def test_growth_orders_groups_of_which_nothing_is_known():
    assert growth([(5, frozenset("ab")), (5, frozenset("bc"))]) == ["a", "b", "c"]


def test_moving_keeps_norms(network, draw_params, draw_permutations):
    a, order = draw_params(network), draw_permutations(network)
    for block in unfold(network, tuple(a)):
        x = blocks_of(block, a)
        assert inner(x, x) == pytest.approx(float(inner(*(move(block, order, x),) * 2)))
