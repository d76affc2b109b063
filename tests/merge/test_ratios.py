"""Ratios for a budget: never exceeded, met within a unit, of the shape that was asked for, and best by brute force."""

from itertools import pairwise, product

import jax
import numpy as np
import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st

from permjax.merge.allocation import allocate, fits
from permjax.merge.budget import cost
from permjax.merge.partial import partial_plan, widenable
from permjax.merge.price import flops_price
from permjax.merge.ratios import ratios_for
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.work import Work, contractions

NETS = ["mlp", "small resnet with batch norm", "gpt-2"]
WIDE = PermutationSpec.from_axes({"w": (1000, 1000)}, {"w": ("a", "b")})
ONCE = (Work("w", ("a", "b"), 10**6),)


@pytest.fixture(scope="module", params=NETS)
def net(request):
    with jax.numpy_dtype_promotion("standard"):
        case = zoo.CASES[request.param]()
        spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
        return spec, contractions(case.apply, spec, case.params, *case.inputs)


def relative(net, ratios, models: int = 2, name: str = "flops") -> float:
    spec, found = net
    return cost(found, spec, partial_plan(spec, ratios=ratios, models=models)).relative[name]


def probes_of(spec, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {g: tuple(rng.uniform(0, 1, 2).tolist()) for g in widenable(spec)}


def random_network(rng):
    """A few small groups in a ring, sometimes with a product of activations on one of them."""
    count = int(rng.integers(2, 5))
    names, sizes = [f"h{i}" for i in range(count)], rng.integers(2, 7, count).tolist()
    ends = [(None, names[0]), *pairwise(names), (names[0], names[-1]), (names[-1], None)]
    axes = {f"{i}": pair for i, pair in enumerate(ends)}
    size = dict(zip(names, sizes, strict=True))
    shapes = {name: tuple(size[g] if g else 3 for g in pair) for name, pair in axes.items()}
    works = [Work(n, tuple(filter(None, axes[n])), int(np.prod(s) * rng.integers(1, 20))) for n, s in shapes.items()]
    if rng.random() < 0.4:
        works.append(Work(None, (names[0],), int(rng.integers(10, 300))))
    return works, PermutationSpec.from_axes(shapes, axes)


# uniform


@pytest.mark.fast
@pytest.mark.parametrize("budget", [1, 1.2, 1.5, 1.8, 2])
def test_the_uniform_ratio_of_two_permuted_axes_is_the_closed_form(budget):
    ratios = ratios_for(ONCE, WIDE, budget=budget)
    assert [ratios["a"], ratios["b"]] == pytest.approx([1 - np.sqrt(2 - budget)] * 2, abs=2e-3)
    dense = ratios_for(ONCE, WIDE, params=budget)
    assert [dense["a"], dense["b"]] == pytest.approx([np.sqrt(budget) - 1] * 2, abs=2e-3)


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("shape", ["uniform", "staged", "optimised"])
def test_budgets_are_met_within_a_unit_and_never_exceeded(net, shape, models):
    spec, found = net
    for share in (0.05, 0.3, 0.5, 0.9):
        budget = 1 + share * (models - 1)
        options = {"shape": shape, "models": models, "probes": probes_of(spec)}
        ratios = ratios_for(found, spec, budget=budget, **options)
        assert relative(net, ratios, models) <= budget * (1 + 1e-9)
        more = [{**ratios, g: min(1.0, ratios[g] + 1 / spec.group(g).size)} for g in ratios if ratios[g] < 1]
        if shape == "optimised":
            assert all(relative(net, one, models) > budget for one in more)
        elif shape == "uniform":
            step = {g: min(1.0, ratios[g] + 1 / spec.group(g).size) for g in ratios}
            assert relative(net, step, models) > budget
        ratios = ratios_for(found, spec, params=1 + 2 * share, **options)
        assert relative(net, ratios, models, "dense_params") <= (1 + 2 * share) * (1 + 1e-9)


@pytest.mark.fast
@pytest.mark.parametrize("shape", ["uniform", "staged", "optimised"])
def test_the_ends_of_the_range_merge_all_and_keep_all(net, shape):
    spec, found = net
    for models in (2, 3):
        options = {"shape": shape, "models": models, "probes": probes_of(spec)}
        assert set(ratios_for(found, spec, budget=1, **options).values()) == {0}
        assert set(ratios_for(found, spec, budget=models, **options).values()) == {1}


@pytest.mark.fast
@pytest.mark.parametrize("shape", ["uniform", "staged"])
def test_ratios_do_not_fall_when_the_budget_grows(net, shape):
    spec, found = net
    rows = [ratios_for(found, spec, budget=b, shape=shape) for b in np.linspace(1, 2, 9).tolist()]
    for less, more in pairwise(rows):
        assert all(less[g] <= more[g] + (shape == "uniform") / spec.group(g).size for g in less)


@pytest.mark.fast
def test_a_uniform_ratio_is_one_ratio_up_to_a_unit_and_no_group_has_room_for_another(net):
    spec, found = net
    ratios = ratios_for(found, spec, budget=1.4)
    low = max(ratios[g] - 1.5 / spec.group(g).size for g in ratios)
    high = min(ratios[g] + 0.5 / spec.group(g).size for g in ratios)
    assert low <= high + 1e-9
    assert relative(net, ratios, 2) <= 1.4
    assert relative(net, ratios, 2) > 1.4 - 0.05


# staged


@pytest.mark.fast
def test_stages_are_merged_first_and_separate_last(net):
    spec, found = net
    forward = list(dict.fromkeys(g for work in found for g in work.groups if g in widenable(spec)))
    for budget in (1.1, 1.5, 1.9):
        ratios = [ratios_for(found, spec, budget=budget, shape="staged")[g] for g in forward]
        assert ratios == sorted(ratios)
        assert sum(0 < r < 1 for r in ratios) <= 1
        assert ratios[-1] > 0


# optimised


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(12))
def test_optimised_units_are_as_good_as_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    works, spec = random_network(rng)
    price = flops_price(works, spec, 2, {})
    weights, budget = np.maximum(rng.normal(0.5, 1, len(price.sizes)), 1e-5), rng.uniform(1, 2)
    every = np.array(list(product(*(range(n + 1) for n in price.sizes))))
    best = (every[fits(price, every, budget)] / price.sizes @ weights).max()
    units = allocate(price, weights, budget)
    assert fits(price, units, budget)
    assert weights @ (units / price.sizes) >= best * (1 - 1e-3)


@pytest.mark.fast
def test_optimised_ratios_are_worth_more_than_uniform_and_staged_ones(net):
    spec, found = net
    probes = probes_of(spec, 3)
    for budget in (1.2, 1.5, 1.8):
        t = budget - 1
        worth = {
            shape: sum(((1 - t) * probes[g][0] + t * probes[g][1]) * r for g, r in ratios.items())
            for shape in ("uniform", "staged", "optimised")
            for ratios in [ratios_for(found, spec, budget=budget, shape=shape, probes=probes)]
        }
        assert worth["optimised"] == max(worth.values())


@pytest.mark.fast
def test_gains_count_near_one_parent_and_losses_near_all_of_them():
    size = {"a": 100, "b": 100}
    spec = PermutationSpec.from_axes({"u": (9, 100), "v": (9, 100)}, {"u": (None, "a"), "v": (None, "b")})
    works = (Work("u", ("a",), 900), Work("v", ("b",), 900))
    probes = {"a": (3.0, 0.0), "b": (-2.0, 1.0)}
    for budget, first in ((1.1, "a"), (1.9, "b")):
        ratios = ratios_for(works, spec, budget=budget, shape="optimised", probes=probes)
        assert max(size, key=ratios.__getitem__) == first


# widths, and groups that are settled beforehand


@pytest.mark.fast
def test_widths_are_taken_as_they_are_and_the_rest_is_merged():
    assert ratios_for((), WIDE, width={"a": 0.25}) == {"a": 0.25, "b": 0}
    assert ratios_for((), WIDE, width={}) == {"a": 0, "b": 0}
    assert ratios_for((), WIDE, width={"a": 0.3004})["a"] == pytest.approx(0.3)  # whole units


@pytest.mark.fast
@given(budget=st.floats(1.2, 2))
def test_groups_apart_stay_apart_and_their_share_is_paid(budget):
    spec = PermutationSpec.from_axes({"w": (50, 40), "head": (40, 10)}, {"w": ("a", "b"), "head": ("b", "h")})
    works = (Work("w", ("a", "b"), 2000), Work("head", ("b", "h"), 400))
    ratios = ratios_for(works, spec, budget=budget, apart=("h",), whole=("a",))
    assert (ratios["h"], ratios["a"]) == (1, 0)
    free = ratios["b"]
    assert (2000 * (1 + free) + 400 * 2) / 2400 <= budget * (1 + 1e-9)
    assert free == 1 or (2000 * (1 + free + 1 / 40) + 400 * 2) / 2400 > budget


@pytest.mark.fast
def test_heads_and_what_is_inside_them(net):
    spec, found = net
    assert set(ratios_for(found, spec, budget=1.5)) == {g.name for g in spec.groups if not g.per}


# bad input


@pytest.mark.fast
def test_bad_requests_are_refused():
    spec = PermutationSpec.from_axes({"w": (4, 6)}, {"w": ("head", "b")})
    works = (Work("w", ("head", "b"), 24),)
    for hyper, message in (
        ({}, "exactly one of budget, params and width, not none"),
        ({"budget": 1.2, "params": 1.3}, "exactly one .* not budget and params"),
        ({"budget": 0.9}, "budget is 0.9, but must lie in \\[1, 2\\]"),
        ({"budget": 2.1}, "budget is 2.1, but must lie in \\[1, 2\\]"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"params": 4.5}, "params is 4.5, but must lie in \\[1, 4\\]"),
        ({"budget": 3.5, "models": 3}, "must lie in \\[1, 3\\]"),
        ({"budget": 1.2, "models": 1}, "two models or more, not 1"),
        ({"budget": 1.2, "shape": "zip"}, "no shape 'zip'; choose from"),
        ({"budget": 1.2, "shape": "optimised"}, "need probes, .* none of 'b'"),
        ({"budget": 1.2, "shape": "optimised", "probes": {"b": (1, np.nan), "head": (0, 0)}}, "finite"),
        ({"budget": 1.2, "apart": ("heads",)}, "no group 'heads' .*nearest: 'head'"),
        ({"budget": 1.2, "apart": ("b",), "whole": ("b",)}, "'b' cannot be kept apart and whole"),
        ({"budget": 1.2, "apart": ("head",)}, "kept apart alone cost 2.000 parents"),
        ({"width": {"hea": 0.5}}, "no group 'hea' .*nearest: 'head'"),
        ({"width": {"head": 1.5}}, "'head': the kept-separate ratio is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ratios_for(works, spec, **hyper)
