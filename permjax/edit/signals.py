"""How well a number tells broken models from sound ones: rank correlations, and areas under ROC curves."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import mannwhitneyu, rankdata, spearmanr
from sklearn.metrics import roc_curve


class Roc(NamedTuple):
    """The curve of a signal: shares of sound and of broken models above a threshold that falls."""

    false_alarms: Float[np.ndarray, " points"]
    found: Float[np.ndarray, " points"]


def auc(signal: Float[np.ndarray, " models"], broken: Bool[np.ndarray, " models"]) -> float:
    """The chance that a broken model has a larger signal than a sound one; ties count one half.

    Args:
        signal: of every model. What is not a number counts as larger than all others.
        broken: which models are.

    Returns:
        NaN where all models are broken, or none.
    """
    worse, better = _ordered(signal)[broken], _ordered(signal)[~broken]
    if not len(worse) or not len(better):
        return float("nan")
    wins, _ = mannwhitneyu(worse, better, method="asymptotic")
    return float(wins / (len(worse) * len(better)))


def roc(signal: Float[np.ndarray, " models"], broken: Bool[np.ndarray, " models"]) -> Roc:
    """The ROC curve of a signal; of both kinds of models there must be one."""
    false_alarms, found, _ = roc_curve(broken, rankdata(_ordered(signal)))
    return Roc(false_alarms, found)


def spearman(a: Float[np.ndarray, " models"], b: Float[np.ndarray, " models"]) -> float:
    """The correlation of ranks; NaN where one of them is constant."""
    if len({*np.asarray(a).tolist()}) < 2 or len({*np.asarray(b).tolist()}) < 2:
        return float("nan")
    rho, _ = spearmanr(_ordered(a), _ordered(b))
    return float(rho)  # pyright: ignore[reportArgumentType]


def _ordered(signal: Float[np.ndarray, " models"]) -> Float[np.ndarray, " models"]:
    """Numbers of the same order, in which what is not a number comes last."""
    return np.where(np.isnan(signal), np.inf, np.asarray(signal, np.float64))
