"""The geometry of merged networks: owners, views and means against what they mean unit by unit."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.merge.partial import partial_plan, widenable
from permjax.merge.wide import Wide, groups_of, mean_units, pick, resized
from permjax.plan import Plan
from permjax.symmetry.spec import Fixed, Of, PermutationSpec, Product, Sum

pytestmark = pytest.mark.fast

SPEC = PermutationSpec.from_axes({"w": (3, 6), "b": (6,), "v": (6, 4)}, {"w": ("a", "b"), "b": ("b",), "v": ("b", "c")})


def clustered(spec: PermutationSpec, models: int, seed: int) -> Plan:
    """Any labels at all: some wide units have no owner, some several units of one model."""
    rng = np.random.default_rng(seed)
    plain = partial_plan(spec, {}, models=models)
    labels, widths = dict(plain.labels), dict(plain.widths)
    for group in widenable(spec):
        size = spec.group(group).size
        widths[group] = size + int(rng.integers(0, 4))
        labels[group] = tuple(rng.integers(0, widths[group], size).astype(np.int32) for _ in range(models))
    return Plan(labels, widths, plain.per)


def axes_of(spec: PermutationSpec):
    return list(dict.fromkeys(axis for leaf in spec.leaves for axis in leaf.axes))


def labelled(wide: Wide, axis, model: int) -> list:
    """What stands at every position of a model's axis, as nested tuples of (group, wide unit)."""
    match axis:
        case Fixed(size):
            return [("fixed", i) for i in range(size)]
        case Of(group):
            widened = group in wide.spec and not wide.spec.group(group).per
            size = wide.spec.group(group).size
            return [(group, int(i)) for i in (wide.plan.labels[group][model] if widened else range(size))]
        case Product(factors):
            found: list = [()]
            for factor in factors:
                found = [(*a, b) for a in found for b in labelled(wide, factor, model)]
            return found
        case Sum(segments):
            return [(i, x) for i, segment in enumerate(segments) for x in labelled(wide, segment, model)]


def positions(wide: Wide, axis) -> list:
    """What stands at every position of the wide axis."""
    match axis:
        case Fixed(size):
            return [("fixed", i) for i in range(size)]
        case Of(group):
            return [(group, i) for i in range(wide.wide_spec.group(group).size)]
        case Product(factors):
            found: list = [()]
            for factor in factors:
                found = [(*a, b) for a in found for b in positions(wide, factor)]
            return found
        case Sum(segments):
            return [(i, x) for i, segment in enumerate(segments) for x in positions(wide, segment)]


@pytest.mark.parametrize("models", [2, 3])
def test_every_unit_is_found_where_its_label_says(zoo_spec, models):
    wide = Wide(zoo_spec, clustered(zoo_spec, models, models))
    for axis in axes_of(zoo_spec):
        places, owners = positions(wide, axis), wide.owners(axis)
        assert len(places) == wide.wide_spec.size(axis) == owners.shape[1]
        for m in range(models):
            names, index = labelled(wide, axis, m), wide.index(axis, m)
            assert [places[i] for i in index] == names
            assert {i for i, here in enumerate(owners[m]) if here} == set(index.tolist())


@pytest.mark.parametrize("models", [2, 3])
def test_segments_divide_what_somebody_owns(zoo_spec, models):
    wide = Wide(zoo_spec, clustered(zoo_spec, models, models + 5))
    for axis in axes_of(zoo_spec):
        owners, segments = wide.owners(axis), wide.segments(axis)
        together = np.concatenate([s.positions for s in segments])
        assert sorted(together) == np.flatnonzero(owners.any(0)).tolist()
        for segment in segments:
            assert (owners[:, segment.positions] == np.asarray(segment.owners)[:, None]).all()
            assert (np.diff(segment.positions) > 0).all()
        counts = [sum(s.owners) for s in segments]
        assert counts == sorted(counts, reverse=True)
        assert len({s.owners for s in segments}) == len(segments)


def test_shared_units_come_first_then_those_of_each_model():
    wide = Wide(SPEC, partial_plan(SPEC, {"b": 2}))
    assert [(s.owners, s.positions.tolist()) for s in wide.segments(Of("b"))] == [
        ((True, True), [0, 1]),
        ((True, False), [2, 3, 4, 5]),
        ((False, True), [6, 7, 8, 9]),
    ]
    assert wide.widened == {"b"}
    assert wide.views == (0, 1)
    assert wide.wide_spec.leaf("w").shape == (3, 10)
    assert [source.leaf("w").shape for source in wide.sources] == [(3, 6), (3, 6)]


def test_views_of_wide_leaves_are_gathered_on_every_axis(zoo_spec):
    wide, rng = Wide(zoo_spec, clustered(zoo_spec, 2, 3)), np.random.default_rng(0)
    named = {leaf.name: rng.standard_normal(leaf.shape).astype(np.float32) for leaf in wide.wide_spec.leaves}
    views = jax.jit(lambda named: [{n: wide.view(n, m, x) for n, x in named.items()} for m in (0, 1)])(named)
    for leaf in zoo_spec.leaves:
        for m in (0, 1):
            expected = named[leaf.name][np.ix_(*(wide.index(axis, m) for axis in leaf.axes))]
            np.testing.assert_array_equal(views[m][leaf.name], expected)
            assert expected.shape == wide.sources[m].leaf(leaf.name).shape


def test_plain_merging_has_one_view_which_is_everything(zoo_spec):
    wide = Wide(zoo_spec, partial_plan(zoo_spec, {}, models=3))
    assert wide.views == (0,)
    assert not wide.widened
    assert wide.wide_spec == zoo_spec
    array = np.zeros(zoo_spec.leaves[0].shape)
    assert wide.view(zoo_spec.leaves[0].name, 2, array) is array


def test_labels_in_another_order_are_a_view_of_their_own():
    plan = partial_plan(SPEC, {})
    labels = {**plan.labels, "b": (np.arange(6), np.array([1, 0, 2, 3, 4, 5]))}
    assert Wide(SPEC, Plan(labels, plan.widths, plan.per)).widened == {"b"}


def test_models_may_have_groups_of_unlike_sizes():
    labels = {"a": (np.arange(3),) * 2, "b": (np.arange(6),) * 2, "c": (np.arange(4), np.arange(4, 9))}
    wide = Wide(SPEC, Plan(labels, {"a": 3, "b": 6, "c": 9}))
    assert [source.leaf("v").shape for source in wide.sources] == [(6, 4), (6, 5)]
    assert wide.wide_spec.leaf("v").shape == (6, 9)


# means and picks


def mean_by_hand(wide: Wide, axis, arrays, models) -> np.ndarray:
    size = wide.wide_spec.size(axis)
    total, count = np.zeros((arrays[0].shape[0], size, arrays[0].shape[2])), np.zeros(size)
    for array, m in zip(arrays, models, strict=True):
        for i, p in enumerate(wide.index(axis, m)):
            total[:, p] += array[:, i]
            count[p] += 1
    return total / np.maximum(count, 1)[None, :, None]


@pytest.mark.parametrize("models", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("name", ["attention, fused and split", "concatenation and grouped channels"])
def test_means_are_over_all_units_with_one_label(zoo, name, models):
    spec, rng = zoo[name], np.random.default_rng(1)
    half = partial_plan(spec, ratios=dict.fromkeys(widenable(spec), 0.5), models=3)
    cases = [(Wide(spec, plan), axis) for plan in (clustered(spec, 3, 4), half) for axis in axes_of(spec)]
    arrays = [[rng.standard_normal((2, spec.size(axis), 3)).astype(np.float32) for _ in models] for _, axis in cases]

    @jax.jit
    def means(arrays):
        pairs = zip(cases, arrays, strict=True)
        return [mean_units(wide, axis, [jnp.asarray(x) for x in xs], models, 1) for (wide, axis), xs in pairs]

    for (wide, axis), xs, found in zip(cases, arrays, means(arrays), strict=True):
        np.testing.assert_allclose(found, mean_by_hand(wide, axis, xs, models), rtol=1e-5, atol=1e-6)


def test_means_of_views_of_one_array_give_it_back():
    wide = Wide(SPEC, partial_plan(SPEC, ratios={"b": 0.5}, models=3))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, wide.wide_spec.group("b").size)), jnp.float32)
    views = [pick(x, wide.index(Of("b"), m), -1) for m in range(3)]
    np.testing.assert_allclose(mean_units(wide, Of("b"), views, range(3), -1), x, rtol=1e-6)
    swapped = [view.T for view in views]
    np.testing.assert_allclose(mean_units(wide, Of("b"), swapped, range(3), 0), x.T, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_means_keep_the_dtype_and_can_be_differentiated(dtype):
    wide = Wide(SPEC, partial_plan(SPEC, {"b": 3}))
    views = [jnp.ones((2, 6), dtype)] * 2

    def total(views):
        return mean_units(wide, Of("b"), views, (0, 1), -1).astype(jnp.float32).sum()

    assert mean_units(wide, Of("b"), views, (0, 1), -1).dtype == dtype
    gradient = jax.grad(total)(views)
    np.testing.assert_array_equal(gradient[0][0], [0.5, 0.5, 0.5, 1, 1, 1])


@given(picked=st.lists(st.integers(0, 11), min_size=15, max_size=15), runs=st.integers(0, 15))
def test_picking_is_taking(picked, runs):
    picked = [*picked[:runs], *range(max(0, runs - 3), 12)]  # single positions, then a run
    array = np.arange(144).reshape(12, 12)
    for place in (0, -1):
        found = pick(jnp.asarray(array), np.asarray(picked), place)
        np.testing.assert_array_equal(found, np.take(array, picked, axis=place))


def test_picking_everything_costs_nothing():
    array = jnp.ones((3, 4))
    assert pick(array, np.arange(4), 1) is array


# specs


def test_specs_are_resized_wherever_a_group_stands(zoo_spec):
    sizes = {name: 2 * zoo_spec.group(name).size for name in widenable(zoo_spec)}
    wide = resized(zoo_spec, sizes)
    for before, after in zip(zoo_spec.leaves, wide.leaves, strict=True):
        assert after.axes == before.axes
        assert after.shape == tuple(wide.size(axis) for axis in before.axes)
    assert {g.name: g.size for g in wide.groups} == {g.name: g.size for g in zoo_spec.groups} | sizes
    assert prod(wide.leaves[0].shape) > prod(zoo_spec.leaves[0].shape)
    assert resized(zoo_spec, {}) == zoo_spec


def test_groups_of_an_axis_are_all_that_stand_on_it():
    assert groups_of(Fixed(3)) == frozenset()
    assert groups_of(Sum((Product((Of("a"), Of("b"))), Fixed(2), Of("c")))) == {"a", "b", "c"}


def test_plans_that_do_not_fit_are_refused(zoo):
    plain = partial_plan(SPEC, {})
    with pytest.raises(ValueError, match="plan says nothing of group 'b'; make it for this spec"):
        Wide(SPEC, Plan({"a": plain.labels["a"]}, {"a": 3}))
    heads = zoo["attention, fused and split"]
    plan = partial_plan(heads, {})
    turned = {**plan.labels, "qk": tuple(rows[:, ::-1] for rows in plan.labels["qk"])}
    with pytest.raises(ValueError, match="moves units of 'qk' inside 'head'; only models that are already aligned"):
        Wide(heads, Plan(turned, plan.widths, plan.per))
