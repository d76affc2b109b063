"""Ranks are chosen by singular values: smallest for an energy, best for a budget."""

import itertools

import numpy as np
import pytest

from permjax.lora.pool import Factors
from permjax.lora.ranks import rank_for_energy, ranks_for_budget, spectra

pytestmark = pytest.mark.fast


def adapters(seed=0, sizes=((8, 9), (7, 8)), ranks=(2, 3)):
    rng = np.random.default_rng(seed)

    def factors(rank, m, n):
        return Factors(*(rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n), (m, rank))))

    return [{f"m{i}": factors(rank, *size) for i, size in enumerate(sizes)} for rank in ranks]


def test_spectra_are_the_singular_values_of_the_weighted_sum():
    inputs, weights = adapters(), (0.3, -2.0)
    inputs[0]["alone"] = inputs[0]["m0"]
    found = spectra(inputs, weights)
    assert list(found) == ["m0", "m1", "alone"]
    for name, values in found.items():
        total = sum(w * one[name].b @ one[name].a for w, one in zip(weights, inputs, strict=True) if name in one)
        expected = np.linalg.svd(total.astype(float), compute_uv=False)[: len(values)]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.8, 0.95, 0.999, 1.0])
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(energy):
    values = spectra(adapters(sizes=((8, 9), (7, 8), (9, 9))))
    total = sum(np.sum(s.astype(float) ** 2) for s in values.values())
    kept = [sum(np.sum(s[:k].astype(float) ** 2) for s in values.values()) / total for k in range(1, 6)]
    found = rank_for_energy(values, energy)
    assert kept[found - 1] >= energy - 1e-9
    assert found == 1 or kept[found - 2] < energy


@pytest.mark.parametrize("seed", range(4))
def test_no_other_spending_of_a_budget_keeps_more(seed):
    values = spectra(adapters(seed, sizes=((8, 9), (7, 8), (3, 9))))
    for total in range(3, 14):
        ranks = ranks_for_budget(values, total)
        best = max(
            energy(values, dict(zip(values, choice, strict=True)))
            for choice in itertools.product(range(1, 6), repeat=3)
            if sum(choice) <= total
        )
        assert sum(ranks.values()) <= total
        assert min(ranks.values()) >= 1
        assert energy(values, ranks) == pytest.approx(best, rel=1e-6)


def energy(values, ranks):
    return sum(np.sum(values[name][:rank].astype(float) ** 2) for name, rank in ranks.items())


def test_ranks_that_no_module_needs_are_not_spent():
    values = {"a": np.array([3.0, 2.0, 1e-8]), "b": np.array([0.0, 0.0])}
    assert ranks_for_budget(values, 100) == {"a": 2, "b": 1}
    assert rank_for_energy(values, 1.0) == 2
    assert rank_for_energy({"b": values["b"]}, 0.9) == 1


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_an_energy_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="share above 0"):
        rank_for_energy({"a": np.ones(2)}, share)


def test_a_budget_below_one_rank_for_each_module_is_refused():
    with pytest.raises(ValueError, match="2 modules need a rank of at least 1"):
        ranks_for_budget({"a": np.ones(2), "b": np.ones(2)}, 1)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, float("inf")), (0.0, 0.0)])
def test_weights_that_do_not_fit_the_adapters_are_refused(weights):
    with pytest.raises(ValueError, match="2 adapters need as many finite weights"):
        spectra(adapters(), weights)
