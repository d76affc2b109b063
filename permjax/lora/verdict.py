"""What the quality of all modules together says: pooled numbers, warnings in sentences, and go or no-go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from permjax.lora.quality import Quality

FACTOR_SPACE = ("linear", "aligned_linear", "ties", "dare", "magnitude")
"""Methods that add factors instead of updates."""

ONE_VOICE = ("lora_lego", "lego_gauged")
"""Methods in which every cluster counts alike, however many pieces it has."""

CROSS_TERMS = 0.1
"""Cross terms above this share of the weighted sum are warned of."""

SPREAD = 3.0
"""Norms of pieces that differ by more than this factor are warned of where clusters count alike, and where the error is
more than twice the best at this rank. Four adapters of spectrum `e^(-j/2)`, j < 8, differ by 33."""

HELD = 0.8
"""A rank that cannot hold this share of the energy of the weighted sum is warned of."""

KEPT = 0.5
"""An adapter of which a smaller share of the energy is retained is warned of."""

SCALE = 3.0
"""A result that is larger or smaller than the adapters' mean by more than this factor is warned of."""

OPPOSED = -0.2
"""Adapters at a smaller cosine than this are warned of."""

GOOD, BAD = 0.9, 0.5
"""Cosines with the weighted sum: go from the first on, no-go below the second."""


class Overall(NamedTuple):
    """The numbers of `Quality` for all modules as one large update: squares are added up, and divided last.

    Effective ranks and purity are means over modules.
    """

    modules: int
    errors: Float[np.ndarray, " adapters"]
    error: float
    best: float
    cosine: float
    kept: Float[np.ndarray, " adapters"]
    cosines: Float[np.ndarray, "adapters adapters"]
    cross: float
    effective_sum: float
    effective_merged: float
    scale: float
    spread: float
    purity: float | None

    @property
    def kept_min(self) -> float:
        """Retained energy of the adapter that keeps least."""
        return _extreme(np.nanmin, self.kept)

    @property
    def kept_std(self) -> float:
        """Standard deviation of the retained energy over adapters: zero where the result is fair to all."""
        return _extreme(np.nanstd, self.kept)


def overall(found: Mapping[str, Quality]) -> Overall:
    """Pool the numbers of one module or more.

    Example:
        >>> overall(lora_quality(adapters, merged)).cosine
    """
    many = list(found.values())
    norms, total, merged = (np.stack([getattr(q, name) for q in many]) for name in ("norms", "norm_sum", "norm_merged"))
    size = np.sqrt((norms**2).sum(0))
    product = np.sqrt((total**2).sum() * (merged**2).sum())
    purity = [q.purity for q in many if q.purity is not None]
    inner = np.nansum([q.cosines * np.outer(q.norms, q.norms) for q in many], 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Overall(
            modules=len(many),
            errors=_pooled(np.stack([q.errors for q in many]), norms, merged[:, None]),
            error=float(_pooled(np.array([q.error for q in many]), total, merged)),
            best=float(_pooled(np.array([q.best for q in many]), total)),
            cosine=float(np.nansum([q.cosine * q.norm_sum * q.norm_merged for q in many]) / product),
            kept=_pooled(np.sqrt(np.stack([q.kept for q in many])), norms) ** 2,
            cosines=inner / np.outer(size, size),
            cross=float(_pooled(np.array([q.cross for q in many]), total)),
            effective_sum=float(np.mean([q.effective_sum for q in many])),
            effective_merged=float(np.mean([q.effective_merged for q in many])),
            scale=float(np.sqrt((merged**2).sum()) / np.mean(size)),
            spread=_extreme(np.nanmax, np.array([q.spread for q in many])),
            purity=float(np.mean(purity)) if purity else None,
        )


def warnings(found: Mapping[str, Quality], method: str, names: Sequence[str]) -> list[str]:
    """What to beware of, as sentences.

    Args:
        found: the quality of all modules.
        method: its name in `permjax.lora.methods.METHODS`.
        names: of the adapters.
    """
    whole = overall(found)
    said = (_cross, _unequal, _small_rank, _zero)
    return [text for warn in said for text in warn(found, whole, method)] + [
        *_unkept(whole, names),
        *_opposed(whole, names),
        *_scale(whole),
    ]


def verdict(whole: Overall, warned: Sequence[str]) -> str:
    """A sentence that begins with `Go`, `Check` or `No-go`.

    It looks at directions and sizes of weights only: how an adapter does its task, only a run of it tells.
    """
    what = (
        f"the merged update has the cosine {whole.cosine:.3f} with the weighted sum and keeps "
        f"{100 * whole.kept_min:.0f} % or more of every adapter's energy"
    )
    if not whole.cosine >= BAD:
        return f"No-go: {what}; it points elsewhere."
    if warned or whole.cosine < GOOD:
        return f"Check: {what}; measure it on the adapters' tasks before you use it."
    return f"Go: {what}."


def _cross(found: Mapping[str, Quality], whole: Overall, method: str) -> Iterator[str]:
    if method in FACTOR_SPACE and whole.cross > CROSS_TERMS:
        name = _worst(found, lambda q: q.cross)
        yield (
            f"{method} adds the factors of the adapters, not their updates, and adding factors as they are makes cross "
            f"terms {whole.cross:.2f} times as large as the weighted sum ({found[name].cross:.2f} in {name}); truncate "
            "and lego_balanced make none."
        )


def _unequal(found: Mapping[str, Quality], whole: Overall, method: str) -> Iterator[str]:
    hit = {name: q for name, q in found.items() if q.spread > SPREAD and q.error > 2 * q.best}
    if method in ONE_VOICE and hit:
        pooled = overall(hit)
        yield (
            f"in {len(hit)} of {whole.modules} modules the rank-one pieces differ in norm by more than {SPREAD:g} (up "
            f"to {pooled.spread:.3g} times), and {method} counts every cluster alike: it splits large pieces and lumps "
            f"small ones. Its error to the weighted sum is {pooled.error:.2f} there where {pooled.best:.2f} is "
            "possible; use lego_balanced, lego_weighted or truncate."
        )


def _small_rank(found: Mapping[str, Quality], whole: Overall, method: str) -> Iterator[str]:
    del method
    held = 1 - whole.best**2
    if held < HELD:
        name = _worst(found, lambda q: q.best)
        yield (
            f"the rank is too small: no update of this rank holds more than {100 * held:.0f} % of the energy of the "
            f"weighted sum ({100 * (1 - found[name].best ** 2):.0f} % in {name}); a larger --rank, or auto:0.95, does."
        )


def _zero(found: Mapping[str, Quality], whole: Overall, method: str) -> Iterator[str]:
    del whole, method
    lost = [name for name, q in found.items() if not q.norm_merged > 0 and q.norm_sum > 0]
    if lost:
        yield f"{len(lost)} modules of the result are zero, though their weighted sums are not, such as {lost[0]}."


def _unkept(whole: Overall, names: Sequence[str]) -> Iterator[str]:
    lost = [f"{name} ({100 * kept:.0f} %)" for name, kept in zip(names, whole.kept, strict=True) if kept < KEPT]
    if lost:
        yield f"less than {100 * KEPT:.0f} % of the energy is retained of {', '.join(lost)}."


def _opposed(whole: Overall, names: Sequence[str]) -> Iterator[str]:
    for i, j in zip(*np.nonzero(np.triu(whole.cosines < OPPOSED, 1)), strict=True):
        yield f"{names[i]} and {names[j]} work against each other: the cosine is {whole.cosines[i, j]:.2f}."


def _scale(whole: Overall) -> Iterator[str]:
    if not 1 / SCALE <= whole.scale <= SCALE:
        yield f"the merged update is {whole.scale:.2g} times as large as the adapters are on average."


def _worst(found: Mapping[str, Quality], number: Callable[[Quality], float]) -> str:
    """The module with the largest number."""
    return max(found, key=lambda name: np.nan_to_num(number(found[name]), nan=-np.inf))


def _pooled(ratios: np.ndarray, norms: np.ndarray, alone: np.ndarray | float = 0.0) -> Any:
    """The ratio of root sums of squares, from the ratios of modules to norms; `alone` stands where a norm is zero."""
    return np.sqrt((np.where(norms > 0, ratios * norms, alone) ** 2).sum(0) / (norms**2).sum(0))


def _extreme(reduce: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    """The statistic of the numbers that there are, NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(reduce(known)) if known.size else float("nan")
