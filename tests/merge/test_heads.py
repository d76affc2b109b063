"""Heads of different label spaces: they become units, are kept apart, and may be of unlike sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.merge.block_apply import block_apply
from permjax.merge.heads import own_heads
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan
from permjax.merge.pleas import pleas
from permjax.merge.wide import Wide
from permjax.plan import Plan
from permjax.symmetry.trace import trace_spec

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]

X = zoo.image(40, 5)


def mlp(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def like(classes):
    return {"w1": zoo.shape(5, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, classes), "b2": zoo.shape(classes)}


@pytest.fixture(scope="module")
def heads():
    with jax.numpy_rank_promotion("allow"):
        return own_heads(trace_spec(mlp, like(3), X), mlp, like(3), X)


def test_outputs_become_units_of_a_group_and_the_rest_stays(heads):
    spec = trace_spec(mlp, like(3), X)
    assert heads.leaves == ("b2", "w2")
    (group,) = heads.groups
    assert heads.spec.group(group).size == 3
    assert {g.name for g in heads.spec.groups} - {group} == {g.name for g in spec.groups}
    assert [leaf.name for leaf in heads.spec.leaves] == [leaf.name for leaf in spec.leaves]


@pytest.mark.parametrize("name", ["small resnet with batch norm", "vit"])
def test_heads_of_networks_are_found_with_the_roles_of_their_leaves(name):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    found = own_heads(spec, case.apply, case.params, *case.inputs)
    assert len(found.groups) == 1
    assert {leaf.rsplit("/", 1)[1] for leaf in found.leaves} == {"kernel", "bias"}
    assert [leaf.role for leaf in found.spec.leaves] == [leaf.role for leaf in spec.leaves]


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_every_model_keeps_its_own_head_next_to_the_others(heads, drawn, differ, ratio):
    parents = [drawn(like(3), seed) for seed in (0, 1)]
    plan = partial_plan(heads.spec, ratios=dict.fromkeys(heads.groups, 1) | {"w1:1": ratio})
    wide = wide_average(Wide(heads.spec, plan), parents, contracted_axes(mlp, parents[0], X))
    assert wide["w2"].shape == (8 + 8 * ratio, 6)
    found = jax.jit(block_apply(heads.spec, plan, mlp, joined="concatenate"))(wide, X)
    assert found.shape == (40, 6)
    np.testing.assert_array_equal(wide["b2"], np.concatenate([p["b2"] for p in parents]))
    wanted = jnp.concatenate([mlp(p, X) for p in parents], -1)
    assert (differ(found, wanted) <= 3e-6) == (ratio == 1)


def test_models_may_have_unlike_numbers_of_outputs(heads, drawn, differ):
    parents = [drawn(like(3), 0), drawn(like(4), 1)]
    (group,) = heads.groups
    apart = partial_plan(heads.spec, ratios={"w1:1": 1})
    labels = {**apart.labels, group: (np.arange(3), np.arange(3, 7))}
    plan = Plan(labels, {**apart.widths, group: 7})
    for keep in ((), heads.leaves):
        result = pleas(heads.spec, parents, plan, apply=mlp, data=[X], ridge=1e-8, keep=keep)
        found = jax.jit(block_apply(heads.spec, plan, mlp, joined="concatenate"))(result.models[0], X)
        assert differ(found, jnp.concatenate([mlp(p, X) for p in parents], -1)) <= 1e-5


def test_kept_heads_are_reused_as_they_are(heads, drawn, plan_of):
    parents = [drawn(like(3), seed) for seed in (0, 1)]
    plan = partial_plan(heads.spec, ratios=dict.fromkeys(heads.groups, 1))
    prior = wide_average(Wide(heads.spec, plan), parents, contracted_axes(mlp, parents[0], X))
    kept = pleas(heads.spec, parents, plan, apply=mlp, data=[X], keep=heads.leaves)
    np.testing.assert_array_equal(kept.models[0]["w2"], prior["w2"])
    assert kept.info.layers == ("w1",)
    assert kept.info.averaged == ("w2",)
    refitted = pleas(heads.spec, parents, plan, apply=mlp, data=[X], mode="sequential")
    assert refitted.info.layers == ("w1", "w2")
    assert np.abs(refitted.models[0]["w2"] - prior["w2"]).max() > 1e-3


def test_outputs_that_are_no_units_must_be_shared():
    def tied(p, x):
        return p["embed"][x] @ p["embed"].T

    def total(p, x):
        return jax.nn.relu(x @ p["w"]).sum(-1, keepdims=True)

    for apply, params, x in ((tied, {"embed": zoo.shape(17, 6)}, zoo.tokens(2, 5)), (total, {"w": zoo.shape(5, 6)}, X)):
        spec = trace_spec(apply, params, x)
        with pytest.raises(ValueError, match="the outputs of `apply` are no units of a head of their own"):
            own_heads(spec, apply, params, x)
