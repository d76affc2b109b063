"""Methods that work on the entries of the updates as full matrices, as the `*_svd` modes of PEFT do.

They run on the host, module by module. Updates are formed a block of rows at a time; only the merged matrix is whole.
The result is its best approximation of the rank asked for. Signs, scales or ranks moved about in the factors change
nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse.linalg import svds

from permjax.lora.base import Base
from permjax.lora.core import from_svd
from permjax.lora.elementwise import MAJORITIES, agreed, check_choice, check_density, thinned, weighted
from permjax.lora.pool import Factors, Merged, Pool

_BLOCK = 1 << 22  # entries of an update that are held at once
_SMALL = 1024  # up to this size, all singular values are found
_agreed = partial(jax.jit, static_argnums=2)(agreed)


@dataclass(frozen=True)
class _Dense(Base):
    on_host: ClassVar[bool] = True


@dataclass(frozen=True)
class MagnitudeSvd(_Dense):
    """The weighted sum of the largest entries of every update. PEFT: `magnitude_prune_svd`.

    Attributes:
        density: the fraction of the entries of each update that is kept; PEFT has no default for it.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(density=self.density)

    def __call__(
        self, pool: Pool, weights: Float[np.ndarray, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        trim = _trimming(pool, self.density)
        return _merged(pool, rank, lambda stack, _: weighted(jnp.asarray(trim(stack)), jnp.asarray(weights)))


@dataclass(frozen=True)
class TiesSvd(_Dense):
    """TIES on the entries of the updates. PEFT: `ties_svd` with the weights `scaling * T * w_t`; see `Ties`.

    Signs are elected before weights: an adapter of negative weight votes as if it were positive.

    Attributes:
        density: the fraction of the entries of each update that is kept; the paper's.
        majority: what elects a sign: the sum of the entries, `"total"`, or of their signs, `"frequency"`.
        scaling: factor of the merged update.
    """

    density: float = 0.2
    majority: str = "total"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_density(density=self.density)
        check_choice("majority", self.majority, MAJORITIES)

    def __call__(
        self, pool: Pool, weights: Float[np.ndarray, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        trim, strengths = _trimming(pool, self.density), self.scaling * len(pool.ranks) * weights
        return _merged(pool, rank, lambda stack, _: _agreed(trim(stack), strengths, self.majority))


@dataclass(frozen=True)
class DareSvd(_Dense):
    """DARE on the entries of the updates. PEFT: `dare_linear_svd`, `dare_ties_svd`; see `Dare`.

    Attributes:
        density: the probability with which an entry is kept; that of mergekit's examples.
        combine: `"linear"`, or `"ties"`: signs are elected, with the weights `T * w_t`.
        rescale: divide what is kept by the density.
        majority: see `TiesSvd`.
    """

    density: float = 0.5
    combine: str = "linear"
    rescale: bool = True
    majority: str = "total"

    def __post_init__(self) -> None:
        check_density(density=self.density)
        check_choice("combine", self.combine, ("linear", "ties"))
        check_choice("majority", self.majority, MAJORITIES)

    def __call__(
        self, pool: Pool, weights: Float[np.ndarray, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del inputs

        def rule(stack: Any, start: int) -> Any:
            kept = thinned(jnp.asarray(stack), self.density, self.rescale, jax.random.fold_in(key, start))
            if self.combine == "linear":
                return weighted(kept, jnp.asarray(weights))
            return _agreed(kept, weights * len(pool.ranks), self.majority)

        return _merged(pool, rank, rule)


def _merged(pool: Pool, rank: int, rule: Callable[[Any, int], Any]) -> Merged:
    """Apply a rule to blocks of rows of all updates, and return the best approximation of the result."""
    parts, shape = pool.split(), (pool.b.shape[0], pool.a.shape[1])
    merged = np.empty(shape)
    with jax.default_matmul_precision("highest"):
        for rows in _slices(*shape):
            merged[rows] = rule(np.stack([one.b[rows] @ one.a for one in parts]), rows.start)
    a, b = from_svd(*_leading(merged, min(rank, *shape)), rank)
    return Merged(a.astype(np.float32), b.astype(np.float32))


def _slices(out: int, size: int) -> Iterator[slice]:
    step = max(1, _BLOCK // size)
    return (slice(start, start + step) for start in range(0, out, step))


def _trimming(pool: Pool, density: float) -> Callable[[Any], Any]:
    """Return the map that puts zeros in place of all but the largest entries of every update."""
    least = np.asarray([threshold(one, density) for one in pool.split()], np.float32)[:, None, None]
    return lambda stack: np.where(np.abs(stack) >= least, stack, np.float32(0))


def threshold(factors: Factors, density: float) -> float:
    """Return the magnitude of the smallest of the `int(density * size)` largest entries of an update.

    Positive floats have the order of their bits: one pass over the update counts the upper halves of the bits, a second
    one the lower halves of those entries whose upper half is the right one.
    """
    out, size = len(factors.b), factors.a.shape[1]
    count = int(density * out * size)
    if count == 0:
        return np.inf

    def bits() -> Iterator[Int[np.ndarray, " entries"]]:
        for rows in _slices(out, size):
            yield np.abs(factors.b[rows] @ factors.a).astype(np.float32).view(np.uint32).reshape(-1)

    upper, count = _reached((x >> 16 for x in bits()), count)
    lower, _ = _reached((x[x >> 16 == upper] & 0xFFFF for x in bits()), count)
    return float(np.uint32(upper << 16 | lower).view(np.float32))


def _reached(values: Iterator[Int[np.ndarray, "_"]], count: int) -> tuple[int, int]:
    """Return the value at place `count` from the top, and its place among those equal to it."""
    found = np.sum([np.bincount(x, minlength=1 << 16) for x in values], 0)
    above = np.cumsum(found[::-1])
    place = int(np.searchsorted(above, count))
    value = len(found) - 1 - place
    return value, count - int(above[place] - found[value])


def _leading(x: Float[np.ndarray, "out in"], count: int) -> tuple[Any, Any, Any]:
    """Return the leading singular vectors and values, the largest first."""
    size = min(x.shape)
    if size <= _SMALL or count > size // 2 or not x.any():
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return u[:, :count], s[:count], vt[:count]
    found: Any = svds(x, count, v0=np.random.default_rng(0).standard_normal(size))
    u, s, vt = found
    return u[:, ::-1], s[::-1], vt[::-1]
