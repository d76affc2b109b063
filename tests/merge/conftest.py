"""What the tests of merging share: networks written as users write them, random weights, and plans of one ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.merge.partial import partial_plan, widenable


@pytest.fixture
def ordinary_promotion(strict_promotion):
    """Undo the suite's strict rules for ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def drawn():
    """`drawn(like, seed)`: NumPy weights that keep activations of order one; vectors in [0.5, 1.5)."""

    def draw(like, seed: int):
        rng = np.random.default_rng(seed)

        def leaf(x):
            fan_in = np.prod(x.shape[:-1])
            values = rng.uniform(0.5, 1.5, x.shape) if len(x.shape) < 2 else rng.standard_normal(x.shape) / fan_in**0.5
            return values.astype(x.dtype)

        return jax.tree.map(leaf, like)

    return draw


@pytest.fixture(scope="session")
def plan_of():
    """`plan_of(spec, ratio, models)`: the plan in which every group keeps the same share of units separate."""

    def plan(spec, ratio, models: int = 2):
        return partial_plan(spec, ratios=dict.fromkeys(widenable(spec), ratio), models=models)

    return plan


@pytest.fixture(scope="session")
def differ():
    """`differ(a, b)`: the largest difference between two arrays or tuples of arrays, relative to the second."""

    def difference(a, b) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)

    return difference
