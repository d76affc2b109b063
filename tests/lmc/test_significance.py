"""Paired tests and correlations: hand-made cases, SciPy's own numbers, refusals."""

import numpy as np
import pytest
from scipy import stats

from permjax.lmc.significance import barrier_against_r, paired_test

pytestmark = pytest.mark.fast

BEFORE = np.array([10.0, 11, 12, 10.5, 11.5])
AFTER = BEFORE * [0.9, 0.92, 0.91, 0.93, 0.89]


def test_distances_that_fall_in_every_pair_are_significant_and_the_other_direction_is_not():
    found = paired_test(BEFORE, AFTER)
    assert found.pairs == 5
    np.testing.assert_allclose(found.mean, (BEFORE - AFTER).mean())
    assert found.t_p_value < 0.001
    assert found.wilcoxon_p_value == 2**-5
    assert paired_test(AFTER, BEFORE).t_p_value > 0.99


def test_the_t_test_is_the_one_sample_test_of_the_differences():
    d = BEFORE - AFTER
    t = d.mean() / (d.std(ddof=1) / np.sqrt(5))
    np.testing.assert_allclose(paired_test(BEFORE, AFTER).t_p_value, stats.t.sf(t, df=4), rtol=1e-9)


def test_noise_is_rarely_significant():
    rng = np.random.default_rng(0)
    found = [paired_test(*rng.standard_normal((2, 6))).t_p_value for _ in range(200)]
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.1


def test_barriers_that_fall_with_r_are_anticorrelated():
    r = np.linspace(0, 1, 6)
    found = barrier_against_r(np.exp(-3 * r), r)
    np.testing.assert_allclose(found.spearman, -1)
    assert -1 < found.pearson < -0.9
    assert found.pearson_p_value < 0.05


def test_too_few_pairs_and_useless_values_are_refused():
    with pytest.raises(ValueError, match="at least 5 pairs"):
        paired_test(BEFORE[:4], AFTER[:4])
    with pytest.raises(ValueError, match=r"shapes are \[\(5,\), \(4,\)\]"):
        barrier_against_r(BEFORE, AFTER[:4])
    with pytest.raises(ValueError, match="no spread"):
        paired_test(BEFORE, BEFORE)
    with pytest.raises(ValueError, match="nothing to correlate"):
        barrier_against_r(BEFORE, np.ones(5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        paired_test(BEFORE, np.array([1.0, 2.0, 3.0, 4.0, np.nan]))
