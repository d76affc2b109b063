"""The tracer finds exactly the groups of the golden table, and pins what it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.nets import registry
from permjax.symmetry.spec import Of, Product, Sum
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.verify import SpecError

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]


def found(spec):
    """Groups as (size, sizes of per, members), sorted."""
    rows = [(g.size, tuple(spec.group(p).size for p in g.per), len(spec.members(g.name))) for g in spec.groups]
    return sorted(rows, key=str)


def agree(rows, expected):
    """Tell whether the rows are the expected ones, where a member count of None fits any."""
    rest = list(rows)
    for size, per, members in sorted(expected, key=lambda row: row[2] is None):
        fitting = [r for r in rest if r[:2] == (size, per) and members in (None, r[2])]
        if not fitting:
            return False
        rest.remove(fitting[0])
    return not rest


@pytest.mark.parametrize("name", zoo.CASES)
def test_groups_equal_the_golden_table(name):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False, **case.options)
    if isinstance(case.groups, int):
        assert len(spec.groups) == case.groups
    else:
        assert agree(found(spec), case.groups), found(spec)


@pytest.mark.parametrize("name", sorted(set(zoo.CASES) - {"resnet-50 with batch norm", "vit"}))
def test_random_permutations_leave_the_function_unchanged(name):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=True, **case.options)
    assert spec.verification.float64 <= spec.verification.tolerance
    assert spec.unverified == ()
    assert (spec.verification.tolerance > 1e-10) == (name in ("lstm", "gru")), "only flax carries force float32"


def test_resnet_50_has_320_leaves():
    assert len(jax.tree.leaves(zoo.resnet50().params)) == 320


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_24_layer_abstract_transformer_has_97_groups(model):
    values = {
        "gpt2": {"n_embd": 64, "n_layer": 24, "n_head": 4, "n_positions": 16},
        "llama": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 24, "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
    }[model]  # fmt: skip
    net = registry.build(registry.config_from_dict({"model_type": model, "vocab_size": 64, **values}))
    params = jax.eval_shape(net.init, jax.random.key(0))
    spec = trace_spec(net.apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32), verify=False)
    assert len(spec.groups) == 97


def test_fused_attention_is_a_sum_of_products():
    spec = trace_spec(*zoo.gpt2()[:2], *zoo.gpt2().inputs, verify=False)
    axis = spec.leaf("h.0.attn.c_attn.weight").axes[1]
    assert isinstance(axis, Sum)
    assert len(axis.segments) == 3
    assert all(isinstance(s, Product) and len(s.factors) == 2 for s in axis.segments)
    query, key, value = axis.segments
    assert query == key
    assert query.factors[0] == value.factors[0]
    assert query.factors[1] != value.factors[1]


def test_names_are_readable_and_do_not_depend_on_dict_order():
    case = zoo.gpt2()
    names = [g.name for g in trace_spec(case.apply, case.params, *case.inputs, verify=False).groups]
    turned = dict(reversed(case.params.items()))
    assert [g.name for g in trace_spec(case.apply, turned, *case.inputs, verify=False).groups] == names
    assert "h.0.attn.c_attn.weight:1/heads" in names
    assert "h.0.mlp.c_fc.weight:1" in names


def dense(p, x):
    return jax.nn.relu(x @ p["w1"]) @ p["w2"]


DENSE = {"w1": zoo.shape(4, 8), "w2": zoo.shape(8, 3)}


def test_nnx_pure_dicts_trace_like_any_pytree():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.two(jax.nn.relu(self.one(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))

    def apply(params, x):
        filled = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(x)

    spec = trace_spec(apply, nnx.to_pure_dict(state), jnp.ones((2, 4)))
    assert [(g.name, g.size) for g in spec.groups] == [("one/kernel:1", 8)]


def test_one_group_may_stand_on_both_axes_of_a_leaf():
    def apply(p, x):
        h = x @ p["into"]
        return jnp.tanh(h + jnp.tanh(h @ p["square"])) @ p["out"]

    params = {"into": zoo.shape(4, 8), "square": zoo.shape(8, 8), "out": zoo.shape(8, 3)}
    spec = trace_spec(apply, params, jnp.ones((2, 4)))
    assert spec.leaf("square").axes == (Of("into:1"), Of("into:1"))


def test_a_leaf_without_effect_is_an_error_unless_listed():
    params = {**DENSE, "dead": zoo.shape(5)}
    with pytest.raises(ValueError, match="leaf 'dead' has no effect"):
        trace_spec(dense, params, jnp.ones((2, 4)))
    spec = trace_spec(dense, params, jnp.ones((2, 4)), unused=("dead",))
    assert "listed as unused" in spec.explain()
    assert len(spec.groups) == 1


def test_frozen_leaves_pin_their_axes_and_statistics_keep_their_role():
    assert trace_spec(dense, DENSE, jnp.ones((2, 4)), frozen=("w1",), verify=False).groups == ()
    case = zoo.small_resnet()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    roles = {leaf.name: leaf.role for leaf in spec.leaves}
    assert roles["batch_stats/BatchNorm_0/mean"] == "statistic"
    assert roles["params/BatchNorm_0/scale"] == "weight"


@pytest.mark.parametrize(
    ("middle", "primitive"),
    [
        (lambda h: jnp.cumsum(h, -1), "cumsum"),
        (lambda h: h[:, ::-1], "rev"),
        (lambda h: h * jnp.arange(8.0), "mul"),
        (lambda h: jnp.fft.fft(h).real, "fft"),
        (lambda h: jnp.where(jnp.argmax(h, -1, keepdims=True) > 3, h, -h), "gt"),
        (lambda h: jnp.concatenate([h[:, ::2], h[:, 1::2]], -1), "slice"),
        (lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2), (1, 1), "SAME"), "reduce_window_max"),
    ],
)
def test_what_orders_units_pins_them_and_is_named(middle, primitive):
    spec = trace_spec(lambda p, x: middle(x @ p["w1"]) @ p["w2"], DENSE, jnp.ones((2, 4)))
    assert spec.groups == ()
    assert primitive in spec.explain()


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: jnp.sort(h, -1).sum(-1, keepdims=True) * h,
        lambda h: jax.nn.softmax(h, -1),
        lambda h: jax.nn.one_hot(jnp.argmax(h, -1), 8) * h,
        lambda h: h @ jnp.eye(8),
        lambda h: jnp.take_along_axis(h, jnp.argmax(h, -1)[:, None], -1) + h,
        lambda h: jnp.pad(h, ((0, 0), (2, 0)))[:, 2:],
        lambda h: jnp.concatenate([h, h], -1).reshape(-1, 2, 8).sum(1),
        lambda h: jnp.split(jnp.concatenate([h, jnp.ones_like(h[:, :3])], -1), [8], -1)[0],
    ],
)
def test_what_treats_units_alike_leaves_them_free(middle):
    spec = trace_spec(lambda p, x: middle(jnp.tanh(x @ p["w1"])) @ p["w2"], DENSE, jnp.ones((2, 4)))
    assert [g.size for g in spec.groups] == [8]


def test_mutual_per_is_fused_into_one_class():
    def apply(p, x):
        h = jax.nn.relu(x @ p["w1"]).reshape(-1, 4, 2)
        return jnp.tanh(h).reshape(-1, 8) @ p["w2"]

    spec = trace_spec(apply, DENSE, jnp.ones((2, 4)))
    assert [(g.name, g.size) for g in spec.groups] == [("w1:1", 8)]


@pytest.mark.parametrize("name", zoo.COUNTER_EXAMPLES)
def test_the_counter_examples_of_per_are_not_per(name):
    apply, shapes, _ = zoo.COUNTER_EXAMPLES[name]
    spec = trace_spec(apply, {k: zoo.shape(*s) for k, s in shapes.items()}, zoo.image(2, 4), verify=True)
    assert all(g.per == () for g in spec.groups)
    assert 5 in [g.size for g in spec.groups]


def test_a_rule_that_is_wrong_is_caught_by_verification(monkeypatch):
    from permjax.symmetry.walk import RULES

    monkeypatch.setitem(RULES, "cumsum", lambda walk, eqn, operands: [walk.like(operands[0], eqn)])

    def apply(p, x):
        return jnp.cumsum(x @ p["w1"], -1) @ p["w2"]

    with pytest.raises(SpecError, match="w1:1"):
        trace_spec(apply, DENSE, jnp.ones((2, 4)))
    pinned = trace_spec(apply, DENSE, jnp.ones((2, 4)), on_failure="pin")
    assert pinned.groups == ()
    assert "failed verification" in pinned.explain()


def test_abstract_token_inputs_are_drawn_inside_the_vocabulary():
    case = zoo.gpt2()
    spec = trace_spec(case.apply, case.params, jax.ShapeDtypeStruct((1, 4), np.int32), verify=True)
    assert spec.verification.float64 < 1e-10
