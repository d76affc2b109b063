"""Programs run step by step: they compute what the function computes, and stop where a leaf is contracted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax import tree
from permjax.symmetry.program import Ref, steps, survey

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]

CASES = [
    "mlp",
    "vgg with pools and flatten",
    "depthwise and grouped convolutions",
    "gpt-2",
    "llama, heads by repeat",
    "mixture of experts, one hot",
    "mixture of experts, ragged",
    "lstm",
    "stacked transformer in scan",
    "stacked transformer in a loop",
]


def drawn(like, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 3, x.dtype), like)


def run(apply, params, *inputs, answer=None):
    """Run a program to its end: (outputs, uses, names of fetched leaves, sets of derived leaves)."""
    named, uses, fetched, derived = tree.flatten(params), [], [], []

    def fetch(ref: Ref):
        fetched.append(ref.leaf)
        return named[ref.leaf]

    program, reply = steps(apply, params, *inputs, fetch=fetch, derived=derived.append), None
    while True:
        try:
            use = program.send(reply)
        except StopIteration as stop:
            return stop.value, uses, fetched, derived
        uses.append(use)
        reply = (answer or (lambda use: use.result(named[use.ref.leaf])))(use)


@pytest.mark.parametrize("name", CASES)
def test_a_program_gives_what_the_function_gives(name):
    case = zoo.CASES[name]()
    params = drawn(case.params)
    wanted = jax.tree.leaves(jax.jit(case.apply)(params, *case.inputs))
    found = jax.jit(lambda params, *inputs: run(case.apply, params, *inputs)[0])(params, *case.inputs)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_survey_sees_what_a_run_meets_without_values(name):
    case = zoo.CASES[name]()
    found = survey(case.apply, case.params, *jax.eval_shape(lambda *x: x, *case.inputs))
    named = tree.flatten(case.params)

    def go(*inputs):
        nonlocal seen
        outputs, *seen = run(case.apply, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), case.params), *inputs)
        return outputs

    seen = []
    jax.eval_shape(go, *case.inputs)
    uses, fetched, derived = seen
    assert [use.ref for use in found.uses] == [use.ref for use in uses]
    assert found.fetched == set(fetched)
    assert found.derived == frozenset().union(*derived)
    assert set(named) == {use.ref.leaf for use in found.uses} | found.fetched


def test_replies_take_the_place_of_contractions():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}

    def apply(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    (found,), *_ = run(apply, params, jnp.ones((5, 3)), answer=lambda use: 7 * jnp.ones(use.eqn.outvars[0].aval.shape))
    np.testing.assert_array_equal(found, 7 * np.ones((5, 2)))


LAYOUTS = {
    "rows times columns": (lambda p, x: x @ p["w"], (4, 5), (0,), (1,)),
    "torch": (lambda p, x: x @ p["w"].T, (5, 4), (1,), (0,)),
    "leaf first": (lambda p, x: p["w"] @ x.T, (5, 4), (1,), (0,)),
    "heads": (lambda p, x: jnp.einsum("bi,hdi->bhd", x, p["w"]), (2, 3, 4), (2,), (0, 1)),
    "two contracted": (lambda p, x: jnp.einsum("bij,jio->bo", x.reshape(-1, 2, 2), p["w"]), (2, 2, 5), (1, 0), (2,)),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, x]), p["w"]), (2, 4, 5), (1,), (0, 2)),
    "experts last": (lambda p, x: jnp.einsum("ebi,ioe->ebo", jnp.stack([x, x]), p["w"]), (4, 5, 2), (0,), (2, 1)),
    "cast before": (lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32).T, (5, 4), (1,), (0,)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_axes_are_those_of_the_leaf_in_every_layout(name):
    apply, shape, contracted, made = LAYOUTS[name]
    params, x = drawn({"w": zoo.shape(*shape)}), zoo.image(3, 4)
    (found,), (use,), fetched, derived = run(apply, params, x)
    assert sorted(use.contracted) == sorted(contracted)
    assert use.made == made
    assert not fetched
    assert not derived
    np.testing.assert_allclose(found, apply(params, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_axes_of_convolutions_are_those_of_features(numbers):
    def apply(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)

    sizes = {"H": 3, "W": 3, "I": 2, "O": 4}
    params = drawn({"w": zoo.shape(*(sizes[letter] for letter in numbers[1]))})
    x = zoo.image(*({"N": 2, "H": 5, "W": 5, "C": 2}[letter] for letter in numbers[0]))
    (found,), (use,), *_ = run(apply, params, x)
    assert use.contracted == (numbers[1].index("I"),)
    assert use.made == (numbers[1].index("O"),)
    np.testing.assert_allclose(found, apply(params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_loops_over_leaves_are_unrolled_in_their_order(reverse):
    def apply(p, x):
        def body(h, layer):
            return jnp.tanh(h @ layer["w"]) + layer["b"], h.sum()

        return jax.lax.scan(body, x, p, reverse=reverse)

    params = drawn({"w": zoo.shape(3, 4, 4), "b": zoo.shape(3, 4)})
    x = zoo.image(2, 4)
    (h, sums), uses, fetched, _ = run(apply, params, x)
    order = [2, 1, 0] if reverse else [0, 1, 2]
    assert [use.ref.at for use in uses] == [((0, i),) for i in order]
    assert all(use.contracted == (1,) and use.made == (2,) for use in uses)
    assert set(fetched) == {"b"}
    wanted = apply(params, x)
    np.testing.assert_allclose(h, wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums, wanted[1], rtol=1e-5, atol=1e-6)


def test_loops_that_use_no_leaf_by_rows_still_stop_at_every_turn():
    def apply(p, x):
        return jax.lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row), None), jnp.zeros((2, 4)), x)[0]

    params, x = drawn({"w": zoo.shape(4, 4)}), zoo.image(5, 2, 4)
    (found,), uses, *_ = run(apply, params, x)
    assert [use.ref.at for use in uses] == [()] * 5
    np.testing.assert_allclose(found, apply(params, x), rtol=1e-5, atol=1e-6)


def test_what_is_computed_from_leaves_is_told_apart():
    def apply(p, x):
        return (x @ (p["a"] * p["scale"])) @ jax.nn.softmax(p["b"]) @ p["c"]

    params = drawn({"a": zoo.shape(4, 4), "scale": zoo.shape(4), "b": zoo.shape(4, 4), "c": zoo.shape(4, 2)})
    found = survey(apply, params, zoo.image(3, 4))
    assert [use.ref.leaf for use in found.uses] == ["c"]
    assert found.fetched == {"a", "scale", "b"}
    assert found.derived == {"a", "scale", "b"}


def test_products_of_two_leaves_and_of_two_activations_are_no_uses():
    def apply(p, x):
        return jnp.tanh(x @ x.T).sum() + (p["a"] @ p["b"]).sum()

    found = survey(apply, {"a": zoo.shape(2, 3), "b": zoo.shape(3, 2)}, zoo.image(3, 4))
    assert found == ((), frozenset({"a", "b"}), frozenset())


def test_leaves_are_followed_into_calls():
    @jax.jit
    def inner(w, x):
        return jax.checkpoint(lambda w, x: jax.nn.relu(x @ w))(w, x)

    params, x = drawn({"w": zoo.shape(4, 5)}), zoo.image(3, 4)
    (found,), uses, fetched, _ = run(lambda p, x: inner(p["w"].T.T, x), params, x)
    assert [use.ref.leaf for use in uses] == ["w"]
    assert not fetched
    np.testing.assert_allclose(found, jax.nn.relu(x @ params["w"]), rtol=1e-5)


def test_outputs_that_are_leaves_or_inputs_or_constants_are_returned():
    params, x = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, zoo.image(3, 4)
    found, *_ = run(lambda p, x: (p["w"].T, x, 3.0), params, x)
    np.testing.assert_array_equal(found[0], params["w"].T)
    np.testing.assert_array_equal(found[1], x)
    assert found[2] == 3.0


def test_programs_can_be_compiled_and_differentiated():
    def apply(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    params, x = drawn({"a": zoo.shape(4, 5), "b": zoo.shape(5, 2)}), zoo.image(3, 4)

    def loss(function, params):
        return (function(params, x) ** 2).sum()

    mine = jax.jit(jax.grad(partial(loss, lambda p, x: run(apply, p, x)[0][0])))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), mine, jax.grad(partial(loss, apply))(params))
