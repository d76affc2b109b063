"""Singular vectors: how far the dominant directions of two models point the same way.

A permutation of units keeps the singular values of every weight matrix and moves the entries of its singular vectors,
so what matching can change is only how the vectors of two models lie to each other. Which leaves are matrices, and
how convolutions are flattened, is said in `permjax.lmc.matrices`; biases have no part in this.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, PyTree

from permjax import tree
from permjax.lmc.matrices import Patterns, Triplets, decompose, matrices, rank
from permjax.symmetry.spec import PermutationSpec

GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.5)
"""Thresholds of the R metric, as shares of the largest singular value."""


class RMetric(NamedTuple):
    """The metric R of two models for several thresholds; see `r_metric`.

    Attributes:
        gammas: the thresholds.
        total: R over all leaves; NaN where nothing is kept.
        leaves: leaf -> R of that leaf alone; NaN where nothing is kept.
        kept: leaf -> number of vectors that count.
    """

    gammas: Float[np.ndarray, " gammas"]
    total: Float[np.ndarray, " gammas"]
    leaves: dict[str, Float[np.ndarray, " gammas"]]
    kept: dict[str, Int[np.ndarray, " gammas"]]


class AlignedFraction(NamedTuple):
    """The inner product of two models as a share of the largest that orthogonal maps could reach.

    Attributes:
        total: the share over all leaves.
        leaves: leaf -> the share of that leaf alone.
    """

    total: float
    leaves: dict[str, float]


class SpectralFloor(NamedTuple):
    """Squared distances of two models by leaf, and the least ones that orthogonal maps could reach.

    Attributes:
        squared_distance: leaf -> |W_a - W_b|^2.
        floor: leaf -> sum_i (s_i^a - s_i^b)^2.
    """

    squared_distance: dict[str, float]
    floor: dict[str, float]


class Comparison(NamedTuple):
    """Everything about two models that follows from one decomposition of each; see `analyse`.

    Attributes:
        spectrum: leaf -> singular values of the second model.
        r: the metric R.
        aligned: the normalised objective of weight matching.
        distance: squared distances and their spectral floors.
        objective: leaf -> double sum over singular triplets, which is the inner product <W_a, W_b>.
    """

    spectrum: dict[str, Float[np.ndarray, " r"]]
    r: RMetric
    aligned: AlignedFraction
    distance: SpectralFloor
    objective: dict[str, float]


def spectra(spec: PermutationSpec, model: PyTree, leaves: Patterns = "*") -> dict[str, Float[np.ndarray, " r"]]:
    """The singular values of every weight matrix, largest first.

    Args:
        spec: the symmetry.
        model: a pytree.
        leaves: patterns of leaf names (`fnmatch`).

    Returns:
        leaf -> values `[min(rows, columns)]`.
    """
    return {name: np.linalg.svd(w, compute_uv=False) for name, w in matrices(spec, model, leaves).items()}


def analyse(
    spec: PermutationSpec,
    anchor: PyTree,
    models: Mapping[str, PyTree],
    *,
    gammas: Sequence[float] = GAMMAS,
    leaves: Patterns = "*",
) -> dict[str, Comparison]:
    """Compare several models with one anchor, decomposing each of them once.

    Args:
        spec: the symmetry.
        anchor: the model a.
        models: name -> model b: not aligned, aligned, merged.
        gammas: thresholds of R, each in [0, 1].
        leaves: patterns of leaf names (`fnmatch`).

    Raises:
        ValueError: models that differ in structure or are not finite, no matrix, or a threshold out of range.

    Example:
        >>> found = analyse(spec, a, {"naive": b, "matched": aligned, "merged": mean})
        >>> {name: one.r.total for name, one in found.items()}
    """
    tree.check_same_structure([anchor, *models.values()])
    if not all(0 <= gamma <= 1 for gamma in gammas):
        raise ValueError(f"A threshold is a share of the largest singular value, from 0 to 1; gammas are {gammas}.")
    first = _decomposed(spec, anchor, leaves)
    return {name: _compare(first, _decomposed(spec, model, leaves), gammas) for name, model in models.items()}


def r_metric(
    spec: PermutationSpec, a: PyTree, b: PyTree, gammas: Sequence[float] = GAMMAS, leaves: Patterns = "*"
) -> RMetric:
    """How far the singular vectors of two models agree: 1 for equal models, about 0 for unrelated ones.

    R = sum_l sum_ij (u_i^a . u_j^b)(v_i^a . v_j^b) / sum_l min(n_l^a, n_l^b), over the vectors whose singular value is
    at least gamma times the largest of its own matrix; n counts them. At gamma = 0 this is the mean inner product of
    the polar factors U V^T, and |R| <= 1.

    Vectors of values that are zero to rounding are not unique and never count; a zero matrix counts for nothing.

    Args:
        spec: the symmetry.
        a: the first model, such as the anchor.
        b: the second model: aligned or not, or a merged one.
        gammas: thresholds in [0, 1].
        leaves: patterns of leaf names (`fnmatch`).

    Raises:
        ValueError: what `analyse` refuses.

    Source:
        Ito et al., "Analysis of linear mode connectivity via permutation-based weight matching", ICLR 2025, section 4;
        the minimum in the normaliser is ours, where two models keep different numbers.
    """
    return _pair(spec, a, b, leaves, gammas).r


def aligned_fraction(spec: PermutationSpec, a: PyTree, b: PyTree, leaves: Patterns = "*") -> AlignedFraction:
    """The objective of weight matching over its bound: rho_l = <W_a, W_b> / sum_i s_i^a s_i^b, in [-1, 1].

    The bound (von Neumann's trace inequality) is what free orthogonal maps on both sides would reach. A zero matrix
    has no share (NaN) and adds nothing to the total.
    """
    return _pair(spec, a, b, leaves).aligned


def spectral_floor(spec: PermutationSpec, a: PyTree, b: PyTree, leaves: Patterns = "*") -> SpectralFloor:
    """Squared distances, and what is left of them where b could be turned freely: sum_i (s_i^a - s_i^b)^2."""
    return _pair(spec, a, b, leaves).distance


def double_singular_sum(spec: PermutationSpec, a: PyTree, b: PyTree, leaves: Patterns = "*") -> float:
    """The objective of weight matching, seen through singular triplets; equal to the inner product of the matrices.

    sum_l sum_ij s_i^a s_j^b (u_i^a . u_j^b)(v_i^a . v_j^b) = sum_l <W_l^a, W_l^b>

    Source:
        Ito et al., ICLR 2025, theorem 4.1.
    """
    return sum(_pair(spec, a, b, leaves).objective.values())


class _Decomposed(NamedTuple):
    matrix: Float[np.ndarray, "rows columns"]
    triplets: Triplets


def _decomposed(spec: PermutationSpec, model: PyTree, leaves: Patterns) -> dict[str, _Decomposed]:
    return {name: _Decomposed(w, decompose(w)) for name, w in matrices(spec, model, leaves).items()}


def _pair(
    spec: PermutationSpec, a: PyTree, b: PyTree, leaves: Patterns, gammas: Sequence[float] = GAMMAS
) -> Comparison:
    return analyse(spec, a, {"b": b}, gammas=gammas, leaves=leaves)["b"]


def _compare(a: dict[str, _Decomposed], b: dict[str, _Decomposed], gammas: Sequence[float]) -> Comparison:
    pairs = {name: (a[name], b[name]) for name in a}
    overlaps = {name: _overlaps(x.triplets, y.triplets) for name, (x, y) in pairs.items()}
    spectrum = {name: y.triplets.s for name, (_, y) in pairs.items()}
    r = _r_metric({name: (x.triplets, y.triplets) for name, (x, y) in pairs.items()}, overlaps, gammas)
    objective = {n: float(x.triplets.s @ overlaps[n] @ y.triplets.s) for n, (x, y) in pairs.items()}
    return Comparison(spectrum, r, _aligned(pairs), _floor(pairs), objective)


def _overlaps(a: Triplets, b: Triplets) -> Float[np.ndarray, "r r"]:
    """Return (u_i^a . u_j^b)(v_i^a . v_j^b) of all pairs, in float64."""
    return (a.u.T @ b.u).astype(np.float64) * (a.v.T @ b.v)


def _r_metric(
    pairs: Mapping[str, tuple[Triplets, Triplets]],
    overlaps: Mapping[str, Float[np.ndarray, "r r"]],
    gammas: Sequence[float],
) -> RMetric:
    counts = {n: np.array([[_kept(x, g) for g in gammas] for x in pair], int) for n, pair in pairs.items()}
    sums = {n: np.array([overlaps[n][:i, :j].sum() for i, j in counts[n].T]) for n in pairs}
    kept = {n: count.min(axis=0) for n, count in counts.items()}
    total = _ratio(np.sum([*sums.values()], axis=0), np.sum([*kept.values()], axis=0))
    return RMetric(np.asarray(gammas, float), total, {n: _ratio(sums[n], kept[n]) for n in pairs}, kept)


def _kept(triplets: Triplets, gamma: float) -> int:
    s = triplets.s
    return min(rank(triplets), int(np.sum(s >= gamma * s.max(initial=0))))


def _aligned(pairs: Mapping[str, tuple[_Decomposed, _Decomposed]]) -> AlignedFraction:
    found = {n: _dot(x.matrix, y.matrix) for n, (x, y) in pairs.items()}
    bound = {n: _dot(x.triplets.s, y.triplets.s) for n, (x, y) in pairs.items()}
    total = _ratio(sum(found.values()), sum(bound.values()))
    return AlignedFraction(float(total), {n: float(_ratio(found[n], bound[n])) for n in pairs})


def _floor(pairs: Mapping[str, tuple[_Decomposed, _Decomposed]]) -> SpectralFloor:
    def squared(x: np.ndarray, y: np.ndarray) -> float:
        return _dot(x - y, x - y)

    return SpectralFloor(
        {n: squared(x.matrix, y.matrix) for n, (x, y) in pairs.items()},
        {n: squared(x.triplets.s, y.triplets.s) for n, (x, y) in pairs.items()},
    )


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(x * y, dtype=np.float64))


def _ratio(value: float | np.ndarray, by: float | np.ndarray) -> np.ndarray:
    """Return the quotient, NaN where there is nothing to divide by."""
    by = np.asarray(by, float)
    return np.divide(value, by, out=np.full(by.shape, np.nan), where=by != 0)
