"""Which rank a merged adapter needs: from the singular values of the weighted sum of the updates."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from permjax.lora.buckets import mapped
from permjax.lora.core import combined, core_of
from permjax.lora.merge import checked_weights, pool_of
from permjax.lora.pool import Adapter, Pool, module_names

_REAL = 1e-6
"""Singular values below this share of a module's largest are rounding errors."""


def spectra(adapters: Sequence[Adapter], weights: Any = None) -> dict[str, Float[np.ndarray, " n"]]:
    """The singular values of `sum_t w_t b_t a_t` of every module, the largest first; 1 / T are the default weights.

    Raises:
        ValueError: no adapter, or weights or sizes that do not fit; names the module.
    """
    shares = checked_weights(weights, len(adapters))
    return mapped(_values, {name: (pool_of(name, adapters), shares) for name in module_names(adapters)})


def rank_for_energy(values: Mapping[str, Float[np.ndarray, " n"]], energy: float) -> int:
    """The smallest rank for all modules with which they keep a share of the squared singular values together.

    Args:
        values: the singular values of every module; see `spectra`.
        energy: the share, from 0 to 1.

    Returns:
        The rank, at least 1.

    Raises:
        ValueError: a share that is none.

    Example:
        >>> rank_for_energy(spectra(adapters), 0.95)
    """
    if not 0 < energy <= 1:
        raise ValueError(f"The energy to keep is a share above 0 and up to 1, not {energy}.")
    together = np.zeros(max(map(len, values.values()), default=0))
    for one in values.values():
        squares = np.square(_real(one), dtype=float)
        together[: len(squares)] += squares
    kept = np.cumsum(together)
    return 1 + int(np.sum(kept[:-1] < energy * kept[-1] * (1 - 1e-12))) if kept.size else 1


def ranks_for_budget(values: Mapping[str, Float[np.ndarray, " n"]], total: int) -> dict[str, int]:
    """Give every module a rank such that all together they keep as much of the squared singular values as any can.

    Every module gets 1; the rest of the budget goes to the largest singular values of all modules. What no module can
    use stays unspent.

    Args:
        values: the singular values of every module; see `spectra`.
        total: the sum of the ranks.

    Returns:
        Module name -> rank.

    Raises:
        ValueError: there are more modules than ranks.

    Example:
        >>> merge_loras(adapters, Truncate(), rank=ranks_for_budget(spectra(adapters), 64))
    """
    if total < len(values):
        message = f"{len(values)} modules need a rank of at least 1 each, which a budget of {total} cannot give."
        raise ValueError(message)
    rest = [(value, name) for name, one in values.items() for value in _real(one)[1:]]
    ranks = dict.fromkeys(values, 1)
    for _, name in sorted(rest, key=lambda pair: -pair[0])[: total - len(values)]:
        ranks[name] += 1
    return ranks


def _real(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """The singular values that are not rounding errors."""
    return values[values > _REAL * values.max(initial=0.0)]


def _values(given: tuple[Pool, Float[Array, " adapters"]]) -> Float[Array, " n"]:
    pool, weights = given
    return jnp.linalg.svd(combined(core_of(pool), pool.spread(weights)), compute_uv=False)
