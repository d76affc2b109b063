"""An extracted LoRA is the best of its rank."""

import numpy as np
import pytest

from permjax.lora import extract
from permjax.lora.extract import extract_lora

pytestmark = pytest.mark.fast


def weights(shape, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    flat = rng.standard_normal((shape[0], 5)) * np.exp(-np.arange(5)) @ rng.standard_normal((5, np.prod(shape[1:])))
    return base.astype(np.float32), (base + flat.reshape(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(9, 12), (12, 9), (6, 4, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_the_tail_of_the_singular_values(shape, rank):
    base, tuned = weights(shape)
    found = extract_lora(base, tuned, rank)
    change = (tuned - base).astype(float).reshape(shape[0], -1)
    values = np.linalg.svd(change, compute_uv=False)
    a, b = found.factors
    assert (a.shape, b.shape) == ((rank, change.shape[1]), (shape[0], rank))
    assert np.linalg.norm(change - b @ a) == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4, abs=1e-4)
    assert found.kept == pytest.approx(np.sum(values[:rank] ** 2) / np.sum(values**2), rel=1e-5)
    assert found.norm == pytest.approx(np.linalg.norm(values), rel=1e-5)


def test_random_projections_are_next_to_the_best_and_always_the_same(monkeypatch):
    monkeypatch.setattr(extract, "EXACT", 40)
    rng = np.random.default_rng(0)
    base = np.zeros((150, 120), np.float32)
    tuned = (rng.standard_normal((150, 120)) / 20 + weights((150, 120))[1] - weights((150, 120))[0]).astype(np.float32)
    found, again = extract_lora(base, tuned, 8), extract_lora(base, tuned, 8)
    values = np.linalg.svd(tuned.astype(float), compute_uv=False)
    error = np.linalg.norm(tuned - found.factors.b @ found.factors.a)
    assert np.linalg.norm(values[8:]) * (1 - 1e-6) <= error <= 1.002 * np.linalg.norm(values[8:])
    assert all((x == y).all() for x, y in zip(found.factors, again.factors, strict=True))


def test_a_rank_above_the_matrix_is_filled_up_with_zeros():
    base, tuned = weights((3, 4))
    a, b = extract_lora(base, tuned, 6).factors
    assert (a.shape, b.shape) == ((6, 4), (3, 6))
    np.testing.assert_allclose(b @ a, tuned - base, atol=1e-5)
    assert not a[3:].any()


def test_an_unchanged_weight_gives_zeros():
    base, _ = weights((5, 4))
    found = extract_lora(base, base, 2)
    assert not found.factors.a.any()
    assert (found.norm, found.kept) == (0, 1)


@pytest.mark.parametrize(
    ("shapes", "rank", "words"),
    [(((3, 4), (4, 3)), 1, r"\(3, 4\) and \(4, 3\)"), (((3,), (3,)), 1, "four axes"), (((3, 4), (3, 4)), 0, "rank")],
)
def test_what_is_no_pair_of_weights_is_refused(shapes, rank, words):
    with pytest.raises(ValueError, match=words):
        extract_lora(*map(np.zeros, shapes), rank)
