"""Models in these tests are written as users write them: with the ordinary promotion rules of JAX."""

import jax
import pytest


@pytest.fixture
def ordinary_promotion(strict_promotion):
    """Undo the suite's strict rules for ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
