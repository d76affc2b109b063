"""The block-by-block passes of the methods on full matrices."""

import numpy as np
import pytest

from permjax.lora import dense
from permjax.lora.merge import merge_loras
from permjax.lora.methods import lora_method
from permjax.lora.pool import Factors

pytestmark = pytest.mark.fast


def draw(rng):
    return Factors(rng.standard_normal((4, 24)).astype(np.float32), rng.standard_normal((20, 4)).astype(np.float32))


@pytest.mark.parametrize("density", [0.0001, 0.013, 0.5, 1.0])
def test_the_threshold_of_a_block_by_block_pass_is_exact(density, monkeypatch):
    monkeypatch.setattr(dense, "_BLOCK", 64)
    one = draw(np.random.default_rng(0))
    magnitudes = np.sort(np.abs(np.concatenate([one.b[i : i + 2] @ one.a for i in range(0, 20, 2)])), axis=None)
    count = int(density * magnitudes.size)
    assert dense.threshold(one, density) == (magnitudes[-count] if count else np.inf)


def test_the_singular_vectors_of_a_large_matrix_are_those_of_a_full_decomposition(monkeypatch):
    rng = np.random.default_rng(0)
    adapters = [{"m": draw(rng)} for _ in range(3)]

    def merged(parts):
        one = merge_loras(parts, lora_method("ties_svd"))["m"]
        return one.b @ one.a

    whole = merged(adapters)
    monkeypatch.setattr(dense, "_SMALL", 4)
    monkeypatch.setattr(dense, "_BLOCK", 64)
    np.testing.assert_allclose(merged(adapters), whole, atol=1e-5)
    silent = [{"m": Factors(one["m"].a, np.zeros_like(one["m"].b))} for one in adapters]
    assert not np.any(merged(silent))
