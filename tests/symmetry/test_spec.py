"""Specs: writing one by hand, looking into it, explaining it, and bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permjax.symmetry.spec import (
    Fixed,
    Group,
    Leaf,
    Member,
    Of,
    PermutationSpec,
    Product,
    Sum,
    axis_size,
    children,
    natural_key,
    walk,
)

pytestmark = pytest.mark.fast

SIZES = {"g": 3, "h": 2}
FUSED = Sum((Product((Of("g"), Of("h"))), Fixed(5, "the input"), Of("h")))
ends = st.one_of(st.builds(Fixed, st.integers(1, 4)), st.sampled_from([Of("g"), Of("h")]))
axes = st.recursive(
    ends,
    lambda inner: st.one_of(
        st.builds(Product, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Sum, st.lists(inner, min_size=1, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)


def raises(pattern: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=pattern)


@pytest.fixture
def spec():
    return PermutationSpec.from_axes(
        {"w": (4, 3), "b": (3,), "out": (6, 2), "mean": (3,), "table": (11,)},
        {"w": (None, "g"), "b": ("g",), "out": (Product((Of("g"), Of("h"))), None), "mean": ("g",)},
        sizes={"h": 2},
        per={"h": ("g",)},
        roles={"mean": "statistic", "table": "frozen"},
    )


# axis trees


@given(axis=axes)
def test_walking_an_axis_yields_every_end_with_the_path_that_leads_to_it(axis):
    found = list(walk(axis))
    for path, end in found:
        assert not children(end)
        node = axis
        for step in path:
            node = children(node)[step]
        assert node is end
    assert len({path for path, _ in found}) == len(found)
    assert [path for path, _ in found] == sorted(path for path, _ in found)


@given(axis=axes)
def test_the_size_of_a_product_multiplies_and_that_of_a_sum_adds(axis):
    inner = [axis_size(part, SIZES) for part in children(axis)]
    match axis:
        case Product():
            assert axis_size(axis, SIZES) == np.prod(inner)
        case Sum():
            assert axis_size(axis, SIZES) == sum(inner)
        case Of(group):
            assert axis_size(axis, SIZES) == SIZES[group]
        case Fixed(size):
            assert axis_size(axis, SIZES) == size


def test_the_reason_of_a_pinned_axis_does_not_enter_equality():
    assert Fixed(3, "an input") == Fixed(3, "an output")
    assert hash(Fixed(3, "an input")) == hash(Fixed(3))
    assert Fixed(3) != Fixed(4)


@given(numbers=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_natural_order_counts_numbers_as_numbers(numbers):
    names = [f"h.{n}.w" for n in numbers]
    assert sorted(names, key=natural_key) == [f"h.{n}.w" for n in sorted(numbers)]


def test_natural_order_puts_digits_before_letters_and_compares_any_two_names():
    names = ["h.10", "h.b", "h.2", "h", "10", "h.2.w", "2", "", "h.02"]
    ordered = sorted(names, key=natural_key)
    assert ordered[:3] == ["", "2", "10"]
    assert ordered.index("h.2") < ordered.index("h.10") < ordered.index("h.b")


# looking into a spec


def test_a_spec_written_by_hand_knows_groups_leaves_and_members(spec):
    assert spec.groups == (Group("g", 3), Group("h", 2, ("g",)))
    assert [leaf.name for leaf in spec.leaves] == ["w", "b", "out", "mean", "table"]
    assert spec.leaf("w") == Leaf("w", (4, 3), (Fixed(4), Of("g")))
    assert spec.leaf("table").axes == (Fixed(11),)
    assert spec.members("g") == (Member("w", 1, ()), Member("b", 0, ()), Member("out", 0, (0,)), Member("mean", 0, ()))
    assert spec.members("h") == (Member("out", 0, (1,)),)
    assert [spec.leaf(name).role for name in ("w", "mean", "table")] == ["weight", "statistic", "frozen"]
    assert "g" in spec
    assert "w" not in spec


def test_the_shape_of_a_permutation_is_the_sizes_of_its_outer_groups_then_its_own(spec, zoo):
    assert spec.shape("g") == (3,)
    assert spec.shape("h") == (3, 2)
    assert zoo["stacked layers"].shape("vo") == (3, 3, 2)
    assert zoo["outer groups in another order"].shape("in") == (2, 3, 4, 3)


def test_members_of_a_group_on_two_axes_of_one_leaf_are_listed_one_by_one(zoo):
    expected = (Member("square", 0, ()), Member("square", 1, ()), Member("cube", 0, ()), Member("cube", 2, ()))
    assert zoo["same group on two axes"].members("h")[:4] == expected


def test_groups_come_in_natural_order_of_their_names():
    shapes = {f"w{i}": (2,) for i in (10, 9, 1)}
    spec = PermutationSpec.from_axes(shapes, {name: (f"layer.{name[1:]}",) for name in shapes})
    assert [g.name for g in spec.groups] == ["layer.1", "layer.9", "layer.10"]
    assert [leaf.name for leaf in spec.leaves] == ["w10", "w9", "w1"]


def test_equal_specs_are_equal_hash_alike_and_stay_static(spec):
    again = PermutationSpec(spec.groups, spec.leaves, spec.indices, unverified=("g",))
    assert again == spec
    assert hash(again) == hash(spec)
    assert PermutationSpec(spec.groups, spec.leaves[:-1]) != spec
    with pytest.raises(AttributeError):
        spec.groups = ()


def test_a_group_may_get_its_size_from_a_whole_axis_of_a_later_leaf():
    spec = PermutationSpec.from_axes({"w": (6,), "v": (3,)}, {"w": (Product((Of("g"), Fixed(2))),), "v": ("g",)})
    assert spec.group("g").size == 3


# explaining


def test_the_explanation_lists_groups_with_members_and_pinned_axes_with_reasons(spec):
    page = spec.explain()
    assert page.startswith("2 groups over 5 leaves")
    assert "g: 3 units\n" in page
    assert "h: 2 units, one permutation per g\n" in page
    assert "    w, axis 1\n" in page
    assert "    out, axis 0 = (g=3 * h=2)\n" in page
    groups, pinned = page.split("pinned axes:")
    assert "table" not in groups
    assert "table [frozen], axis 0 (11): fixed by hand" in pinned
    assert "w, axis 0 (4): fixed by hand" in pinned


def test_the_explanation_shows_sums_parts_unverified_groups_and_hides_axes_of_size_one():
    leaf = Leaf("w", (13, 1), (FUSED, Fixed(1, "a singleton")))
    page = PermutationSpec((Group("g", 3), Group("h", 2, ("g",))), (leaf,), unverified=("g",)).explain()
    assert "g: 3 units  (not verified)" in page
    assert "w, axis 0 = ((g=3 * h=2) | 5 | h=2)" in page
    assert "w, axis 0, part (1,) (5): the input" in page
    assert "singleton" not in page


def test_a_spec_without_pinned_axes_does_not_speak_of_them():
    page = PermutationSpec.from_axes({"w": (2,)}, {"w": ("g",)}).explain()
    assert "pinned" not in page


# bad input


@pytest.mark.parametrize(
    ("axes", "rest", "pattern"),
    [
        ({"v": ("g", None)}, {}, "axes name the leaf 'v', which the model lacks"),
        ({"weigth": ("g", None)}, {}, "did you mean 'weight'"),
        ({"weight": ("g",)}, {}, r"'weight' has shape \(4, 3\), but 1 axis entries"),
        ({"weight": ("g", "g")}, {}, "'weight', axis 1 has size 3, but group 'g' has size 4"),
        ({"weight": ("g", None)}, {"sizes": {"g": 5}}, "'weight', axis 0 has size 4, but group 'g' has size 5"),
        ({"weight": (Product((Of("g"), Fixed(2))), None)}, {}, "'g' never stands on a whole axis; give its size"),
        (
            {"weight": (Product((Of("g"), Fixed(2))), None)},
            {"sizes": {"g": 3}},
            "'weight', axis 0: the model has size 4, the spec's parts make 6",
        ),
        ({"weight": (Fixed(5), None)}, {}, "'weight', axis 0: the model has size 4, the spec's parts make 5"),
        ({"weight": ("g", None)}, {"per": {"g": ("k",)}}, "'k'"),
        ({"weight": ("g", None)}, {"per": {"h": ("g",)}}, "per names the group 'h'"),
        ({"weight": ("g", None)}, {"roles": {"weigth": "frozen"}}, "roles name the leaf 'weigth'.*'weight'"),
        ({"weight": ("g", None)}, {"sizes": {"h": 3}}, "sizes name the group 'h'"),
    ],
)
def test_writing_a_spec_by_hand_names_the_leaf_and_axis_that_do_not_fit(axes, rest, pattern):
    with raises(pattern):
        PermutationSpec.from_axes({"weight": (4, 3)}, axes, **rest)


def test_unknown_names_are_answered_with_the_nearest_one(spec):
    with raises("no leaf 'tabel'.*'table'", KeyError):
        spec.leaf("tabel")
    for look_up in (spec.group, spec.members, spec.shape):
        with raises("no group 'k'", KeyError):
            look_up("k")


@pytest.mark.parametrize(
    ("shapes", "pattern"),
    [
        ({"w": (4, 3)}, r"the model lacks the leaf 'b' of shape \(3,\)"),
        ({"w": (4, 3), "b": (3,), "bb": (1,)}, "the model has the leaf 'bb', .*'b'"),
        ({"w": (4, 5), "b": (3,)}, "'w', axis 1: the model has size 5, the spec expects 3; models of different width"),
        ({"w": (4,), "b": (3,)}, r"'w' of the model has 1 axes \(4,\), the spec expects \(4, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_leaf_and_axis(shapes, pattern):
    spec = PermutationSpec.from_axes({"w": (4, 3), "b": (3,)}, {"w": (None, "g"), "b": ("g",)})
    spec.validate({"b": (3,), "w": (4, 3)})
    with raises(pattern):
        spec.validate(shapes, "the model")


def test_a_group_must_list_the_outer_groups_of_its_outer_groups_first():
    layer, head = Group("layer", 2), Group("head", 3, ("layer",))
    PermutationSpec((layer, head, Group("vo", 4, ("layer", "head"))), ())
    for per in (("head",), ("head", "layer")):
        with raises("'vo' is per .* 'head' is itself per"):
            PermutationSpec((layer, head, Group("vo", 4, per)), ())


@pytest.mark.parametrize(
    ("groups", "leaves", "pattern"),
    [
        ((Group("g", 3),), (Leaf("w", (3, 2), (Of("g"),)),), r"'w' has shape \(3, 2\) but 1 axis entries"),
        ((Group("g", 3),), (Leaf("w", (2,), (Of("g"),)),), "'w', axis 0: the model has size 2"),
        ((Group("g", 3), Group("g", 4)), (), "group 'g' is given twice"),
        ((Group("g", 3),), (Leaf("w", (), ()), Leaf("w", (), ())), "leaf 'w' is given twice"),
    ],
)
def test_a_spec_that_contradicts_itself_cannot_be_made(groups, leaves, pattern):
    with raises(pattern):
        PermutationSpec(groups, leaves)
