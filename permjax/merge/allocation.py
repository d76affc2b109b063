"""Which groups get the units that a budget allows: the best weighted sum of ratios under a bilinear cost."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from permjax.merge.price import Price

_SHARES = (1 / 8, 1 / 64, 1 / 512, 0)  # of a group's units that change together, coarse to fine; one unit at least
_SLACK = 1e-9  # relative rounding error of a price
_RTOL = 1e-4  # smallest relative gain for which the search goes on
_TINY = 1e-30  # far below any change of a relative cost


def allocate(price: Price, weights: Float[np.ndarray, " groups"], budget: float) -> Int[np.ndarray, " groups"]:
    """Return how many units each group keeps separate: `max sum_g w_g r_g` with `price(r) <= budget`.

    The cost has negative cross terms, so there are many local optima. From nothing and from everything, a choice is cut
    back until it fits and filled up again, unit by unit, by gain per cost. Then groups one after the other are emptied,
    filled or moved a little, and the others adapt, as long as that gains something.

    Args:
        price: the relative cost.
        weights: worth of keeping all units of a group separate, positive.
        budget: upper limit of the cost, at least that of merging everything.
    """
    if not len(price.sizes):
        return price.sizes

    def worth(units: np.ndarray) -> float:
        return float(weights @ (units / price.sizes))

    found = []
    for start in (np.zeros_like(price.sizes), price.sizes):
        best, moves = _adapted(price, weights, weights, budget, start), True
        while moves:
            moves = False
            for group, target in _moves(price, best):
                begin, priority = best.copy(), weights.copy()
                begin[group], priority[group] = target, weights.sum() * 1e6 if target > best[group] else 0
                after = _adapted(price, priority, weights, budget, begin)
                if worth(after) > worth(best) * (1 + _RTOL):
                    best, moves = after, True
        found.append(best)
    return max(found, key=worth)


def fits(price: Price, units: Int[np.ndarray, "*batch groups"], budget: float) -> Bool[np.ndarray, "*batch"]:
    """Tell whether choices of separate units cost no more than the budget."""
    return np.asarray(price(units / price.sizes) <= budget * (1 + _SLACK))


def _moves(price: Price, units: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield groups with numbers of separate units to try: none, all, or a few less or more."""
    for group, (size, now) in enumerate(zip(price.sizes.tolist(), units.tolist(), strict=True)):
        some = max(size // 8, 1)
        targets = (0, size, now - some, now + some, now - 1, now + 1)
        yield from ((group, target) for target in dict.fromkeys(targets) if 0 <= target <= size and target != now)


def _adapted(price: Price, first: np.ndarray, then: np.ndarray, budget: float, units: np.ndarray) -> np.ndarray:
    """Cut a choice back and fill it up by some weights, then fill what is left by others."""
    units = _filled(price, first, budget, _cut(price, first, budget, units))
    return units if first is then else _filled(price, then, budget, units)


def _filled(price: Price, weights: np.ndarray, budget: float, units: np.ndarray) -> np.ndarray:
    """Keep more units separate, those first that gain most for their cost, until none fits."""
    for share in _SHARES:
        step = np.diag(np.maximum((share * price.sizes).astype(np.int64), 1))
        while True:
            trial = np.minimum(units + step, price.sizes)
            gain = weights * (trial - units).sum(-1) / price.sizes
            more = np.maximum(price(trial / price.sizes) - price(units / price.sizes), _TINY)
            value = np.where(fits(price, trial, budget), gain / more, 0)
            if not value.any():
                break
            units = trial[np.argmax(value)]
    return units


def _cut(price: Price, weights: np.ndarray, budget: float, units: np.ndarray) -> np.ndarray:
    """Merge units, those first that save most for what they lose, until the rest fits."""
    step = np.diag(np.maximum((_SHARES[1] * price.sizes).astype(np.int64), 1))
    while not fits(price, units, budget):
        trial = np.maximum(units - step, 0)
        loss = np.maximum(weights * (units - trial).sum(-1) / price.sizes, _TINY)
        less = price(units / price.sizes) - price(trial / price.sizes)
        units = trial[np.argmax(np.where((trial < units).any(-1), less / loss, -1))]
    return units
