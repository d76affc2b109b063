"""Captured activations are the ones that carry the group, in the order of its units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from permjax.action import permute
from permjax.permutation import random_permutations
from permjax.symmetry.capture import capture
from permjax.symmetry.trace import trace_spec

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]

CASES = [
    "mlp", "vgg with pools and flatten", "small resnet with batch norm", "depthwise and grouped convolutions",
    "group norm", "gpt-2", "llama with partial rope", "phi-3 fused", "lstm", "stacked transformer in scan",
]  # fmt: skip


def filled(params, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(draw.uniform(0.2, 1.0, a.shape), jnp.float32), params)


def setup(name):
    case = zoo.CASES[name]()
    return case, trace_spec(case.apply, case.params, *case.inputs, verify=False), filled(case.params)


@pytest.mark.parametrize("name", CASES)
def test_activations_move_with_the_units(name):
    case, spec, params = setup(name)
    perms = {g: np.asarray(p) for g, p in random_permutations(spec, jax.random.key(3)).items()}
    run = jax.jit(lambda p, *x: capture(case.apply, spec, p, *x).groups)
    before, after = run(params, *case.inputs), run(permute(spec, perms, params), *case.inputs)
    for group in spec.groups:
        if not group.per:
            for tap, old in before[group.name].items():
                moved = np.asarray(old)[:, perms[group.name]]
                ordered = [np.sort(np.asarray(a), 0) for a in (moved, after[group.name][tap])]
                np.testing.assert_allclose(*ordered, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_group_of_these_models_has_taps_of_its_shape(name):
    case, spec, params = setup(name)
    groups = jax.eval_shape(lambda p, *x: capture(case.apply, spec, p, *x).groups, params, *case.inputs)
    for group in spec.groups:
        assert groups[group.name], group
        assert all(a.shape[1:] == spec.shape(group.name) for a in groups[group.name].values())


def test_within_head_activations_follow_head_and_dim():
    case, spec, params = setup("gpt-2")
    perms = {g: np.asarray(p) for g, p in random_permutations(spec, jax.random.key(3)).items()}
    heads, dim = "h.0.attn.c_attn.weight:1/heads", "h.0.attn.c_attn.weight:1/part2.1.dim"
    run = jax.jit(lambda p, *x: capture(case.apply, spec, p, *x).groups[dim])
    before, after = run(params, *case.inputs), run(permute(spec, perms, params), *case.inputs)
    for tap, old in before.items():
        moved = np.asarray(old)[:, perms[heads][:, None], perms[dim]]
        np.testing.assert_allclose(moved, after[tap], rtol=2e-4, atol=2e-4)


def test_leaf_io_is_the_contraction_of_input_and_weight():
    case, spec, params = setup("mlp")
    leaves = capture(case.apply, spec, params, *case.inputs).leaves
    assert list(leaves) == ["params/Dense_0/kernel", "params/Dense_1/kernel", "params/Dense_2/kernel"]
    for name, io in leaves.items():
        layer = name.split("/")[1]
        np.testing.assert_allclose(io.input @ params["params"][layer]["kernel"], io.output, rtol=1e-4)
        assert (io.in_axes, io.out_axes, io.bias) == ((0,), (1,), f"params/{layer}/bias")


def test_the_first_hidden_activation_is_what_one_computes_by_hand():
    case, spec, params = setup("mlp")
    taps = capture(case.apply, spec, params, *case.inputs).groups["params/Dense_0/kernel:1"]
    np.testing.assert_allclose(
        taps["params/Dense_0/kernel"], case.inputs[0] @ params["params"]["Dense_0"]["kernel"], rtol=1e-4
    )


def test_capture_inside_a_scan_has_one_row_per_layer():
    case, spec, params = setup("stacked transformer in scan")
    io = capture(case.apply, spec, params, *case.inputs).leaves["layers/w1"]
    assert (io.stacked, io.input.shape, io.output.shape) == (1, (3, 2, 5, 12), (3, 2, 5, 16))
    np.testing.assert_allclose(jnp.einsum("lbti,lij->lbtj", io.input, params["layers"]["w1"]), io.output, rtol=1e-4)
