"""From a budget to a plan: sizes that are kept, units that are chosen well, groups that are worth their cost."""

import jax
import numpy as np
import pytest
import zoo

from permjax.merge.budget import cost
from permjax.merge.partial import constrained_plan
from permjax.merge.planning import group_probes, pleas_plan
from permjax.merge.scores import unit_scores
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.work import contractions

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

X = zoo.image(64, 6)
DATA = [X[:40], X[40:]]
LIKE = {"w1": zoo.shape(6, 20), "w2": zoo.shape(20, 16), "w3": zoo.shape(16, 3)}
FIRST, SECOND = "w1:1", "w2:1"


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w1"]) @ p["w2"]) @ p["w3"]


@pytest.fixture(scope="module")
def spec():
    return trace_spec(mlp, LIKE, X)


@pytest.fixture(scope="module")
def near(drawn):
    """Two models; units 0..9 of the first layer and 0..3 of the second are alike, the others are not."""
    a, other = drawn(LIKE, 0), drawn(LIKE, 1)
    b = {name: leaf.copy() for name, leaf in a.items()}
    b["w1"][:, 10:], b["w2"][:, 4:] = other["w1"][:, 10:], other["w2"][:, 4:]
    return a, b


def planned(spec, models, **options):
    return pleas_plan(spec, models, apply=mlp, data=DATA, **options)


def relative(spec, plan):
    return cost(contractions(mlp, spec, LIKE, X), spec, plan).relative


@pytest.mark.parametrize("shape", ["uniform", "staged", "optimised"])
@pytest.mark.parametrize("budget", [1, pytest.param(1.3, marks=pytest.mark.fast), 2])
def test_a_budget_is_used_but_not_exceeded(spec, near, budget, shape):
    plan = planned(spec, near, budget=budget, shape=shape)
    used = relative(spec, plan)["flops"]
    assert used <= budget + 1e-9
    assert used >= budget - 0.06
    for group, size in ((FIRST, 20), (SECOND, 16)):
        shared = 2 * size - plan.widths[group]
        assert set(plan.labels[group][0]) & set(plan.labels[group][1]) == set(range(shared))


@pytest.mark.fast
def test_parameters_and_widths_can_be_asked_for_as_well(spec, near):
    plan = planned(spec, near, params=1.5)
    assert 1.4 <= relative(spec, plan)["dense_params"] <= 1.5
    plan = planned(spec, near, width={FIRST: 0.25})
    assert plan.widths == {FIRST: 25, SECOND: 16}


@pytest.mark.fast
@pytest.mark.parametrize("metric", ["correlation", "distance"])
def test_units_that_are_alike_are_merged_first(spec, near, metric):
    plan = planned(spec, near, width={FIRST: 0.5, SECOND: 0.75}, metric=metric)
    shared = {g: np.intersect1d(*plan.labels[g], return_indices=True)[1].tolist() for g in (FIRST, SECOND)}
    assert shared[FIRST] == list(range(10))
    kernels = unit_scores(spec, near, metric=metric, apply=mlp, data=DATA)[SECOND][0]
    assert shared[SECOND] == sorted(np.argsort(-kernels.diagonal())[:4].tolist())


def test_pairs_can_be_chosen_anew(spec, near):
    plan = planned(spec, near, width={FIRST: 0.5}, selection="constrained")
    kernels = unit_scores(spec, near, apply=mlp, data=DATA)
    wanted = constrained_plan(spec, ratios={FIRST: 0.5}, kernels={g: k[0] for g, k in kernels.items()})
    for m in (0, 1):
        np.testing.assert_array_equal(plan.labels[FIRST][m], wanted.labels[FIRST][m])


def test_groups_are_kept_apart_and_whole_as_told(spec, near):
    plan = planned(spec, near, budget=1.6, apart=[SECOND])
    assert plan.widths[SECOND] == 32
    plan = planned(spec, near, budget=1.6, whole=[SECOND])
    assert plan.widths[SECOND] == 16
    assert plan.widths[FIRST] > 25
    least = planned(spec, near, budget=1, apart=[SECOND])  # what these alone cost is had anyway
    assert least.widths == {FIRST: 20, SECOND: 32}


def test_three_models_are_planned_together(spec, near, drawn):
    plan = planned(spec, (*near, drawn(LIKE, 2)), budget=1.8)
    assert plan.models == 3
    assert 1.7 <= relative(spec, plan)["flops"] <= 1.8


# probes


def test_twins_have_nothing_to_gain_or_lose(spec, near):
    probes = group_probes(spec, [near[0]] * 2, apply=mlp, inputs=[X])
    assert np.abs(list(probes.values())).max() <= 1e-9


@pytest.mark.fast
def test_the_group_in_which_models_differ_is_the_one_that_is_worth_something(spec, near, drawn):
    a = near[0]
    b = {**a, "w2": drawn(LIKE, 5)["w2"], "w3": drawn(LIKE, 5)["w3"]}
    probes = group_probes(spec, [a, b], apply=mlp, inputs=[X])
    assert probes.keys() == {FIRST, SECOND}
    assert max(map(abs, probes[FIRST])) <= 1e-6
    assert min(probes[SECOND]) > 0.1
    plan = planned(spec, [a, b], budget=1.4, shape="optimised")
    assert plan.widths == {FIRST: 20, SECOND: 24}  # 8 of 16 units of the one group cost 0.38


def test_probes_leave_out_groups_that_have_no_choice(spec, near):
    probes = group_probes(spec, near, apply=mlp, inputs=[X], apart=[FIRST])
    assert list(probes) == [SECOND]


# what cannot be had


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.9}, r"budget is 0.9, but must lie in \[1, 2\]"),
        ({"budget": 2.1}, r"budget is 2.1, but must lie in \[1, 2\]"),
        ({"params": 5}, r"params is 5.0, but must lie in \[1, 4\]"),
        ({"budget": 1.2, "params": 1.2}, "exactly one of budget, params and width"),
        ({}, "exactly one of budget, params and width"),
        ({"width": {"w9:1": 0.5}}, "no group 'w9:1'"),
        ({"width": {FIRST: 1.5}}, r"group 'w1:1': the kept-separate ratio is 1.5"),
        ({"budget": 1.2, "shape": "round"}, "no shape 'round'"),
        ({"budget": 1.2, "metric": "taste"}, "no metric 'taste'"),
        ({"budget": 1.2, "apart": ["w9:1"]}, "no group 'w9:1'"),
        ({"budget": 1.2, "data": []}, "`data` gave no batches"),
        ({"budget": 1.2, "data": [np.ones((4, 7), np.float32)]}, r"`apply` does not take batches .* of shape \(4, 7\)"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(spec, near, options, message):
    with pytest.raises(ValueError, match=message):
        pleas_plan(spec, near, **{"apply": mlp, "data": DATA, **options})


@pytest.mark.fast
def test_new_pairs_are_for_two_models(spec, near):
    with pytest.raises(ValueError, match="selection is 'constrained' of 3 models"):
        planned(spec, (*near, near[0]), budget=1.2, selection="constrained")
