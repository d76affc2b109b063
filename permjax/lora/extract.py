"""A LoRA from a fine-tuned model: the best low-rank approximation of what training has changed in a weight."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.utils.extmath import randomized_svd

from permjax.lora.core import from_svd
from permjax.lora.pool import Factors

EXACT = 768
"""Matrices with a side up to this are decomposed exactly, larger ones by random projections."""

_OVERSAMPLES, _PASSES, _SEED = 16, 6, 0


class Extracted(NamedTuple):
    """The change of one weight, as factors.

    Attributes:
        factors: `a [rank, in]` and `b [out, rank]`, singular values shared evenly, filled up with zeros.
        norm: Frobenius norm of the whole change.
        kept: the share of its square that the factors keep; 1 where nothing has changed.
    """

    factors: Factors
    norm: float
    kept: float


def extract_lora(base: Any, tuned: Any, rank: int) -> Extracted:
    """The update of some rank that is nearest to `tuned - base` (Eckart, Young 1936).

    Larger matrices are decomposed by subspace iteration from a fixed random start (Halko, Martinsson, Tropp, SIAM
    Review 2011, algorithm 4.4), whose result is next to the best.

    Args:
        base: a weight `[out, in]`, or a kernel `[out, in, height, width]` of a convolution.
        tuned: the same weight after training.
        rank: of the result.

    Raises:
        ValueError: other shapes, or a rank below 1.

    Example:
        >>> extract_lora(base["q_proj.weight"], tuned["q_proj.weight"], rank=16).kept
    """
    old, new = (np.asarray(x, np.float32) for x in (base, tuned))
    if old.shape != new.shape or old.ndim not in (2, 4):
        message = (
            f"A LoRA stands for the change of a matrix or of a kernel of four axes, of one shape before and after; the "
            f"shapes are {old.shape} and {new.shape}."
        )
        raise ValueError(message)
    if rank < 1:
        raise ValueError(f"A rank is at least 1, not {rank}.")
    change = (new - old).reshape(len(old), -1)
    total = float(np.sum(np.linalg.norm(change, axis=1).astype(float) ** 2))
    u, s, vt = _decomposed(change, min(rank, *change.shape))
    kept = min(float(np.sum(s.astype(float) ** 2)) / total, 1.0) if total > 0 else 1.0
    return Extracted(from_svd(u, s, vt, rank), float(np.sqrt(total)), kept)


def _decomposed(change: Float[np.ndarray, "out in"], rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values and their vectors."""
    if min(change.shape) > EXACT and rank < EXACT // 2:
        steps: dict[str, Any] = {"n_oversamples": _OVERSAMPLES, "n_iter": _PASSES, "random_state": _SEED}
        return randomized_svd(change, rank, power_iteration_normalizer="QR", **steps)
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]
