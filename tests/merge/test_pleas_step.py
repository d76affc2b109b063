"""PLeaS as a step of a pipeline, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.match.activations import ActivationMatching, activation_matching
from permjax.merge.budget import cost
from permjax.merge.planning import pleas_plan
from permjax.merge.pleas import Pleas, pleas, pleas_statistics
from permjax.merge.scale import CanonicalScale
from permjax.steps import MergeState, chain
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.work import contractions

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

X = np.asarray(zoo.image(150, 5))
DATA = [X[:80], X[80:]]
LIKE = {
    "w1": zoo.shape(5, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, 6), "b2": zoo.shape(6), "w3": zoo.shape(6, 3),
}  # fmt: skip


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"]


@pytest.fixture(scope="module")
def spec():
    with jax.numpy_rank_promotion("allow"):
        return trace_spec(mlp, LIKE, X)


@pytest.fixture(scope="module")
def parents(drawn):
    return [drawn(LIKE, 0), drawn(LIKE, 1)]


def started(spec, parents, **options):
    return MergeState.create(spec, parents, key=jax.random.key(0), **{"data": DATA, "apply": mlp, **options})


# the step


def test_a_pipeline_ends_with_a_network_and_what_belongs_to_it(spec, parents):
    state = chain(ActivationMatching(), Pleas(budget=1.5))(started(spec, parents))
    (merged,) = state.models
    state.spec.validate({name: leaf.shape for name, leaf in merged.items()}, "the result")
    assert state.apply(merged, X).shape == (150, 3)
    used = cost(contractions(mlp, spec, LIKE, X), spec, state.apply.wide.plan).relative["flops"]
    assert 1.4 <= used <= 1.5
    assert [type(info).__name__ for info in state.infos] == ["ActivationInfo", "PleasInfo"]


def test_the_step_is_the_functions_one_after_the_other(spec, parents):
    state = chain(ActivationMatching(), Pleas(budget=1.5, mode="sequential", ridge=1e-3))(started(spec, parents))
    matched = activation_matching(spec, parents, apply=mlp, data=DATA)
    plan = pleas_plan(spec, matched.models, apply=mlp, data=DATA, budget=1.5)
    result = pleas(spec, matched.models, plan, apply=mlp, data=DATA, mode="sequential", ridge=1e-3)
    for name, leaf in result.models[0].items():
        np.testing.assert_allclose(state.models[0][name], leaf, rtol=1e-5, atol=1e-6)
    order = matched.plan.permutations(1)["w1:1"]
    np.testing.assert_array_equal(state.plan.labels["w1:1"][1][order], plan.labels["w1:1"][1])
    assert state.plan.widths == plan.widths


@pytest.mark.parametrize("heads", ["own", "own_fitted"])
def test_heads_of_their_own_are_concatenated(spec, parents, heads):
    steps = chain(CanonicalScale(), ActivationMatching(), Pleas(width=(("w1:1", 0.5),), heads=heads))
    state = steps(started(spec, parents))
    (merged,) = state.models
    assert state.apply(merged, X).shape == (150, 6)
    assert merged["w3"].shape == (6, 6)
    assert ("w3" in state.infos[-1].averaged) == (heads == "own")


@pytest.mark.fast
def test_steps_are_values(spec, parents):
    assert Pleas(budget=1.5) == Pleas(budget=1.5)
    assert hash(Pleas(width=(("a", 0.5),))) == hash(Pleas(width=(("a", 0.5),)))
    assert {field.name for field in dataclasses.fields(Pleas)} >= {"budget", "mode", "ridge", "heads"}
    with pytest.raises(ValueError, match="Pleas needs `apply`"):
        Pleas(budget=1.5)(started(spec, parents, apply=None))
    with pytest.raises(ValueError, match="Pleas needs `data`"):
        Pleas(budget=1.5)(started(spec, parents, data=None))


# what is refused


def refused(message):
    return pytest.raises(ValueError, match=message)


@pytest.mark.fast
def test_models_must_be_those_of_the_spec_and_the_plan(spec, parents, plan_of):
    plan = plan_of(spec, 0.5)
    wider = {**parents[1], "w1": np.ones((5, 9), np.float32)}
    with refused("leaf 'w1', axis 1: model 1 has size 9, the spec expects 8"):
        pleas(spec, [parents[0], wider], plan, apply=mlp, data=DATA)
    with refused("'w3'"):
        pleas(spec, [parents[0], {n: x for n, x in parents[1].items() if n != "w3"}], plan, apply=mlp, data=DATA)
    with refused("the plan is for 3 models, but 2 were given"):
        pleas(spec, parents, plan_of(spec, 0.5, 3), apply=mlp, data=DATA)
    with refused("merging needs two models or more, not 1"):
        pleas(spec, parents[:1], plan, apply=mlp, data=DATA)
    with refused("Leaf 'b1' of model 1 holds 8 NaN"):
        pleas(spec, [parents[0], {**parents[1], "b1": np.full(8, np.nan, np.float32)}], plan, apply=mlp, data=DATA)
    other = trace_spec(lambda p, x: jax.nn.relu(x @ p["u"]) @ p["v"], {"u": zoo.shape(5, 4), "v": zoo.shape(4, 3)}, X)
    with refused("the plan says nothing of group 'w1:1'; make it for this spec"):
        pleas(spec, parents, plan_of(other, 0.5), apply=mlp, data=DATA)


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_models_of_other_programs_are_told(spec, parents, plan_of, mode):
    def skipping(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["w1"] + p["b1"])[:, :6] + p["b2"]) @ p["w3"] + 0 * p["w2"].sum()

    with refused("the models run different programs: at one place they come to leaf 'w2' and leaf 'w3'"):
        pleas(spec, parents, plan_of(spec, 0.5), apply=[mlp, skipping], data=DATA, mode=mode)


@pytest.mark.fast
def test_calibration_must_fit_and_be_finite(spec, parents, plan_of):
    plan = plan_of(spec, 0.5)
    for data, message in (
        ([], "`data` gave no batches"),
        ([np.ones((4, 7), np.float32)], r"`apply` does not take batches of the calibration data, of shape \(4, 7\)"),
        (
            [X[:9], np.ones((9, 7), np.float32)],
            r"batch 1 of the data has inputs \[\(\(7,\), 'float32'\)\], but batch 0",
        ),
        ([X[:9], np.ones((9, 5), np.int32)], r"batch 1 of the data has inputs \[\(\(5,\), 'int32'\)\], but batch 0"),
        ([X, np.full((9, 5), np.nan, np.float32)], "batch 1 of the data holds 45 NaN"),
        ([(X, X)], "`apply` does not take batches of the calibration data"),
    ):
        with refused(message):
            pleas(spec, parents, plan, apply=mlp, data=data)
        with refused(message):
            pleas_statistics(spec, parents, plan, apply=mlp, data=data)


@pytest.mark.fast
def test_owners_must_name_a_model_for_every_sample(spec, parents, plan_of):
    plan, who = plan_of(spec, 0.5), [np.arange(len(x)) % 2 for x in DATA]
    for owners, message in (
        (None, "targets 'owner' need `owners`, one array for each batch"),
        (who[:1], "there are 2 batches of data but 1 of owners; give one for each"),
        ([who[0][:5], who[1]], r"batch 0: owners must be one whole number for each of its \[80\] samples"),
        ([who[0] / 2, who[1]], "batch 0: owners must be one whole number .* not float64"),
        ([who[0], who[1] + 1], r"batch 1: owners reach from 1 to 2, but the models are numbered 0..1"),
        ([who[0] - 1, who[1]], r"batch 0: owners reach from -1 to 0, but the models are numbered 0..1"),
    ):
        with refused(message):
            pleas(spec, parents, plan, apply=mlp, data=DATA, targets="owner", owners=owners)
    with refused("only these use them"):
        pleas(spec, parents, plan, apply=mlp, data=DATA, owners=who)
    with refused("mode 'separate' fits every parent's own results"):
        pleas(spec, parents, plan, apply=mlp, data=DATA, targets="owner", owners=who, mode="separate")


@pytest.mark.fast
def test_choices_that_do_not_exist_are_named(spec, parents, plan_of):
    plan = plan_of(spec, 0.5)
    for options, message in (
        ({"keep": ["w9"]}, "keep names the leaf 'w9'.*nearest.*which the models lack"),
        ({"positions": 4}, "`positions` are drawn at random; give a `key`"),
        ({"ridge": -1.0}, "ridge must be a finite number >= 0, not -1"),
    ):
        with refused(message):
            pleas(spec, parents, plan, apply=mlp, data=DATA, **options)


@pytest.mark.fast
def test_a_budget_lies_between_one_model_and_all(spec, parents):
    for budget in (0.99, 2.01):
        with refused(rf"budget is {budget}, but must lie in \[1, 2\]"):
            Pleas(budget=budget)(started(spec, parents))
    three = started(spec, [*parents, jax.tree.map(jnp.asarray, parents[0])])
    with refused(r"must lie in \[1, 3\]"):
        Pleas(budget=3.5)(three)
