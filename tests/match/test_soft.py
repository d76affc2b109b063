"""Soft permutations act as hard ones where they are hard, and as their mean where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.match.soft import barycentre, from_permutations, mix, rounded, soft_permute, soft_shape
from permjax.permutation import identity, random_permutations
from permjax.symmetry.blocks import extract, leaf_blocks

pytestmark = pytest.mark.fast


def drawn(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {leaf.name: rng.standard_normal(leaf.shape, np.float32) for leaf in spec.leaves}


def test_hard_matrices_act_like_their_permutations(zoo_spec):
    params, p = drawn(zoo_spec), jax.device_get(random_permutations(zoo_spec, jax.random.key(1)))
    act = jax.jit(lambda p, params: soft_permute(zoo_spec, from_permutations(zoo_spec, p), params))
    hard, soft = permute(zoo_spec, p, params), act(p, params)
    for name in params:
        np.testing.assert_allclose(soft[name], hard[name], atol=1e-6)


def test_rounding_hard_matrices_gives_their_permutations_back(zoo_spec):
    p = random_permutations(zoo_spec, jax.random.key(2))
    back = rounded(zoo_spec, from_permutations(zoo_spec, p))
    for group in p:
        np.testing.assert_array_equal(back[group], p[group])
        assert from_permutations(zoo_spec, p)[group].shape == soft_shape(zoo_spec, group)


def test_rounding_takes_the_likelier_of_two_permutations(zoo_spec):
    p, q = (random_permutations(zoo_spec, jax.random.key(i)) for i in (3, 4))
    one, two = (from_permutations(zoo_spec, x) for x in (p, q))
    back = rounded(zoo_spec, {g: 0.6 * one[g] + 0.4 * two[g] for g in one})
    for group in p:
        np.testing.assert_array_equal(back[group], p[group])


def test_the_barycentre_makes_all_units_alike(zoo_spec):
    params, centre = drawn(zoo_spec), barycentre(zoo_spec)
    p = random_permutations(zoo_spec, jax.random.key(5))
    one, two = (soft_permute(zoo_spec, centre, x) for x in (params, permute(zoo_spec, p, params)))
    for name in params:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_the_gradient_at_the_identity_is_the_gram_matrix(zoo):
    spec = zoo["mlp"]
    a, b = drawn(spec, 0), drawn(spec, 1)

    def objective(soft):
        return sum(jnp.vdot(a[n], leaf) for n, leaf in soft_permute(spec, soft, b).items() if n != "b/mean")

    slope = jax.grad(objective)(from_permutations(spec, identity(spec)))["h0"]
    expected = a["a/kernel"].T @ b["a/kernel"] + a["b/kernel"] @ b["b/kernel"].T + np.outer(a["a/bias"], b["a/bias"])
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)


def test_a_block_is_linear_in_every_matrix(zoo):
    spec = zoo["attention, fused and split"]
    p, q = (from_permutations(spec, random_permutations(spec, jax.random.key(i))) for i in (6, 7))
    for block in leaf_blocks(spec, spec.leaf("fused")):
        value = jnp.asarray(extract(block, drawn(spec)["fused"]))
        for group in p:
            half = p | {group: 0.25 * p[group] + 0.75 * q[group]}
            expected = 0.25 * mix(block, p, value) + 0.75 * mix(block, p | {group: q[group]}, value)
            np.testing.assert_allclose(mix(block, half, value), expected, atol=1e-5)


def test_an_integer_leaf_that_would_be_mixed_is_refused(zoo):
    spec = zoo["mlp"]
    params = drawn(spec) | {"a/bias": np.arange(5)}
    with pytest.raises(ValueError, match="'a/bias'"):
        soft_permute(spec, barycentre(spec), params)
