"""Methods that work on the entries of the factors, as PEFT does them.

They act on a and b separately, so their result has cross terms `b_s a_t` between adapters, and it changes when the
ranks of an adapter are permuted or its signs and scales moved between a and b. `AlignedLinear` brings these in order
first. Where ranks differ, the factors of smaller rank are filled up with zeros (PEFT refuses them). Where the rank
asked for is below the largest of the adapters, the result is cut to its best approximation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.lora.balance import balanced_labels
from permjax.lora.base import Base
from permjax.lora.core import combined, core_of, lifted, truncated
from permjax.lora.kernels import directed, evened, in_phase
from permjax.lora.pool import Merged, Pool, padded

MAJORITIES = ("total", "frequency")


# rules for the entries of T tensors; the dense and the subspace methods use them too


def largest(x: Float[Array, "..."], density: float) -> Float[Array, "..."]:
    """Return the tensor with zeros in place of all but its `int(density * size)` entries of largest magnitude."""
    count = int(density * x.size)
    if count == 0:
        return jnp.zeros_like(x)
    size = jnp.abs(x)
    return jnp.where(size >= jnp.sort(size.reshape(-1))[x.size - count], x, 0)


def thinned(x: Float[Array, "..."], density: float, rescale: bool, key: Any) -> Float[Array, "..."]:
    """Return the tensor with every entry kept with probability `density`, and then divided by it to `rescale`."""
    kept = jnp.where(jax.random.bernoulli(key, density, x.shape), x, 0)
    return kept / density if rescale else kept


def weighted(stack: Float[Array, "adapters ..."], weights: Float[Array, " adapters"]) -> Float[Array, "..."]:
    """Return `sum_t w_t x_t`."""
    return jnp.tensordot(weights, stack, 1)


def agreed(
    stack: Float[Array, "adapters ..."], weights: Float[Array, " adapters"], majority: str = "total"
) -> Float[Array, "..."]:
    """Return for every entry the sum of `w_t x_t` over the tensors with the elected sign, divided by their number.

    The sign is that of the sum of the entries (`"total"`) or of their signs (`"frequency"`), before weights; plus where
    that is zero.
    """
    votes = stack if majority == "total" else jnp.sign(stack)
    elected = jnp.where(jnp.sum(votes, 0) >= 0, 1.0, -1.0).astype(stack.dtype)
    agree = (jnp.sign(stack) == elected[None]).astype(stack.dtype)
    return weighted(stack * agree, weights) / jnp.maximum(jnp.sum(agree, 0), 1.0)


def check_density(**densities: float) -> None:
    """Check that these are fractions.

    Raises:
        ValueError: one is not.
    """
    for name, density in densities.items():
        if not 0 < density <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {density}: it is the fraction that is kept.")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Check a named choice.

    Raises:
        ValueError: it is not known.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")


# from factors to a result


def at_rank(a: Float[Array, "r in"], b: Float[Array, "out r"], rank: int) -> Merged:
    """Return the update `b a` with zeros up to `rank`, or its best approximation where it has more ranks."""
    if rank >= a.shape[0]:
        return Merged(*padded(a, b, rank))
    core = core_of(Pool(a, b, (a.shape[0],)))
    return Merged(*lifted(core, truncated(combined(core, jnp.ones(a.shape[0], a.dtype)), rank)))


def _factorwise(
    pool: Pool, weights: Float[Array, " adapters"], rank: int, rule: Callable[[list[Any], Any], Any]
) -> Merged:
    """Apply a rule to all a, and to all b; roots of the weights to each, signs to a (as PEFT does)."""
    weights = jnp.asarray(weights, pool.a.dtype)
    root, parts = jnp.sqrt(jnp.abs(weights)), pool.split()
    a = rule([one.a for one in parts], jnp.where(weights < 0, -root, root))
    b = rule([one.b.T for one in parts], root)
    return at_rank(a, b.T, rank)


def _stacked(tensors: Sequence[Float[Array, "_ n"]]) -> Float[Array, "adapters rank n"]:
    rank = max(len(x) for x in tensors)
    return jnp.stack([jnp.pad(x, ((0, rank - len(x)), (0, 0))) for x in tensors])


@dataclass(frozen=True)
class Linear(Base):
    """Sums of factors: `a = sum_t sign(w_t) sqrt|w_t| a_t`, `b = sum_t sqrt|w_t| b_t`. PEFT: `linear`.

    T equal adapters of equal weights 1 / T give T times the adapter: all cross terms are alike. Independent adapters
    have a relative error of `sqrt(T - 1)`.
    """

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        return _factorwise(pool, weights, rank, lambda tensors, roots: weighted(_stacked(tensors), roots))


@dataclass(frozen=True)
class AlignedLinear(Base):
    """`Linear` after the ranks of all adapters are brought in one order, their signs in agreement, and `|a_j| = |b_j|`.

    The order is that of `balanced_labels`, with as many places as the largest adapter has ranks. A negative weight
    negates b before that.
    """

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module and the place of every piece."""
        del key, inputs
        count = max(pool.ranks)
        labels = balanced_labels(pool, jnp.asarray(weights, pool.a.dtype), count)
        pool = in_phase(evened(directed(pool, weights)))
        root = jnp.sqrt(jnp.abs(pool.spread(weights)))
        a = jax.ops.segment_sum(pool.a * root[:, None], labels, count)
        b = jax.ops.segment_sum(pool.b.T * root[:, None], labels, count).T
        return at_rank(a, b, rank)._replace(labels=labels)


@dataclass(frozen=True)
class Magnitude(Base):
    """`Linear` of the largest entries of every factor. PEFT: `magnitude_prune`.

    Attributes:
        density: the fraction of the entries of each factor that is kept; PEFT has no default for it.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(density=self.density)

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs

        def rule(tensors: list[Any], roots: Any) -> Any:
            return weighted(_stacked([largest(x, self.density) for x in tensors]), roots)

        return _factorwise(pool, weights, rank, rule)


@dataclass(frozen=True)
class Ties(Base):
    """Trim, elect signs, and average what agrees, on each factor. PEFT: `ties` with the weights `scaling * T * w_t`.

    The rule itself divides by the number of adapters that agree; with the weights 1 / T it is the published one. T
    equal adapters then give `scaling` times what `density` leaves of the factors.

    Attributes:
        density: the fraction of the entries of each factor that is kept; the paper's.
        majority: what elects a sign: the sum of the entries, `"total"`, or of their signs, `"frequency"`.
        scaling: factor of the merged update, lambda in the paper.

    Source:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, algorithm 1. Signs are
        elected before weights, as PEFT does it: an adapter of negative weight votes as if it were positive.
    """

    density: float = 0.2
    majority: str = "total"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_density(density=self.density)
        check_choice("majority", self.majority, MAJORITIES)

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs

        def rule(tensors: list[Any], roots: Any) -> Any:
            return agreed(_stacked([largest(x, self.density) for x in tensors]), roots, self.majority)

        return _factorwise(pool, self.scaling * len(pool.ranks) * weights, rank, rule)


@dataclass(frozen=True)
class Dare(Base):
    """Drop entries of each factor at random and rescale the others. PEFT: `dare_linear`, `dare_ties`.

    Attributes:
        density: the probability with which an entry is kept; that of mergekit's examples.
        combine: `"linear"`, or `"ties"`: signs are elected as in `Ties`, with the weights `T * w_t`.
        rescale: divide what is kept by the density, so that the factors keep their expectation.
        majority: see `Ties`.

    Source:
        Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML
        2024, equation 3.
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
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del inputs
        a, b = (
            thinned(jnp.asarray(x), self.density, self.rescale, one)
            for x, one in zip((pool.a, pool.b), jax.random.split(key), strict=True)
        )
        pool = Pool(a, b, pool.ranks)
        if self.combine == "linear":
            return _factorwise(pool, weights, rank, lambda tensors, roots: weighted(_stacked(tensors), roots))
        strengths = weights * len(pool.ranks)
        return _factorwise(
            pool, strengths, rank, lambda tensors, roots: agreed(_stacked(tensors), roots, self.majority)
        )
