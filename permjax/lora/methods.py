"""The registry of methods, and the simple ones: concatenation, truncation, task arithmetic."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax import tree
from permjax.lora.base import Base
from permjax.lora.core import combined, core_of, lifted, truncated
from permjax.lora.dense import DareSvd, MagnitudeSvd, TiesSvd
from permjax.lora.elementwise import AlignedLinear, Dare, Linear, Magnitude, Ties
from permjax.lora.lego import LegoBalanced, LegoGauged, LegoKernel, LegoWeighted, LoraLego
from permjax.lora.merge import Method
from permjax.lora.pool import Merged, Pool, padded
from permjax.lora.regmean import RegMean
from permjax.lora.subspace import CoreSpace, Ctm, IsoC, Knots, Tsv


@dataclass(frozen=True)
class Concat(Base):
    """The weighted sum itself, `sum_t w_t b_t a_t`: the factors one after the other. PEFT: `cat`.

    The root of `|w_t|` goes into both factors, its sign into b. The rank of the result is the sum of the ranks.
    """

    def natural_rank(self, ranks: tuple[int, ...]) -> int:
        """The sum of the ranks of the adapters."""
        return sum(ranks)

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module.

        Raises:
            ValueError: the rank is below the sum of the ranks.
        """
        del key, inputs
        pieces = sum(pool.ranks)
        if rank < pieces:
            message = (
                f"adapters of ranks {pool.ranks} concatenated have rank {pieces}, but rank {rank} was asked for; "
                "`truncate` gives the best update of this rank."
            )
            raise ValueError(message)
        spread = pool.spread(weights)
        root = jnp.sqrt(jnp.abs(spread))
        return Merged(*padded(pool.a * root[:, None], pool.b * (jnp.sign(spread) * root)[None], rank))


@dataclass(frozen=True)
class Truncate(Base):
    """The best update of its rank in Frobenius norm to the weighted sum. PEFT: `svd`, without any out x in matrix.

    Its error is the tail of the singular values of the sum.

    Source:
        Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        core = core_of(pool)
        return Merged(*lifted(core, truncated(combined(core, pool.spread(weights)), rank)))


@dataclass(frozen=True)
class TaskArithmetic(Base):
    """The best update of its rank to `scaling * T * sum_t w_t b_t a_t`.

    With the weights 1 / T this is `scaling` times the plain sum. T equal adapters give `scaling * T` times the adapter.

    Attributes:
        scaling: lambda in the paper; 0.4 is its value for eight tasks.

    Source:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, section 2.
    """

    scaling: float = 0.4

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        return Truncate()(pool, self.scaling * len(pool.ranks) * weights, rank, key, inputs)


METHODS: dict[str, type[Base]] = {
    "lora_lego": LoraLego,
    "lego_weighted": LegoWeighted,
    "lego_gauged": LegoGauged,
    "lego_kernel": LegoKernel,
    "lego_balanced": LegoBalanced,
    "concat": Concat,
    "truncate": Truncate,
    "task_arithmetic": TaskArithmetic,
    "linear": Linear,
    "aligned_linear": AlignedLinear,
    "ties": Ties,
    "dare": Dare,
    "magnitude": Magnitude,
    "knots": Knots,
    "core_space": CoreSpace,
    "tsv": Tsv,
    "iso_c": IsoC,
    "ctm": Ctm,
    "regmean": RegMean,
    "ties_svd": TiesSvd,
    "magnitude_svd": MagnitudeSvd,
    "dare_svd": DareSvd,
}
"""Every method of merging adapters by name."""


def lora_method(name: str, **hyper: Any) -> Method:
    """Return a method of `METHODS` with its hyper-parameters, the others as they are by default.

    Raises:
        ValueError: no such method, or no such hyper-parameter, or a value that does not fit.

    Example:
        >>> lora_method("ties", density=0.5)
        Ties(density=0.5, majority='total', scaling=1.0)
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}{tree.nearest(name, METHODS)}; there are {', '.join(METHODS)}.")
    known: Any = METHODS[name]
    fields = [field.name for field in dataclasses.fields(known)]
    for one in hyper:
        if one not in fields:
            hint = f"{tree.nearest(one, fields)}; it has {', '.join(fields)}" if fields else "; it has none"
            raise ValueError(f"method {name!r} has no hyper-parameter {one!r}{hint}.")
    return known(**hyper)
