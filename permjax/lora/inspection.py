"""One adapter by itself: how large its updates are, and which rank they need."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from permjax.lora.buckets import mapped
from permjax.lora.core import combined, core_of
from permjax.lora.merge import pool_of
from permjax.lora.pool import Adapter, Pool
from permjax.lora.quality import DEAD, effective_rank, piece_norms, piece_spread


class Inspection(NamedTuple):
    """The update `b a` of one module.

    Attributes:
        rank: of the factors.
        norm: Frobenius norm.
        effective: effective rank, the exponential of the entropy of the squared singular values.
        energy: `[rank]`, the share of the squared singular values that the best approximation of rank 1, 2, ... keeps.
        spread: largest over smallest norm `|a_j| |b_j|` of the rank-one pieces, dead ones left out.
        dead: how many pieces are dead: their norm is zero, or next to nothing beside the largest.
    """

    rank: int
    norm: float
    effective: float
    energy: Float[np.ndarray, " rank"]
    spread: float
    dead: int

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps a share of the energy; 0 for an update that is zero."""
        return 1 + int(np.sum(self.energy[:-1] < energy)) if self.norm > 0 else 0


def inspect(adapter: Adapter) -> dict[str, Inspection]:
    """Look at every module of an adapter.

    Raises:
        ValueError: factors that do not fit each other; names the module.

    Example:
        >>> {name: module.rank_for(0.99) for name, module in inspect(adapter).items()}
    """
    pools = {name: pool_of(name, [adapter]) for name in adapter}
    return {name: _plain(pools[name], found) for name, found in mapped(_inspected, pools).items()}


def _inspected(pool: Pool) -> dict[str, Any]:
    core = core_of(pool)
    values = jnp.linalg.svd(combined(core, pool.spread(jnp.ones(1))), compute_uv=False)
    energy, norms = jnp.cumsum(values**2), piece_norms(core)
    return {
        "norm": jnp.sqrt(energy[-1]),
        "effective": effective_rank(values),
        "energy": jnp.where(energy[-1] > 0, energy / jnp.where(energy[-1] > 0, energy[-1], 1.0), 1.0),
        "spread": piece_spread(core, sum(pool.ranks)),
        "dead": jnp.sum(norms <= DEAD * jnp.max(norms)),
    }


def _plain(pool: Pool, found: dict[str, Any]) -> Inspection:
    (rank,) = pool.ranks
    energy = np.pad(found["energy"], (0, max(rank - len(found["energy"]), 0)), constant_values=1.0)
    numbers = {key: float(found[key]) for key in ("norm", "effective", "spread")}
    return Inspection(rank, energy=energy, dead=int(found["dead"]), **numbers)
