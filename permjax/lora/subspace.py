"""Methods that work in the common subspaces of the updates; all but the last step happen in the small core.

With equal default weights 1 / T they are the published rules, which sum over adapters: their weights are
`scaling * T * w_t`. A negative weight negates the adapter before anything else.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.lora.base import Base
from permjax.lora.core import Core, combined, core_of, from_svd, lifted, matmul, ratio, truncated, updates
from permjax.lora.elementwise import agreed, at_rank, check_choice, check_density, largest, thinned, weighted
from permjax.lora.kernels import directed
from permjax.lora.pool import Factors, Merged, Pool

_NULL = 1e-5  # singular values below this part of the largest one are none


def _prepared(pool: Pool, weights: Any, scaling: float) -> tuple[Pool, Float[Array, " adapters"], Core]:
    """Return the pool directed, its core, and the absolute weights as the published rules count them: 1 for 1 / T."""
    strengths = jnp.abs(jnp.asarray(weights, pool.a.dtype)) * (scaling * len(pool.ranks))
    pool = directed(pool, weights)
    return pool, strengths, core_of(pool)


def _svd(x: Float[Array, "p q"]) -> tuple[Any, Any, Any]:
    """Return the thin SVD with zeros in place of singular values that are none, and of their left vectors."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    live = (s > _NULL * s[0]).astype(s.dtype)
    return u * live[None], s * live, vt


def _trimmed(
    stack: Float[Array, "adapters p q"], weights: Float[Array, " adapters"], density: float
) -> Float[Array, "p q"]:
    """Return the TIES of some matrices."""
    return agreed(jnp.stack([largest(one, density) for one in stack]), weights)


@dataclass(frozen=True)
class Knots(Base):
    """Merge in the basis of the left singular vectors of `[dW_1 | ... | dW_T] = U S [V_1^T | ... | V_T^T]`.

    The blocks `S V_t^T` are merged entry by entry, the result is multiplied by U and truncated.

    Attributes:
        rule: `"ties"`, or `"task_arithmetic"`: the sum, which gives what `TaskArithmetic` gives.
        density: the fraction of each block that is kept by TIES.
        scaling: factor of the merged update. T equal adapters give `scaling` times what `density` leaves of them.

    Source:
        Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025, section 4. Entries are kept per module, not
        over the whole model.
    """

    rule: str = "ties"
    density: float = 0.2
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, ("ties", "task_arithmetic"))
        check_density(density=self.density)

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        pool, weights, core = _prepared(pool, weights, self.scaling)
        small = updates(core, pool)
        u, _, _ = _svd(jnp.concatenate([*small], 1))
        blocks = jnp.stack([matmul(matmul(u.T, one), core.right.T) for one in small])
        merged = _trimmed(blocks, weights, self.density) if self.rule == "ties" else weighted(blocks, weights)
        return at_rank(merged, matmul(core.left, u), rank)


def _tsv(small: Float[Array, "adapters p q"], ranks: tuple[int, ...], weights: Any) -> Float[Array, "p q"]:
    """Return the weighted singular values of all updates between their vectors, made orthogonal together."""
    parts = [tuple(_svd(one)) for one in small]
    u = jnp.concatenate([part[0][:, :r] for part, r in zip(parts, ranks, strict=True)], 1)
    s = jnp.concatenate([part[1][:r] * w for part, r, w in zip(parts, ranks, weights, strict=True)])
    alive = jnp.concatenate([(part[1][:r] > 0).astype(u.dtype) for part, r in zip(parts, ranks, strict=True)])
    v = jnp.concatenate([part[2][:r] for part, r in zip(parts, ranks, strict=True)], 0).T
    return matmul(_polar(u) * s[None], _polar(v * alive[None]).T)


def _polar(x: Float[Array, "p n"]) -> Float[Array, "p n"]:
    """Return the nearest partial isometry, on the directions that the matrix has."""
    u, _, vt = _svd(x)
    return matmul(u, vt)


@dataclass(frozen=True)
class Tsv(Base):
    """Task singular vectors: those of all updates are made orthogonal together, the singular values stay (TSV-M).

    T equal adapters of equal weights give `scaling` times the adapter, orthogonal ones `scaling` times their sum.

    Attributes:
        scaling: factor of the merged update, alpha in the paper.

    Source:
        Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025, algorithm 1,
        with all ranks of each adapter in place of `min(in, out) / T`, and nothing in place of null directions, whose
        basis is arbitrary.
    """

    scaling: float = 1.0

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        pool, weights, core = _prepared(pool, weights, self.scaling)
        return Merged(*lifted(core, truncated(_tsv(updates(core, pool), pool.ranks, weights), rank)))


@dataclass(frozen=True)
class CoreSpace(Base):
    """Merge in common bases of both sides, `M_t = U^T dW_t V`, which lose nothing; then truncate.

    With `rule="tsv"` this is `Tsv`, with `"task_arithmetic"` `TaskArithmetic`, in any bases; the entries that TIES
    works on depend on the bases.

    Attributes:
        rule: `"ties"`, `"tsv"` or `"task_arithmetic"`.
        basis: `"factors"`, the published one: left singular vectors of all b side by side, right ones of all a one
            below the other, which change when scales are moved between a and b. `"updates"`: the same of the updates,
            which do not.
        density: the fraction of each `M_t` that is kept by TIES.
        scaling: factor of the merged update.

    Source:
        Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025, section 4.
    """

    rule: str = "ties"
    basis: str = "factors"
    density: float = 0.2
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, ("ties", "tsv", "task_arithmetic"))
        check_choice("basis", self.basis, ("factors", "updates"))
        check_density(density=self.density)

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        pool, weights, core = _prepared(pool, weights, self.scaling)
        small = updates(core, pool)
        stacked = (core.b, core.a)
        if self.basis == "updates":
            stacked = (jnp.concatenate([*small], 1), jnp.concatenate([*small], 0).T)
        u, v = (jnp.linalg.svd(x, full_matrices=False)[0] for x in stacked)
        coordinates = matmul(matmul(u.T, small), v)
        merged = truncated(self._merged(coordinates, pool.ranks, weights), rank)
        return Merged(*lifted(core, Factors(matmul(merged.a, v.T), matmul(u, merged.b))))

    def _merged(self, small: Any, ranks: tuple[int, ...], weights: Any) -> Float[Array, "p q"]:
        if self.rule == "tsv":
            return _tsv(small, ranks, weights)
        return _trimmed(small, weights, self.density) if self.rule == "ties" else weighted(small, weights)


@dataclass(frozen=True)
class IsoC(Base):
    """Isotropic merging: all singular values of the sum become their mean.

    The mean is over the singular values that are not null, at most N of them. A rank below that keeps the directions of
    the largest ones, at this mean. T equal adapters give `scaling * T` times the isotropic form of the adapter.

    Attributes:
        scaling: factor of the merged update, alpha in the paper.

    Source:
        Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML
        2025, section 4, where the mean is over `min(in, out)` values.
    """

    scaling: float = 1.0

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del key, inputs
        pool, weights, core = _prepared(pool, weights, self.scaling)
        u, s, vt = _svd(combined(core, pool.spread(weights)))
        level = jnp.where(s > 0, ratio(jnp.sum(s), jnp.sum((s > 0).astype(s.dtype))), 0)
        return Merged(*lifted(core, from_svd(u, level, vt, rank)))


@dataclass(frozen=True)
class Ctm(Base):
    """Compress, then merge: subspaces of the rank of the result that serve all updates, and a merge of coordinates.

    The subspaces U, V are those of a Tucker-2 decomposition of `X_t = lambda_t M_t / |M_t|`, started with HOSVD and
    improved by HOOI, where `lambda_t = beta |M_t| + (1 - beta) mean_t |M_t|`; adapters count by `|w_t|`. The
    coordinates `O_t = U^T M_t V` are merged by TIES.

    One adapter of the rank of the result gives `scaling` times what `density` leaves of the diagonal matrix of its
    singular values.

    Attributes:
        beta: 0 lets all adapters count the same, 1 by their norms.
        rule: `"ties"`, or `"dare_ties"`: entries are dropped at random first.
        density: the fraction of each `O_t` that is kept by TIES.
        dare_density: the probability with which DARE keeps an entry.
        scaling: factor of the merged update.
        iterations: of HOOI.

    Source:
        He et al., "Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter", ICML 2026; hyper-parameters as
        in the command of the authors' repository. Weights of adapters and the core are ours.
    """

    beta: float = 0.25
    rule: str = "ties"
    density: float = 0.25
    dare_density: float = 0.95
    scaling: float = 0.75
    iterations: int = 10

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, ("ties", "dare_ties"))
        check_density(density=self.density, dare_density=self.dare_density)
        if not 0 <= self.beta <= 1 or self.iterations < 0:
            message = f"beta must be in [0, 1] and iterations at least 0, not {self.beta} and {self.iterations}."
            raise ValueError(message)

    def __call__(
        self, pool: Pool, weights: Float[Array, " adapters"], rank: int, key: Any, inputs: Any = None
    ) -> Merged:
        """Return the merged module."""
        del inputs
        pool, weights, core = _prepared(pool, weights, self.scaling)
        small = updates(core, pool)
        u, v = self._subspaces(small, pool.ranks, weights, min(rank, *small.shape[1:]))
        merged = truncated(self._merged(matmul(matmul(u.T, small), v), weights, key), rank)
        return Merged(*lifted(core, Factors(matmul(merged.a, v.T), matmul(u, merged.b))))

    def _subspaces(self, small: Any, ranks: tuple[int, ...], weights: Any, k: int) -> tuple[Any, Any]:
        norms = jnp.sqrt(jnp.sum(small**2, (1, 2)))
        mean = jnp.sum(norms) / sum(r > 0 for r in ranks)
        factor = ratio(self.beta * norms + (1 - self.beta) * mean, norms) * jnp.sqrt(weights)
        x = small * factor[:, None, None]

        def improve(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            v = _leading(matmul(state[0].T, x).swapaxes(1, 2), k)
            return _leading(matmul(x, v), k), v

        return jax.lax.fori_loop(0, self.iterations, improve, (_leading(x, k), _leading(x.swapaxes(1, 2), k)))

    def _merged(self, coordinates: Any, weights: Any, key: Any) -> Float[Array, "k k"]:
        if self.rule == "dare_ties":
            keys = jax.random.split(key, len(coordinates))
            coordinates = jax.vmap(lambda x, one: thinned(x, self.dare_density, True, one))(coordinates, keys)
        return _trimmed(coordinates, weights, self.density)


def _leading(stack: Float[Array, "adapters p q"], k: int) -> Float[Array, "p k"]:
    """Return the k leading left singular vectors of the matrices side by side."""
    return jnp.linalg.svd(jnp.concatenate([*stack], 1), full_matrices=False)[0][:, :k]
