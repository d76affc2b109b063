"""Scores in blocks of rows are scores of the whole table, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.blocks import against_table
from permjax.kge.flows import Nfe2, Nfe3
from permjax.kge.models import against_all, moved

D, HEADS, RELATIONS = 3, jnp.array([0, 4, 8, 4]), jnp.array([1, 0, 2, 3])
WEIGHTS = np.random.default_rng(0).standard_normal((4, 9))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def value_and_gradient(family, params, f):
    def weighted(params):
        scores = f(params, moved(family, params, HEADS, RELATIONS))
        return (scores * WEIGHTS).sum(), scores

    (_, scores), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    return scores, gradient


@pytest.mark.parametrize(("family", "rows"), [(Nfe2(D), 3), (Nfe2(D), 4), (Nfe3(D), 8), (Nfe3(D), 9)])  # of nine
def test_blocks_of_any_size_give_the_same_scores_and_gradients(family, rows):
    params = family.init(jax.random.key(0), 9, 4, 1.0)
    width = family.key(family.entity(params["entity"])).vector.shape[-1]
    expected = value_and_gradient(family, params, lambda params, x: against_all(family, params, x))
    found = value_and_gradient(
        family, params, lambda params, x: against_table(family, params["entity"], x, rows * width)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_seeds_can_be_mapped_over():
    family = Nfe2(D)
    stack = jax.vmap(lambda key: family.init(key, 9, 4, 1.0))(jax.random.split(jax.random.key(0), 2))

    def total(params):
        return (against_table(family, params["entity"], moved(family, params, HEADS, RELATIONS), 30) ** 2).sum()

    together = jax.jit(jax.vmap(jax.grad(total)))(stack)
    for seed in range(2):
        alone = jax.jit(jax.grad(total))(jax.tree.map(lambda x, seed=seed: x[seed], stack))
        for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(x[seed], y, rtol=1e-10, atol=1e-12)
