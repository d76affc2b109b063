"""Costs of merged networks: closed forms, entries counted one by one, and the price that stands for many plans."""

from itertools import pairwise
from math import prod

import jax
import numpy as np
import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st

from permjax.merge.budget import cost
from permjax.merge.partial import partial_plan, widenable
from permjax.merge.price import flops_price, params_price
from permjax.merge.wide import Wide
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.work import Work, contractions

pytestmark = pytest.mark.fast

NETS = ["mlp", "small resnet with batch norm", "depthwise and grouped convolutions", "gpt-2", "vit"]
SQUARE = PermutationSpec.from_axes({"w": (10, 20), "bias": (20,)}, {"w": ("a", "b"), "bias": ("b",)})
ONCE = (Work("w", ("a", "b"), 10 * 20),)


def traced(name: str):
    with jax.numpy_dtype_promotion("standard"):
        case = zoo.CASES[name]()
        spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
        return spec, contractions(case.apply, spec, case.params, *case.inputs)


@pytest.fixture(scope="module", params=NETS)
def net(request):
    return traced(request.param)


def of_ratios(net, ratios, models: int = 2):
    spec, found = net
    return cost(found, spec, partial_plan(spec, ratios=ratios, models=models))


def clustered(spec: PermutationSpec, models: int, seed: int) -> Plan:
    """Any labels at all in the groups that can be widened; some wide units have no owner, some many units."""
    rng = np.random.default_rng(seed)
    plain = partial_plan(spec, {}, models=models)
    labels, widths = dict(plain.labels), dict(plain.widths)
    for group in widenable(spec):
        size = spec.group(group).size
        widths[group] = size + int(rng.integers(0, 3))
        labels[group] = tuple(rng.integers(0, widths[group], size).astype(np.int32) for _ in range(models))
    return Plan(labels, widths, plain.per)


# closed forms


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("r", [0, 0.1, 0.5, 1])
def test_two_permuted_axes_cost_one_plus_both_ratios_less_their_product(r, models):
    found = of_ratios((SQUARE, ONCE), {"a": r, "b": r}, models).relative
    assert found["flops"] == pytest.approx(1 + (models - 1) * (2 * r - r * r))
    assert found["dense_flops"] == pytest.approx((1 + (models - 1) * r) ** 2)


@given(i=st.integers(0, 10), j=st.integers(0, 20))
def test_ratios_of_the_two_axes_may_differ(i, j):
    r, s = i / 10, j / 20
    found = of_ratios((SQUARE, ONCE), {"a": r, "b": s})
    assert found.flops == pytest.approx(400 * (1 + r + s - r * s))
    assert found.params == pytest.approx(200 * (1 + r + s - r * s) + 20 * (1 + s))
    assert found.dense_params == pytest.approx(200 * (1 + r) * (1 + s) + 20 * (1 + s))


def test_nothing_kept_costs_one_parent_and_everything_kept_costs_all_of_them(net):
    spec, _ = net
    merged, apart = (of_ratios(net, dict.fromkeys(widenable(spec), r), 3) for r in (0, 1))
    assert merged.relative == dict.fromkeys(merged.relative, 1.0)
    assert merged.flops == 2 * sum(work.multiply_adds for work in net[1])
    assert apart.relative["flops"] == 3
    assert 3 < apart.relative["dense_flops"] < 9


def test_costs_do_not_fall_when_more_is_kept(net):
    spec, _ = net
    found = [of_ratios(net, dict.fromkeys(widenable(spec), r)) for r in np.linspace(0, 1, 9)]
    for less, more in pairwise(found):
        assert all(a <= b for a, b in zip(less, more, strict=True))
        assert more.flops <= more.dense_flops
        assert more.params <= more.dense_params


def test_depthwise_convolutions_grow_with_the_number_of_groups():
    spec, found = traced("depthwise and grouped convolutions")
    work = next(w for w in found if w.leaf == "params/Conv_1/kernel")
    for r in (0.25, 0.5, 1):
        relative = cost((work,), spec, partial_plan(spec, ratios={"params/Conv_0/kernel:3": r})).relative
        assert relative["flops"] == relative["dense_flops"] == 1 + r


def test_attention_is_computed_for_every_model_only_if_its_heads_are_widened():
    spec, found = traced("gpt-2")
    heads = [g.name for g in spec.groups if g.name.endswith("heads")]
    products = tuple(work for work in found if work.leaf is None)
    assert of_ratios((spec, products), {heads[0]: 0.25}, 3).relative["flops"] == pytest.approx((3 + 1) / 2)
    others = [name for name in widenable(spec) if name not in heads]
    assert of_ratios((spec, products), dict.fromkeys(others, 1)).relative["flops"] == 1


def test_residual_streams_are_counted_wherever_they_stand():
    spec, found = traced("small resnet with batch norm")
    stream = "params/Conv_0/kernel:3"
    by_hand = 0.0
    for work in found:
        leaf = spec.leaf(work.leaf)
        places = sum(member.leaf == leaf.name for member in spec.members(stream))
        by_hand += 2 * work.multiply_adds * (1 + 0.5 * places)
    assert of_ratios((spec, found), {stream: 0.5}).flops == pytest.approx(by_hand)


def test_frozen_leaves_are_no_parameters_but_statistics_are():
    axes = {"w": (None, "g"), "mean": ("g",), "table": (None,)}
    shapes = {"w": (3, 4), "mean": (4,), "table": (7,)}
    spec = PermutationSpec.from_axes(shapes, axes, roles={"mean": "statistic", "table": "frozen"})
    found = cost((), spec, partial_plan(spec, ratios={"g": 0.5}))
    assert (found.parent_params, found.params, found.dense_params) == (16, 24, 24)


# entry by entry


@pytest.mark.parametrize("name", ["mlp", "same group on two axes", "attention, fused and split", "stacked layers"])
@pytest.mark.parametrize("models", [2, 3])
def test_entries_are_those_that_some_model_has(zoo, name, models):
    spec = zoo[name]
    plan = clustered(spec, models, seed=models)
    wide = Wide(spec, plan)
    live, stored = {}, {}
    for leaf in spec.leaves:
        mask = np.zeros(wide.wide_spec.leaf(leaf.name).shape, bool)
        for m in range(models):
            mask[np.ix_(*(wide.index(axis, m) for axis in leaf.axes))] = True
        live[leaf.name], stored[leaf.name] = int(mask.sum()), mask.size
    works = tuple(Work(leaf.name, (), 5 * prod(leaf.shape)) for leaf in spec.leaves)
    found = cost(works, spec, plan)
    assert (found.params, found.dense_params) == (sum(live.values()), sum(stored.values()))
    assert (found.flops, found.dense_flops) == (10 * sum(live.values()), 10 * sum(stored.values()))


# prices


@pytest.mark.parametrize("models", [2, 3])
def test_prices_are_the_costs_of_the_plans(net, models):
    spec, found = net
    rng = np.random.default_rng(0)
    fixed = {widenable(spec)[0]: 1.0, widenable(spec)[1]: 0.0}
    prices = flops_price(found, spec, models, fixed), params_price(spec, models, fixed)
    for _ in range(5):
        units = rng.integers(0, prices[0].sizes + 1) * rng.integers(0, 2, len(prices[0].sizes))
        ratios = dict(zip(prices[0].groups, (units / prices[0].sizes).tolist(), strict=True)) | fixed
        relative = of_ratios(net, ratios, models).relative
        for price, name in zip(prices, ("flops", "dense_params"), strict=True):
            assert float(price(units / price.sizes)) == pytest.approx(relative[name], rel=1e-12)


def test_many_choices_are_priced_at_once(net):
    price = flops_price(net[1], net[0], 2, {})
    ratios = np.random.default_rng(0).uniform(size=(4, 3, len(price.groups)))
    ratios[0, 0] = 0
    np.testing.assert_allclose(price(ratios), [[price(one) for one in row] for row in ratios])
    assert price(ratios)[0, 0] == 1


def test_a_program_without_contractions_has_no_price():
    with pytest.raises(ValueError, match="no contraction whose cost could be counted"):
        flops_price((), SQUARE, 2, {})
