"""Merged networks as functions: what they return, under which transformations, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.merge.block_apply import block_apply, together
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.merge.wide import Wide
from permjax.merge.zipping import zip_plan
from permjax.symmetry.program import steps
from permjax.symmetry.trace import trace_spec

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]

# what a merged network can be used for


def merged(spec, plan, models, summed):
    return wide_average(Wide(spec, plan), models, summed)


def run(spec, plan, apply, *arguments, **options):
    return jax.jit(block_apply(spec, plan, apply, **options))(*arguments)


def mlp(p, x):
    h = jax.nn.relu(x @ p["w1"] + p["b1"])
    return jax.nn.relu(h @ p["w2"] + p["b2"]) @ p["w3"] + p["b3"]


MLP = {
    "w1": zoo.shape(5, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, 6), "b2": zoo.shape(6), "w3": zoo.shape(6, 3),
    "b3": zoo.shape(3),
}  # fmt: skip
X = zoo.image(7, 5)
SUMMED = {"w1": frozenset({0}), "w2": frozenset({0}), "w3": frozenset({0})}


@pytest.fixture(scope="module")
def mlp_spec():
    with jax.numpy_rank_promotion("allow"):
        return trace_spec(mlp, MLP, X)


@pytest.fixture
def half(mlp_spec, drawn, plan_of):
    """(plan, merged weights in NumPy) of two models, half of whose units are shared."""
    plan = plan_of(mlp_spec, 0.5)
    return plan, merged(mlp_spec, plan, [drawn(MLP, 0), drawn(MLP, 1)], SUMMED)


def test_a_shared_head_gives_the_same_logits_in_every_view(mlp_spec, half, differ):
    plan, wide = half
    one, two = run(mlp_spec, plan, mlp, wide, X, joined="tuple")
    assert differ(one, two) <= 1e-6
    assert differ(run(mlp_spec, plan, mlp, wide, X), one) <= 1e-6


def test_outputs_can_be_joined_in_three_ways(mlp_spec, half):
    plan, wide = half
    several = run(mlp_spec, plan, mlp, wide, X, joined="tuple")
    assert [y.shape for y in several] == [(7, 3)] * 2
    joined = run(mlp_spec, plan, mlp, wide, X, joined="concatenate")
    np.testing.assert_array_equal(joined, np.concatenate(several, -1))
    whole = partial_plan(mlp_spec, {}, models=3)
    assert len(run(mlp_spec, whole, mlp, wide_of(mlp_spec, whole, wide), X, joined="tuple")) == 3
    with pytest.raises(ValueError, match="joined by 'mean', 'concatenate' or 'tuple', not 'sum'"):
        block_apply(mlp_spec, plan, mlp, joined="sum")


def wide_of(spec, plan, like):
    """Any weights of the shapes of a plan."""
    wide = Wide(spec, plan).wide_spec
    return {name: np.ones(wide.leaf(name).shape, leaf.dtype) for name, leaf in like.items()}


def test_compiled_and_eager_results_agree_and_gradients_flow(mlp_spec, half, differ):
    plan, wide = half
    network = block_apply(mlp_spec, plan, mlp)
    assert differ(jax.jit(network)(wide, X), network(wide, X)) <= 1e-6

    def loss(params):
        return jnp.square(network(params, X)).sum()

    gradient = jax.jit(jax.grad(loss))(wide)
    cross = np.s_[4:8, 6:9]  # own units of model 0, own outputs of model 1
    assert not np.asarray(gradient["w2"])[cross].any()
    assert np.asarray(gradient["w2"])[4:8, :6].all(axis=1).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_leaves_stay_and_work(mlp_spec, drawn, plan_of, dtype):
    plan = plan_of(mlp_spec, 1)
    parents = [jax.tree.map(lambda x: jnp.asarray(x, dtype), drawn(MLP, seed)) for seed in (0, 1)]
    wide = merged(mlp_spec, plan, parents, SUMMED)
    assert {leaf.dtype for leaf in wide.values()} == {jnp.dtype(dtype)}
    x = X.astype(dtype)
    found = run(mlp_spec, plan, mlp, wide, x, joined="tuple")
    wanted = (mlp(parents[0], x) + mlp(parents[1], x)).astype(jnp.float32) / 2
    np.testing.assert_allclose(found[0].astype(jnp.float32), wanted, atol=0.05)


def test_functions_over_lists_and_with_several_outputs_are_merged_too(mlp_spec, half):
    plan, wide = half

    def apply(p, inputs):
        return {"logits": mlp(p, inputs[0]), "twice": (2 * mlp(p, inputs[1]), inputs[0])}

    found = run(mlp_spec, plan, apply, wide, [X, X])
    np.testing.assert_allclose(found["twice"][0], 2 * found["logits"], rtol=1e-5)
    np.testing.assert_allclose(found["twice"][1], X, rtol=1e-6)


def test_the_features_before_the_head_are_those_of_the_wide_units(mlp_spec, drawn, plan_of, differ):
    plan, parents = plan_of(mlp_spec, 1), [drawn(MLP, 0), drawn(MLP, 1)]
    features = jax.jit(block_apply(mlp_spec, plan, mlp).last_features)(merged(mlp_spec, plan, parents, SUMMED), X)

    def before(p):
        return jax.nn.relu(jax.nn.relu(X @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])

    assert differ(features, jnp.concatenate([before(p) for p in parents], -1)) <= 1e-6


def test_clusters_are_run_as_they_are_labelled(mlp_spec, drawn, differ):
    parents = [drawn(MLP, 0), drawn(MLP, 1)]
    plan = zip_plan(mlp_spec, parents, apply=mlp, data=[X], widths={"w1:1": 5, "w2:1": 9}, within=0.5)
    wide = merged(mlp_spec, plan, parents, SUMMED)
    one, two = run(mlp_spec, plan, mlp, wide, X, joined="tuple")
    labels = plan.labels

    def by_hand():
        def view(name, m, group):
            return wide[name][..., labels[group][m]]

        def mean(views, group):
            total, count = np.zeros((7, plan.widths[group])), np.zeros(plan.widths[group])
            for m, v in enumerate(views):
                np.add.at(total, (slice(None), labels[group][m]), v)
                np.add.at(count, labels[group][m], 1)
            return total / count

        h = np.asarray(X) @ wide["w1"]
        h = mean([np.maximum(h[:, labels["w1:1"][m]] + view("b1", m, "w1:1"), 0) for m in (0, 1)], "w1:1") @ wide["w2"]
        h = mean([np.maximum(h[:, labels["w2:1"][m]] + view("b2", m, "w2:1"), 0) for m in (0, 1)], "w2:1")
        return h @ wide["w3"] + wide["b3"]

    assert differ(one, by_hand()) <= 1e-5
    assert differ(two, by_hand()) <= 1e-5


# what cannot be done


def test_a_leaf_and_its_transpose_need_units_that_are_all_shared(drawn, plan_of):
    def tied(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["w"].T

    like = {"w": zoo.shape(5, 8)}
    spec = trace_spec(tied, like, X)
    plan = plan_of(spec, 0.5)
    wide = merged(spec, plan, [drawn(like, 0), drawn(like, 1)], contracted_axes(tied, like, X))
    with pytest.raises(ValueError, match="leaf 'w' is summed over group 'w:1' at one place and used without that"):
        block_apply(spec, plan, tied)(wide, X)


def test_leaves_that_are_computed_with_first_keep_their_groups_whole(drawn, plan_of):
    def scaled(p, x):
        return jax.nn.relu(x @ (p["w"] * 2)) @ p["v"]

    like = {"w": zoo.shape(5, 8), "v": zoo.shape(8, 3)}
    spec = trace_spec(scaled, like, X)
    for ratio in (0, 0.5):
        plan = plan_of(spec, ratio)
        network = block_apply(spec, plan, scaled)
        wide = merged(spec, plan, [drawn(like, 0), drawn(like, 1)], contracted_axes(scaled, like, X))
        if ratio:
            with pytest.raises(ValueError, match=r"leaf 'w' is computed with before it is contracted.*ratio 0"):
                network(wide, X)
        else:
            np.testing.assert_allclose(network(wide, X), scaled(wide, X), rtol=1e-5, atol=1e-6)


def test_models_that_run_different_programs_are_refused(mlp_spec, half):
    plan, wide = half

    def other(p, x):
        return mlp({**p, "w3": p["w3"], "b1": 2 * p["b1"]}, x) + (x @ p["w1"])[:, :1] * 0

    with pytest.raises(ValueError, match=r"the models run different programs: at one place they come to .*leaf 'w1'"):
        block_apply(mlp_spec, plan, [mlp, other])(wide, X)
    with pytest.raises(ValueError, match="the plan is for 2 models, but 3 functions were given"):
        block_apply(mlp_spec, plan, [mlp] * 3)


def test_programs_of_unlike_length_are_told(drawn):
    params = drawn(MLP, 0)

    def program(apply):
        return steps(apply, params, X, fetch=lambda ref: params[ref.leaf])

    def answer(uses):
        return [use.result(params[use.ref.leaf]) for use in uses]

    with pytest.raises(ValueError, match="they come to leaf 'w2' and the end"):
        together([program(mlp), program(lambda p, x: x @ p["w1"] + p["b1"])], answer)


def test_weights_that_do_not_fit_the_plan_are_refused(mlp_spec, half):
    plan, wide = half
    network = block_apply(mlp_spec, plan, mlp)
    with pytest.raises(ValueError, match="leaf 'w2', axis 0: the merged model has size 8, the spec expects 12"):
        network({**wide, "w2": wide["w2"][:8, :6]}, X)
    with pytest.raises(ValueError, match="'b3'"):
        network({name: leaf for name, leaf in wide.items() if name != "b3"}, X)
