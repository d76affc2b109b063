"""Work of contractions: closed forms, loops, and which groups stand on them."""

from math import prod

import jax
import jax.numpy as jnp
import pytest
import zoo

from permjax.symmetry.capture import capture
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.work import Work, contractions

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]


def of_case(name: str):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    return case, spec, contractions(case.apply, spec, case.params, *case.inputs)


def per_entry(spec, work: Work) -> float:
    return work.multiply_adds / prod(spec.leaf(work.leaf).shape)


def test_a_perceptron_uses_every_weight_once_per_sample():
    _, spec, found = of_case("mlp")
    first, second = "params/Dense_0/kernel:1", "params/Dense_1/kernel:1"
    assert [work.groups for work in found] == [(first,), (first, second), (second,)]
    assert [per_entry(spec, work) for work in found] == [3, 3, 3]


def test_a_convolution_uses_every_weight_once_per_output_position():
    _, spec, found = of_case("small resnet with batch norm")
    assert [per_entry(spec, work) for work in found] == [2 * 64] * 3 + [2 * 16] * 3 + [2]


def test_grouped_convolutions_count_the_products_that_exist():
    _, spec, found = of_case("depthwise and grouped convolutions")
    assert [per_entry(spec, work) for work in found] == [2 * 36] * 4 + [2]


@pytest.mark.parametrize("name", ["stacked transformer in scan", "lstm"])
def test_a_scan_counts_every_turn(name):
    _, spec, found = of_case(name)
    if name == "lstm":
        assert {per_entry(spec, work) for work in found} == {2 * 4}
        return
    _, _, unrolled = of_case("stacked transformer in a loop")
    assert sum(work.multiply_adds for work in found) == sum(work.multiply_adds for work in unrolled)
    assert {per_entry(spec, work) for work in found if work.leaf} == {2 * 5}


def test_products_of_activations_have_no_leaf_but_groups():
    _, spec, found = of_case("gpt-2")
    scores, mixing = [work for work in found if work.leaf is None][:2]
    assert scores.multiply_adds == mixing.multiply_adds == 2 * 4 * 5 * 5 * 6
    heads = "h.0.attn.c_attn.weight:1/heads"
    assert heads in scores.groups
    assert heads in mixing.groups


def test_groups_that_are_contracted_come_first_in_every_layout():
    def rows_first(p, x):
        return jnp.tanh(x @ p["a"].T) @ p["b"].T

    x = jnp.ones((3, 4))
    params = {"a": jnp.ones((5, 4)), "b": jnp.ones((2, 5)), "c": jnp.ones((2, 2))}

    def three(p, x):
        return jnp.tanh(rows_first(p, x)) @ p["c"].T

    spec = trace_spec(three, params, x)
    assert [work.groups for work in contractions(three, spec, params, x)] == [("a:0",), ("a:0", "b:0"), ("b:0",)]


@pytest.mark.parametrize("name", ["mlp", "vgg with pools and flatten", "small resnet with batch norm", "vit", "gpt-2"])
def test_leaves_and_their_work_agree_with_the_captured_shapes(name):
    case, spec, found = of_case(name)
    shapes = {}
    jax.eval_shape(lambda p, *x: shapes.update(capture(case.apply, spec, p, *x).leaves), case.params, *case.inputs)
    with_leaf = [work for work in found if work.leaf is not None]
    assert [work.leaf for work in with_leaf] == list(shapes)
    for work in with_leaf:
        io, leaf = shapes[work.leaf], spec.leaf(work.leaf).shape
        made = prod(leaf[i] for i in io.out_axes)
        assert work.multiply_adds == prod(io.output.shape) // made * prod(leaf)


def test_what_is_computed_from_leaves_is_no_leaf():
    def apply(p, x):
        return jnp.tanh(x @ (p["a"] * 2)) @ p["b"]

    params, x = {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 2))}, jnp.ones((3, 4))
    spec = trace_spec(apply, params, x)
    first, second = contractions(apply, spec, params, x)
    assert first == Work(None, ("a:1",), 3 * 4 * 5)
    assert second == Work("b", ("a:1",), 3 * 5 * 2)


def test_the_work_of_a_large_network_is_found_without_running_it():
    case = zoo.of_net(
        {"model_type": "resnet", "input_shape": [224, 224, 3], "channels": [64, 128, 256, 512], "blocks": [3, 4, 6, 3],
         "norm": "batch", "block": "bottleneck", "stem": "imagenet"},
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), None,
    )  # fmt: skip
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    total = sum(work.multiply_adds for work in contractions(case.apply, spec, case.params, *case.inputs))
    assert total == pytest.approx(4.09e9, rel=0.01)  # what torchvision and fvcore report, but for the head's width
