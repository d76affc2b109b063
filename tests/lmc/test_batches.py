"""Batches: every example once, a shorter last one by its size, bad data by its lengths."""

import jax.numpy as jnp
import numpy as np
import pytest

from permjax.lmc.batches import cut, each_batch, over_batches

pytestmark = pytest.mark.fast

X, Y = np.arange(7, dtype=np.float32), np.arange(14, dtype=np.float32).reshape(7, 2)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_the_mean_over_batches_is_the_mean_over_examples(batch_size):
    parts, sizes = cut((X, Y), batch_size)
    assert sum(sizes) == 7
    found = each_batch(lambda x, y: {"x": jnp.mean(x), "y": jnp.mean(y)}, parts)
    np.testing.assert_allclose(over_batches(sizes, found["x"]), X.mean())
    np.testing.assert_allclose(over_batches(sizes, found["y"]), Y.mean())


@pytest.mark.parametrize(("data", "size"), [((X, Y[:3]), 2), ((), 2), ((X[:0],), 2), ((X,), 0), ((np.float32(1),), 1)])
def test_data_that_cannot_be_cut_are_refused(data, size):
    with pytest.raises(ValueError, match="arrays of one length above zero"):
        cut(data, size)
