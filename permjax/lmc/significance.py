"""Whether an effect over several pairs of models is more than chance."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

_FEWEST = 5


class PairedTest(NamedTuple):
    """Two one-sided tests that values fell, pair by pair; see `paired_test`.

    Attributes:
        pairs: number of pairs.
        mean: mean of before - after.
        std: its standard deviation over pairs.
        t_p_value: of the paired t-test.
        wilcoxon_p_value: of the signed-rank test, which assumes no normal distribution; never below 2^-pairs.
    """

    pairs: int
    mean: float
    std: float
    t_p_value: float
    wilcoxon_p_value: float


class Correlation(NamedTuple):
    """Correlation of barriers with R over several pairs.

    Attributes:
        pairs: number of pairs.
        pearson: linear correlation.
        pearson_p_value: of no linear relation, two-sided.
        spearman: correlation of the ranks.
        spearman_p_value: of no monotone relation, two-sided.
    """

    pairs: int
    pearson: float
    pearson_p_value: float
    spearman: float
    spearman_p_value: float


def paired_test(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> PairedTest:
    """Test whether `after` lies below `before`, such as distances of pairs of models before and after matching.

    Args:
        before: one value for each pair of independently trained models; give disjoint pairs.
        after: the same pairs, in the same order.

    Raises:
        ValueError: fewer than five pairs, values that are not finite, or all differences equal.
    """
    x, y = _columns(before, after)
    difference = x - y
    if np.ptp(difference) == 0:
        raise ValueError(f"All {len(x)} differences are {difference[0]}, so there is no spread to test them against.")
    return PairedTest(
        pairs=len(x),
        mean=float(difference.mean()),
        std=float(difference.std(ddof=1)),
        t_p_value=float(stats.ttest_rel(x, y, alternative="greater").pvalue),  # pyright: ignore[reportAttributeAccessIssue]
        wilcoxon_p_value=float(stats.wilcoxon(difference, alternative="greater").pvalue),  # pyright: ignore[reportAttributeAccessIssue]
    )


def barrier_against_r(barriers: Sequence[float] | np.ndarray, r: Sequence[float] | np.ndarray) -> Correlation:
    """Correlation of barriers with the metric R over pairs of models.

    Pairs that share a model are not independent; then the p-values are too small.

    Raises:
        ValueError: fewer than five pairs, values that are not finite, or one side all equal.
    """
    x, y = _columns(barriers, r)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("All barriers, or all values of R, are equal, so there is nothing to correlate.")
    linear, ranks = stats.pearsonr(x, y), stats.spearmanr(x, y)
    return Correlation(len(x), *(float(value) for value in (*linear, *ranks)))  # pyright: ignore[reportArgumentType]


def _columns(*values: Sequence[float] | np.ndarray) -> list[Float[np.ndarray, " pairs"]]:
    columns = [np.asarray(column, float) for column in values]
    shapes = [column.shape for column in columns]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or shapes[0][0] < _FEWEST:
        raise ValueError(f"Give one value of either kind for each of at least {_FEWEST} pairs; shapes are {shapes}.")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("Some values are NaN or infinite; leave such pairs out.")
    return columns
