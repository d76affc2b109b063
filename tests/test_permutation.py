"""Permutations: the group axioms, the gather convention, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax import permutation as pm
from permjax.symmetry.spec import Fixed, PermutationSpec

pytestmark = pytest.mark.fast

seeds = st.integers(0, 2**16)
CYCLE = np.asarray([1, 2, 3, 0], np.int32)  # a cycle of length four: not its own inverse


def assert_same(p, q):
    assert list(p) == list(q)
    for group in p:
        np.testing.assert_array_equal(p[group], q[group], err_msg=group)


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


@pytest.fixture
def wreath(zoo):
    return zoo["attention, fused and split"]


@pytest.fixture
def two():
    return PermutationSpec.from_axes({"w": (4, 3)}, {"w": ("rows", "columns")})


# axioms


@given(seed=seeds)
def test_composition_is_associative(zoo_spec, draw_permutations, seed):
    p, q, r = (draw_permutations(zoo_spec, seed + i) for i in range(3))
    left = pm.compose(zoo_spec, pm.compose(zoo_spec, p, q), r)
    assert_same(left, pm.compose(zoo_spec, p, pm.compose(zoo_spec, q, r)))


@given(seed=seeds)
def test_identity_is_neutral_and_the_inverse_inverts_on_both_sides(zoo_spec, draw_permutations, seed):
    p, one = draw_permutations(zoo_spec, seed), pm.identity(zoo_spec)
    inverse = pm.invert(zoo_spec, p)
    assert_same(pm.compose(zoo_spec, p, one), p)
    assert_same(pm.compose(zoo_spec, one, p), p)
    assert_same(pm.compose(zoo_spec, p, inverse), one)
    assert_same(pm.compose(zoo_spec, inverse, p), one)
    assert_same(pm.invert(zoo_spec, inverse), p)


@given(seed=seeds)
def test_the_inverse_of_a_composition_is_the_composition_of_inverses_turned_round(zoo_spec, draw_permutations, seed):
    p, q = draw_permutations(zoo_spec, seed), draw_permutations(zoo_spec, seed + 1)
    swapped = pm.compose(zoo_spec, pm.invert(zoo_spec, q), pm.invert(zoo_spec, p))
    assert_same(pm.invert(zoo_spec, pm.compose(zoo_spec, p, q)), swapped)


def test_a_cycle_of_length_three_is_no_involution_and_has_order_three(wreath):
    p = {**pm.identity(wreath), "head": np.asarray([1, 2, 0], np.int32)}
    square = pm.compose(wreath, p, p)
    assert_same(pm.invert(wreath, p), square)
    assert square["head"].tolist() == [2, 0, 1]
    assert_same(pm.compose(wreath, p, square), pm.identity(wreath))


def test_composition_gathers_by_the_second_argument_first(two):
    p = {"rows": CYCLE, "columns": np.asarray([1, 2, 0], np.int32)}
    q = {"rows": np.asarray([1, 0, 2, 3], np.int32), "columns": np.asarray([0, 2, 1], np.int32)}
    composed = pm.compose(two, p, q)
    for group in p:
        np.testing.assert_array_equal(composed[group], [q[group][i] for i in p[group]])
    assert composed["rows"].tolist() != pm.compose(two, q, p)["rows"].tolist()


def test_rows_of_a_per_group_are_indexed_by_the_target_of_its_outer_group(wreath, draw_permutations):
    p, q = draw_permutations(wreath, 1), draw_permutations(wreath, 2)
    composed, inverse = pm.compose(wreath, p, q)["qk"], pm.invert(wreath, p)
    for h in range(3):
        np.testing.assert_array_equal(composed[h], q["qk"][p["head"][h]][p["qk"][h]])
        np.testing.assert_array_equal(inverse["qk"][h], np.argsort(p["qk"][inverse["head"][h]]))


def test_a_group_per_a_fixed_index_composes_row_by_row(zoo, draw_permutations):
    spec = zoo["stacked layers"]
    p, q = draw_permutations(spec, 1), draw_permutations(spec, 2)
    composed = pm.compose(spec, p, q)
    for layer in range(3):
        np.testing.assert_array_equal(composed["ff"][layer], q["ff"][layer][p["ff"][layer]])
        for h in range(3):
            source = q["vo"][layer, p["head"][layer, h]]
            np.testing.assert_array_equal(composed["vo"][layer, h], source[p["vo"][layer, h]])


# kinds, names, shapes


def test_numpy_stays_numpy_and_jax_stays_jax_with_equal_values(zoo, draw_permutations):
    spec = zoo["stacked layers"]
    p, q = draw_permutations(spec, 1), draw_permutations(spec, 2)
    on_device = [{g: jnp.asarray(v) for g, v in x.items()} for x in (p, q)]
    for f, host, device in ((pm.compose, (p, q), on_device), (pm.invert, (p,), on_device[:1])):
        a, b = f(spec, *host), f(spec, *device)
        assert_same(a, b)
        assert all(isinstance(v, np.ndarray) and v.dtype == np.int32 for v in a.values())
        assert all(isinstance(v, jax.Array) and v.dtype == np.int32 for v in b.values())


def test_groups_come_in_the_order_of_the_spec(zoo_spec, draw_permutations):
    order = [g.name for g in zoo_spec.groups]
    p = dict(reversed(draw_permutations(zoo_spec).items()))
    for found in (pm.identity(zoo_spec), pm.compose(zoo_spec, p, p), pm.invert(zoo_spec, p)):
        assert list(found) == order


def test_outer_first_puts_every_group_after_those_that_it_is_per(zoo_spec):
    order = pm.outer_first(zoo_spec)
    assert sorted(order) == sorted(g.name for g in zoo_spec.groups)
    for g in zoo_spec.groups:
        assert all(order.index(outer) < order.index(g.name) for outer in g.per if outer in zoo_spec)


def test_the_matrix_of_a_permutation_gathers_and_multiplies_like_it(two):
    q = np.asarray([2, 0, 1, 3], np.int32)
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    for backend in (np, jnp):
        p_matrix, q_matrix = pm.as_matrix(backend.asarray(CYCLE)), pm.as_matrix(backend.asarray(q))
        np.testing.assert_array_equal(p_matrix @ x, x[CYCLE])
        np.testing.assert_array_equal(p_matrix @ q_matrix, pm.as_matrix(q[CYCLE]))
        np.testing.assert_array_equal(p_matrix.T, pm.as_matrix(np.argsort(CYCLE).astype(np.int32)))
    many = pm.as_matrix(np.stack([CYCLE, q]))
    np.testing.assert_array_equal(many[1], pm.as_matrix(q))


# drawing


def test_random_permutations_are_bijections_and_repeat_with_the_key(zoo):
    spec = zoo["stacked layers"]
    drawn = pm.random_permutations(spec, jax.random.key(3))
    pm.validate(spec, drawn)
    assert_same(drawn, pm.random_permutations(spec, jax.random.key(3)))
    assert all(v.dtype == jnp.int32 for v in drawn.values())


def test_a_draw_depends_on_the_key_and_the_name_of_the_group_only():
    one, other = ({"w": (32, 7), "v": (32, 32)}, {"v": (32, 32), "u": (32,)})
    a = PermutationSpec.from_axes(one, {"w": ("g", "h"), "v": ("k", "g")})
    b = PermutationSpec.from_axes(other, {"v": ("g", "k"), "u": ("a",)})
    p, q = (pm.random_permutations(spec, jax.random.key(5)) for spec in (a, b))
    np.testing.assert_array_equal(p["g"], q["g"])
    np.testing.assert_array_equal(p["k"], q["k"])
    assert p["g"].tolist() != p["k"].tolist()
    assert p["g"].tolist() != pm.random_permutations(a, jax.random.key(6))["g"].tolist()


def test_rows_of_a_per_group_are_drawn_independently(zoo):
    rows = pm.random_permutations(zoo["stacked layers"], jax.random.key(1))["ff"]
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_every_permutation_of_three_units_is_drawn_about_equally_often():
    spec = PermutationSpec.from_axes({"w": (3,)}, {"w": ("g",)})
    draw = jax.vmap(lambda key: pm.random_permutations(spec, key)["g"])
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 1200)))
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 140  # 200 expected, standard deviation 13


def test_the_laws_hold_under_jit_and_vmap(zoo):
    spec = zoo["outer groups in another order"]

    def loop(key):
        p = pm.random_permutations(spec, key)
        return pm.compose(spec, pm.invert(spec, p), p)

    found = jax.jit(jax.vmap(loop))(jax.random.split(jax.random.key(0), 3))
    for group, rows in pm.identity(spec).items():
        np.testing.assert_array_equal(found[group], np.broadcast_to(rows, (3, *rows.shape)))


def test_traced_and_concrete_groups_may_be_mixed(wreath, draw_permutations):
    p = draw_permutations(wreath, 4)

    @jax.jit
    def both(head):
        mixed = {**p, "head": head}
        return pm.invert(wreath, mixed), pm.compose(wreath, mixed, p)

    for found, expected in zip(both(p["head"]), (pm.invert(wreath, p), pm.compose(wreath, p, p)), strict=True):
        assert_same({g: found[g] for g in expected}, expected)


# bad input


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        (np.asarray([0, 1, 2, 4]), r"'rows' holds 4, outside 0\.\.3"),
        (np.asarray([0, 1, -1, 3]), r"'rows' holds -1, outside 0\.\.3"),
        (np.asarray([0, 2, 2, 3]), "'rows' is no bijection: 2 appears 2 times, 1 never"),
        (np.asarray([0, 1, 2]), r"'rows' has shape \(3,\), the spec expects \(4,\)"),
        (np.asarray([[0, 1, 2, 3]]), r"'rows' has shape \(1, 4\)"),
        (np.asarray([0.0, 1, 2, 3]), "'rows' must be an integer array"),
        ([0, 1, 2, 3], "'rows' must be an integer array, not list"),
        (np.eye(4, dtype=bool)[0], "'rows' must be an integer array"),
    ],
)
@pytest.mark.parametrize("f", [pm.validate, pm.invert, lambda s, p: pm.compose(s, p, pm.identity(s))])
def test_what_is_no_bijection_is_refused_by_the_name_of_its_group(two, rows, pattern, f):
    with raises(pattern):
        f(two, {**pm.identity(two), "rows": rows})


def test_missing_and_unknown_groups_are_named(two):
    with raises(r"missing \['columns'\], unknown \[\]"):
        pm.validate(two, {"rows": CYCLE})
    with raises(r"missing \[\], unknown \['row'\]"):
        pm.validate(two, {**pm.identity(two), "row": CYCLE})


def test_one_bad_row_among_the_rows_of_a_per_group_is_found(wreath):
    p = pm.identity(wreath)
    p["qk"][2] = [0, 1, 1, 3]
    with raises("'qk' is no bijection: 1 appears 2 times, 2 never"):
        pm.validate(wreath, p)


def test_under_a_trace_names_shapes_and_dtypes_are_still_checked(two):
    check = lambda p: pm.validate(two, p)  # noqa: E731
    jax.eval_shape(check, pm.identity(two))
    jax.eval_shape(check, {**pm.identity(two), "rows": np.asarray([0, 0, 0, 9])})
    with raises(r"'rows' has shape \(3,\)"):
        jax.eval_shape(check, {**pm.identity(two), "rows": CYCLE[:3]})
    with raises("integer"):
        jax.eval_shape(check, {**pm.identity(two), "rows": np.ones(4, np.float32)})


def test_a_spec_without_groups_has_only_the_empty_permutation():
    none = PermutationSpec.from_axes({"w": (2,)}, {"w": (Fixed(2, "an input"),)})
    assert pm.identity(none) == pm.invert(none, {}) == pm.compose(none, {}, {}) == {}
