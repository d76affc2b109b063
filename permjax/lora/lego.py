"""LoRA-LEGO: cluster the rank-one pieces of all adapters, and make every cluster one piece of the merged adapter."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax.lora.balance import balanced_labels
from permjax.lora.base import Base
from permjax.lora.clusters import kernel_kmeans
from permjax.lora.core import Core, core_of, lifted, matmul, ratio
from permjax.lora.kernels import FEATURES, directed, evened, gram, in_phase
from permjax.lora.pool import Factors, Merged, Pool

_CLUSTERINGS = ("kmeans", "balanced")
_GAUGES = ("given", "balanced")
_CENTROIDS = ("mean", "rank_one")
_SCALES = ("sqrt_r_over_k", "sqrt_n_over_k", "none")


@dataclass(frozen=True)
class LoraLego(Base):
    """Rank-wise clustering: a merged adapter of any rank k from N rank-one pieces. The defaults are the paper's form.

    Every module is clustered by itself. The representative of a cluster C with weights w_j (those of the adapters,
    absolute; a negative weight negates the piece) is the mean `mu_C = sum_C w_j [a_j; b_j] / sum_C w_j`, or the best
    rank-one approximation of `sum_C w_j b_j a_j^T / sum_C w_j`. With equal weights 1 / T this is the paper's.

    The paper's form depends on the gauge: signs and scales that are moved between a_j and b_j change what is clustered
    and averaged, though not the adapters' functions. And a representative counts once, however large its cluster is.
    `LegoGauged`, `LegoKernel`, `LegoWeighted` and `LegoBalanced` mend this.

    Attributes:
        clustering: `"kmeans"`, or `"balanced"`: at most one piece of every adapter in a cluster; see `balanced_labels`.
        features: what k-means compares: `"raw"`, `"normalized"` or `"outer_product"`; see `permjax.lora.kernels.gram`.
        gauge: `"given"`, or `"balanced"`: first makes `|a_j| = |b_j|` and aligns signs.
        centroid: `"mean"` or `"rank_one"`.
        size_weighted: a representative counts `sum_C w_j` instead of the same for all clusters, `sum_t w_t`.
        parameter_reweighting: multiply a representative by `mean_C |m_j|_inf / |mu_C|_inf`, m_j = [a_j; b_j].
        output_scale: factor of the merged update: `"sqrt_r_over_k"` (r is the mean rank of the adapters that have the
            module), `"sqrt_n_over_k"` (N pieces), or `"none"`. Public re-implementations differ in it.
        restarts: runs of k-means.
        iterations: upper limit for each.

    Source:
        Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise
        Clustering", ICLR 2025, section 4. The gauge, the kernel, size weights and balance are ours.
    """

    clustering: str = "kmeans"
    features: str = "raw"
    gauge: str = "given"
    centroid: str = "mean"
    size_weighted: bool = False
    parameter_reweighting: bool = True
    output_scale: str = "sqrt_r_over_k"
    restarts: int = 10
    iterations: int = 100

    def __post_init__(self) -> None:
        for name, known in (
            ("clustering", _CLUSTERINGS),
            ("features", FEATURES),
            ("gauge", _GAUGES),
            ("centroid", _CENTROIDS),
            ("output_scale", _SCALES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        for name in ("restarts", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def __call__(self, pool: Pool, weights: Any, rank: int, key: Any, inputs: Any = None) -> Merged:
        """Return the merged module and the cluster of every piece."""
        del inputs
        weights = jnp.asarray(weights, pool.a.dtype)
        pool, mass = directed(pool, weights), jnp.abs(pool.spread(weights))
        pool = in_phase(evened(pool)) if self.gauge == "balanced" else pool
        labels = self._labels(pool, jnp.abs(weights), rank, key)
        member = jax.nn.one_hot(labels, rank, dtype=pool.a.dtype) * mass[:, None]
        size = jnp.sum(member, 0)
        a, b = _means(pool, member) if self.centroid == "mean" else _rank_ones(core_of(pool), member)
        if self.parameter_reweighting:
            a, b = _restored(pool, member, Factors(a, b))
        scale = self._output_scale(pool, rank) * (size if self.size_weighted else jnp.sum(jnp.abs(weights)))
        root = jnp.sqrt(jnp.broadcast_to(scale, (rank,)).astype(pool.a.dtype))
        return Merged(a * root[:, None], b * root[None], labels)

    def _labels(self, pool: Pool, weights: Any, rank: int, key: Any) -> Int[Array, " pieces"]:
        if self.clustering == "balanced":
            return balanced_labels(pool, weights, rank)
        limits = {"restarts": self.restarts, "iterations": self.iterations}
        return kernel_kmeans(gram(pool, self.features), pool.spread(weights), rank, key, **limits)

    def _output_scale(self, pool: Pool, rank: int) -> float:
        present = [r for r in pool.ranks if r]
        above = {"sqrt_r_over_k": np.mean(present), "sqrt_n_over_k": sum(present), "none": rank}[self.output_scale]
        return float(np.sqrt(above / rank))


@dataclass(frozen=True)
class LegoWeighted(LoraLego):
    """LEGO on the paper's features, where a representative counts as much as its cluster; no reweighting."""

    size_weighted: bool = True
    parameter_reweighting: bool = False
    output_scale: str = "none"


@dataclass(frozen=True)
class LegoGauged(LoraLego):
    """LEGO in a gauge where `|a_j| = |b_j|` and signs agree: moving signs and scales changes nothing."""

    gauge: str = "balanced"


@dataclass(frozen=True)
class LegoKernel(LoraLego):
    """LEGO on the matrices `b_j a_j^T`: kernel k-means, best rank-one representatives, counted by size."""

    features: str = "outer_product"
    gauge: str = "balanced"
    centroid: str = "rank_one"
    size_weighted: bool = True
    parameter_reweighting: bool = False
    output_scale: str = "none"


@dataclass(frozen=True)
class LegoBalanced(LegoKernel):
    """LEGO by permutations of ranks: one piece of every adapter to a cluster, best rank-one representatives."""

    clustering: str = "balanced"


def _means(pool: Pool, member: Float[Array, "pieces rank"]) -> Factors:
    """Return the weighted mean of every cluster, zero for an empty one."""
    size = jnp.sum(member, 0)
    share = ratio(member, size[None])
    return Factors(matmul(share.T, pool.a), matmul(pool.b, share))


def _rank_ones(core: Core, member: Float[Array, "pieces rank"]) -> Factors:
    """Return the best rank-one approximation of the weighted mean of every cluster, `|a| = |b|`."""
    share = ratio(member, jnp.sum(member, 0)[None])

    def one(weights: Any) -> tuple[Any, Any]:
        u, s, vt = jnp.linalg.svd(matmul(core.b * weights[None], core.a.T), full_matrices=False)
        return jnp.sqrt(s[0]) * vt[0], jnp.sqrt(s[0]) * u[:, 0]

    a, b = jax.vmap(one)(share.T)
    return lifted(core, Factors(a, b.T))


def _restored(pool: Pool, member: Float[Array, "pieces rank"], found: Factors) -> Factors:
    """Multiply representatives so that their largest entry is as large as those of their members on average."""
    before = jnp.maximum(jnp.max(jnp.abs(pool.a), 1), jnp.max(jnp.abs(pool.b), 0))
    after = jnp.maximum(jnp.max(jnp.abs(found.a), 1), jnp.max(jnp.abs(found.b), 0))
    factor = ratio(ratio(matmul(before, member), jnp.sum(member, 0)), after)
    return Factors(found.a * factor[:, None], found.b * factor[None])
