"""How much of every group is kept separate, so that the merged network has the size you choose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from permjax.merge.allocation import allocate, fits
from permjax.merge.partial import Ratios, merged_units, widenable
from permjax.merge.price import Price, flops_price, params_price
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.work import Work
from permjax.tree import nearest

_LEAST = 1e-5  # weight of a group whose probes say that it is better merged


def ratios_for(
    contractions: Sequence[Work],
    spec: PermutationSpec,
    *,
    budget: float | int | None = None,
    params: float | int | None = None,
    width: Ratios | None = None,
    shape: str = "uniform",
    models: int = 2,
    probes: Mapping[str, Sequence[float | int]] | None = None,
    apart: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> dict[str, float]:
    """Return the kept-separate ratio of every group that can be widened, at most at the cost that is asked for.

    The ratios are those of whole units, `1 - k / d`, and no more units fit (for the shape that is asked for).

    Args:
        contractions: see `permjax.symmetry.work.contractions`.
        spec: the symmetry.
        budget: FLOPs without zero blocks, relative to one parent.
        params: stored parameters, zero blocks included, relative to one parent.
        width: the ratios themselves; groups that are not named have ratio 0.
        shape: how the ratios lie that a budget gives.

            - `"uniform"`: one ratio for all groups, up to a unit.
            - `"staged"`: in forward order the first groups are merged and the last ones separate; one lies between.
            - `"optimised"`: the largest sum of `w_g r_g`, with weights from probes. At the share t of the way from one
              parent (0) to all models (1), `w_g = max((1 - t) gain_g + t loss_g, 1e-5)`.
        models: number of models.
        probes: group -> (gain, loss): what it brings to un-merge this group alone where all are merged, and what it
            costs to merge this group alone where all are separate, for instance in points of accuracy.
        apart: groups of ratio 1 in any case.
        whole: groups of ratio 0 in any case.

    Raises:
        ValueError: not exactly one of budget, params and width; a budget out of range, or less than what the groups
            apart cost; groups that the spec lacks or that are per others; an unknown shape, or probes that are missing.

    Example:
        >>> ratios = ratios_for(contractions(apply, spec, params, x), spec, budget=1.2)
        >>> plan = partial_plan(spec, ratios=ratios)

    Source:
        Nasery, Hayase, Koh, Oh, "PLeaS", CVPR 2025, section 3.3, which optimises by a commercial solver; Stoica et al.,
        "ZipIt!", ICLR 2024, for stages.
    """
    _check_request({"budget": budget, "params": params, "width": width}, shape, models)
    fixed = _fixed(spec, apart, whole)
    if width is not None:
        return _whole_units(spec, {**width, **fixed})
    if budget is not None:
        price, limit, top, name = flops_price(contractions, spec, models, fixed), float(budget), models, "budget"
    else:
        price, limit, top, name = params_price(spec, models, fixed), float(params or 0), models**2, "params"
    _check_limit(price, limit, top, name)
    progress = (limit - 1) / (top - 1)
    units = _SHAPES[shape](price, limit, lambda: _weights(price, probes, progress), _order(contractions))
    return _whole_units(spec, {**fixed, **dict(zip(price.groups, (units / price.sizes).tolist(), strict=True))})


def _uniform(price: Price, limit: float, *_) -> np.ndarray:
    """Return the separate units for the largest common ratio that fits, and one more of each group that still does."""

    def at(ratio: float) -> np.ndarray:
        return price.sizes - np.round((1 - ratio) * price.sizes).astype(np.int64)

    low, high = 0.0, 1.0
    if fits(price, at(high), limit):
        return at(high)
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(price, at(middle), limit) else (low, middle)
    units = at(low)
    for step in np.eye(len(units), dtype=units.dtype):
        trial = np.minimum(units + step, price.sizes)
        units = trial if fits(price, trial, limit) else units
    return units


def _staged(price: Price, limit: float, _: Callable, order: Mapping[str, int]) -> np.ndarray:
    """Return the most separate units that fit if they are taken from the last group backwards."""
    last_first = sorted(range(len(price.groups)), key=lambda i: -order.get(price.groups[i], len(order)))

    def at(count: int) -> np.ndarray:
        units = np.zeros_like(price.sizes)
        for i in last_first:
            units[i] = min(count, price.sizes[i])
            count -= units[i]
        return units

    low, high = 0, int(price.sizes.sum()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(price, at(middle), limit) else (low, middle)
    return at(low)


def _optimised(price: Price, limit: float, weights: Callable[[], np.ndarray], _) -> np.ndarray:
    return allocate(price, weights(), limit)


_SHAPES: dict[str, Callable[..., np.ndarray]] = {"uniform": _uniform, "staged": _staged, "optimised": _optimised}


def _order(contractions: Sequence[Work]) -> dict[str, int]:
    """Return the place of every group in forward order."""
    return {group: i for i, group in enumerate(dict.fromkeys(g for work in contractions for g in work.groups))}


def _weights(price: Price, probes: Mapping[str, Sequence[float | int]] | None, progress: float) -> np.ndarray:
    for group in price.groups:
        if group not in (probes or {}):
            raise ValueError(
                f"optimised ratios need probes, (gain, loss), of every group, but there is none of '{group}'."
            )
    table = np.array([(probes or {})[group] for group in price.groups], float).reshape(-1, 2)
    if not np.isfinite(table).all():
        raise ValueError("the probes must be finite numbers.")
    return np.maximum(table @ np.array([1 - progress, progress]), _LEAST)


def _fixed(spec: PermutationSpec, apart: Sequence[str], whole: Sequence[str]) -> dict[str, float]:
    for name in (*apart, *whole):
        if name not in widenable(spec):
            raise ValueError(
                f"the spec has no group '{name}' that could be kept apart or whole{nearest(name, widenable(spec))}."
            )
    if both := set(apart) & set(whole):
        raise ValueError(f"group '{min(both)}' cannot be kept apart and whole.")
    return dict.fromkeys(apart, 1.0) | dict.fromkeys(whole, 0.0)


def _check_limit(price: Price, limit: float, top: int, name: str) -> None:
    if not 1 <= limit <= top:
        raise ValueError(f"{name} is {limit}, but must lie in [1, {top}]: multiples of what one parent costs.")
    nothing = np.zeros_like(price.sizes)
    if not fits(price, nothing, limit):
        least = float(price(nothing / price.sizes))
        raise ValueError(f"{name} is {limit}, but the groups that are kept apart alone cost {least:.3f} parents.")


def _check_request(sizes: Mapping[str, Any], shape: str, models: int) -> None:
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of budget, params and width, not {' and '.join(given) or 'none'}.")
    if shape not in _SHAPES:
        raise ValueError(f"there is no shape '{shape}'; choose from {list(_SHAPES)}.")
    if models < 2:
        raise ValueError(f"a merge is of two models or more, not {models}.")


def _whole_units(spec: PermutationSpec, ratios: Ratios) -> dict[str, float]:
    """Return the ratios of whole units that are nearest to the given ones."""
    counts = merged_units(spec, ratios)
    return {group: 1 - counts[group] / spec.group(group).size for group in widenable(spec)}
