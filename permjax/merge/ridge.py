"""Layer-wise least squares towards a prior, solved exactly from a Gram."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh, get_lapack_funcs

from permjax.merge.gram import Gram

Blocks: TypeAlias = Sequence[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]

CANDIDATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_RANK = 1e-13  # eigenvalues of the Gram of columns of length one, relative to the largest, that count as zero
_FLAT = 1e-12  # variance over second moment below which outputs count as constant


class Fit(NamedTuple):
    """The solution of one layer.

    Attributes:
        weights: rows of X to columns of Y, `[*groups, k, n]`; the last row is the bias if the Gram has one.
        before: residual of the prior relative to the variance of the targets, see `relative_residual`.
        after: the same of the solution.
        ridge: the ridge it was found with.
        rank_deficient: the data did not decide on all weights, which stay as near to the prior as they can.
    """

    weights: Float[np.ndarray, "*groups k n"]
    before: float
    after: float
    ridge: float
    rank_deficient: bool


def solve(gram: Gram, prior: Any, *, ridge: float, blocks: Blocks | None = None) -> Fit:
    """The weights that fit a layer's outputs and stay near a prior, exactly.

    For each output j with input columns S: `min_w |X_S w - y_j|^2 + ridge s |w - w0|^2`, thus
    `w = w0 + (G_S + ridge s I)^-1 (R_S - G_S w0)` with G = X^T X, R = X^T Y, and s the mean of the diagonal of G over
    all columns but the constant one, by group. The constant column (the bias) is not penalised. Where ridge and data
    leave a choice, as without ridge and with too few rows, the solution with the least change `|w - w0|` is taken.

    Args:
        gram: the statistics of the layer, of all data.
        prior: w0, `[*groups, k, n]`.
        ridge: relative weight of the prior, >= 0; see `default_ridge` and `choose_ridge`.
        blocks: pairs (columns S, outputs j that use them), with every output once; factorised once each. Weights
            outside of them are exactly zero. All columns for all outputs by default.

    Returns:
        A `Fit`.

    Raises:
        ValueError: no rows, a prior of another shape or not finite, a negative ridge, or blocks that do not hold every
            output once.

    Example:
        >>> fit = solve(gram, prior, ridge=default_ridge(gram.samples))
        >>> fit.weights, fit.after
    """
    prior = _checked_prior(gram, prior, ridge)
    blocks = list(_checked_blocks(gram, blocks))
    inputs, cross = (np.asarray(a, np.float64) for a in (gram.inputs, gram.cross))
    start, weights, deficient = np.zeros_like(prior), np.zeros_like(prior), False
    for group in np.ndindex(prior.shape[:-2]):
        penalty = _penalty(inputs[group], gram.bias, ridge)
        for columns, outputs in blocks:
            part, places = inputs[group][np.ix_(columns, columns)], (*group, *np.ix_(columns, outputs))
            start[places] = prior[places]
            wanted = cross[places] - part @ start[places]
            part[np.diag_indices_from(part)] += penalty[columns]
            change, lacking = _solved(part, wanted)
            weights[places] = start[places] + change
            deficient |= lacking
    return Fit(weights, relative_residual(gram, start), relative_residual(gram, weights), float(ridge), deficient)


def residual(gram: Gram, weights: Any) -> Float[np.ndarray, "*groups n"]:
    """The mean squared error of weights per output column: `(y^T y - 2 w^T R + w^T G w) / rows`, never negative.

    Args:
        gram: the statistics of the layer.
        weights: `[*groups, k, n]`.

    Raises:
        ValueError: weights of another shape, or no rows.
    """
    weights = _checked_shape(gram, weights, "weights")
    inputs, cross, targets = (np.asarray(a, np.float64) for a in (gram.inputs, gram.cross, gram.targets))
    total = targets + (weights * (inputs @ weights - 2 * cross)).sum(-2)
    return np.maximum(total, 0) / int(gram.rows)


def relative_residual(gram: Gram, weights: Any) -> float:
    """The mean squared error of all outputs over their variance: 1 is as good as the mean of every output.

    Without a constant column the second moment takes the place of the variance. Outputs that hardly vary are given a
    variance of 1e-12 of their second moment; if all are always zero, a perfect fit has 0 and any other infinity.
    """
    error = residual(gram, weights).sum()
    moment = np.asarray(gram.targets, np.float64) / int(gram.rows)
    mean = np.asarray(gram.cross, np.float64)[..., -1, :] / int(gram.rows) if gram.bias else 0
    spread = max((moment - mean**2).sum(), _FLAT * moment.sum())
    if spread == 0:
        return float("inf") if error else 0.0
    return float(error / spread)


def default_ridge(samples: int) -> float:
    """The ridge for so many independent samples: 1e-2, and 1e-1 below 200."""
    return 1e-1 if samples < 200 else 1e-2


def choose_ridge(
    train: Gram, held: Gram, prior: Any, *, blocks: Blocks | None = None, candidates: Sequence[float] = CANDIDATES
) -> float:
    """The ridge among candidates whose solution on some samples has the least residual on others.

    Args:
        train: the Gram of the samples that are fitted.
        held: the Gram of those held back.
        prior: see `solve`.
        blocks: see `solve`.
        candidates: ridges to try.

    Raises:
        ValueError: see `solve`; or there are no candidates.
    """
    if not candidates:
        raise ValueError("choose_ridge needs one or more candidates; leave them out for the usual ones.")
    return min(candidates, key=lambda c: residual(held, solve(train, prior, ridge=c, blocks=blocks).weights).sum())


def _penalty(inputs: Float[np.ndarray, "k k"], bias: bool, ridge: float) -> Float[np.ndarray, " k"]:
    """Return what is added to the diagonal: ridge times its mean, nothing for the constant column."""
    features = len(inputs) - bias
    scale = np.diagonal(inputs)[:features].mean() if features else 0.0
    return np.where(np.arange(len(inputs)) < features, ridge * scale, 0.0)


def _solved(
    system: Float[np.ndarray, "s s"], wanted: Float[np.ndarray, "s n"]
) -> tuple[Float[np.ndarray, "s n"], bool]:
    """Return the solution of a positive semidefinite system, and whether it was singular: then the smallest one."""
    length = np.sqrt(np.diagonal(system))
    scale = 1 / np.where(length > 0, length, 1)
    scaled = system * scale[:, None] * scale
    cutoff = max(_RANK, len(system) * np.finfo(np.float64).eps)
    solution = _by_cholesky(scaled, scale[:, None] * wanted, cutoff)
    if solution is not None:
        return scale[:, None] * solution, False
    return _smallest(scaled, scale[:, None], wanted, cutoff)


def _by_cholesky(
    system: Float[np.ndarray, "s s"], wanted: Float[np.ndarray, "s n"], cutoff: float
) -> Float[np.ndarray, "s n"] | None:
    """Return the solution, or None if the system is as good as singular."""
    try:
        factor = cho_factor(system)
    except LinAlgError:
        return None
    (condition,) = get_lapack_funcs(("pocon",), factor[:1])
    reciprocal, _ = condition(factor[0], np.abs(system).sum(0).max())
    return cho_solve(factor, wanted) if reciprocal > cutoff else None


def _smallest(
    scaled: Float[np.ndarray, "s s"], scale: Float[np.ndarray, "s 1"], wanted: Float[np.ndarray, "s n"], cutoff: float
) -> tuple[Float[np.ndarray, "s n"], bool]:
    """Return the smallest of the solutions of `(scaled / scale / scale^T) w = wanted`, and whether there are several.

    What counts as zero is judged with columns of length one, what is smallest without that scaling.
    """
    values, vectors = eigh(scaled)
    kept = values > cutoff * values[-1]
    basis = vectors[:, kept]
    solution = scale * (basis @ ((basis.T @ (scale * wanted)) / values[kept, None]))
    free, _ = np.linalg.qr(scale * vectors[:, ~kept])
    return solution - free @ (free.T @ solution), not kept.all()


def _checked_shape(gram: Gram, values: Any, what: str) -> Float[np.ndarray, "*groups k n"]:
    """Return values like the cross products of a Gram that has rows."""
    values = np.asarray(values, np.float64)
    if values.shape != gram.cross.shape:
        message = f"The {what} have shape {values.shape}, but X^T Y of the layer {gram.cross.shape}; give one for each."
        raise ValueError(message)
    if int(gram.rows) < 1:
        raise ValueError("The Gram has seen no rows; add that of a batch of data first.")
    return values


def _checked_prior(gram: Gram, prior: Any, ridge: float) -> Float[np.ndarray, "*groups k n"]:
    if not 0 <= ridge < np.inf:
        raise ValueError(f"The ridge must be a finite number >= 0, not {ridge}.")
    prior = _checked_shape(gram, prior, "prior weights")
    if not np.isfinite(prior).all():
        raise ValueError("The prior weights are not all finite; check the models they were made from.")
    return prior


def _checked_blocks(gram: Gram, blocks: Blocks | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the columns and outputs of every block that has outputs."""
    k, n = gram.cross.shape[-2:]
    pairs = [(np.arange(k), np.arange(n))] if blocks is None else [(np.asarray(c), np.asarray(o)) for c, o in blocks]
    held = sorted(int(output) for _, outputs in pairs for output in outputs)
    if held != list(range(n)):
        raise ValueError(f"The blocks must hold each of the outputs 0..{n - 1} once, but they hold {held}.")
    for columns, outputs in pairs:
        if len(np.unique(columns)) != len(columns) or np.any((columns < 0) | (columns >= k)):
            raise ValueError(f"A block has columns twice or outside of 0..{k - 1}; give each of its columns once.")
        if len(columns) and len(outputs):
            yield columns, outputs
