"""The ranks of an adapter as units: their permutation symmetry, plans of clusters, and adapters in one common order."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from permjax.action import permute
from permjax.lora.balance import balanced_labels
from permjax.lora.kernels import gram
from permjax.lora.merge import pool_of
from permjax.lora.pool import Adapter, Factors, Merged, Pool, module_names, padded
from permjax.plan import Plan
from permjax.steps import Result
from permjax.symmetry.spec import PermutationSpec


class AlignRanksInfo(NamedTuple):
    """Diagnostics of `align_ranks`.

    Attributes:
        before: per module, the mean over pairs of adapters of `sum_j <M_j, M'_j> / (|M| |M'|)`, M_j = `b_j a_j^T` the
            pieces at place j: one where the pieces of both are equal, place by place.
        after: the same for the aligned adapters.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]


def rank_spec(adapter: Adapter) -> PermutationSpec:
    """The symmetry of an adapter: the ranks of every module may be permuted, on both factors alike.

    Leaves are named as in the tree: `<module>/a` with axes `[rank, in]`, `<module>/b` with axes `[out, rank]`.

    Example:
        >>> spec = rank_spec(adapter)
        >>> same = permute(spec, random_permutations(spec, jax.random.key(0)), adapter)
    """
    shapes = {f"{name}/{side}": leaf.shape for name, one in adapter.items() for side, leaf in one._asdict().items()}
    axes = {f"{name}/{side}": (name, None) if side == "a" else (None, name) for name in adapter for side in "ab"}
    return PermutationSpec.from_axes(shapes, axes)


def cluster_plan(adapters: Sequence[Adapter], merged: Mapping[str, Merged]) -> Plan:
    """The clusters of a merge as a plan: rank i of adapter t goes to rank `labels[module][t][i]` of the result.

    Raises:
        ValueError: names a module that was merged without clusters.
    """
    labels, widths = {}, {}
    for name, one in merged.items():
        if one.labels is None:
            raise ValueError(f"module {name!r} was merged by a method without clusters; merge with a form of LEGO.")
        ranks = [adapter[name].a.shape[0] if name in adapter else 0 for adapter in adapters]
        labels[name] = tuple(np.split(np.asarray(one.labels), np.cumsum(ranks)[:-1]))
        widths[name] = one.a.shape[0]
    return Plan(labels, widths)


def align_ranks(adapters: Sequence[Adapter]) -> Result:
    """Bring the ranks of adapters into one order by permutations: the pieces at one place resemble each other most.

    `max_P sum_j |sum_t b_t,P_t(j) a_t,P_t(j)^T|^2`, the balanced clustering of LEGO; signs and scales moved between
    the factors play no part and stay what they are. Adapters of lower rank are filled up with zeros.

    Args:
        adapters: two or more with the same modules.

    Returns:
        The adapters with permuted ranks, which have the same updates as before (the first keeps its order), the plan,
        and an `AlignRanksInfo`.

    Raises:
        ValueError: names a module that one of them lacks, or whose sizes differ.
    """
    full = _filled_up(adapters)
    spec = rank_spec(full[0])
    pools = {name: pool_of(name, full) for name in full[0]}
    found = {name: _labels(pool) for name, pool in pools.items()}
    plan = Plan(found, {name: len(rows[0]) for name, rows in found.items()})
    models = tuple(permute(spec, plan.permutations(t), model) for t, model in enumerate(full))
    after = {name: _similarity(pool_of(name, models)) for name in pools}
    return Result(models, plan, AlignRanksInfo({name: _similarity(pool) for name, pool in pools.items()}, after))


def _filled_up(adapters: Sequence[Adapter]) -> list[dict[str, Factors]]:
    names = module_names(adapters)
    for number, adapter in enumerate(adapters):
        if missing := [name for name in names if name not in adapter]:
            raise ValueError(f"adapter {number} has no module {missing[0]!r}, which others have; leave it out of all.")
    ranks = {name: max(adapter[name].a.shape[0] for adapter in adapters) for name in names}
    return [
        {name: padded(jnp.asarray(one[name].a), jnp.asarray(one[name].b), ranks[name]) for name in names}
        for one in adapters
    ]


def _labels(pool: Pool) -> tuple[Any, ...]:
    """The place of every rank of every adapter, the first adapter's own order."""
    rows = np.asarray(_balanced(pool)).reshape(len(pool.ranks), -1)
    first = np.argsort(rows[0])
    return tuple(first[row] for row in rows)


@jax.jit
def _balanced(pool: Pool) -> Any:
    return balanced_labels(pool, jnp.ones(len(pool.ranks)), pool.ranks[0])


def _similarity(pool: Pool) -> float:
    """The mean over pairs of adapters of the normalised inner product of pieces at the same place."""
    kernel = np.asarray(_kernel(pool)).reshape(2 * (len(pool.ranks), pool.ranks[0]))
    products: Float[np.ndarray, "t t"] = np.einsum("tjuj->tu", kernel)
    root = np.sqrt(np.diagonal(products))
    above = np.triu_indices(len(root), 1)
    return float(np.mean((products / np.maximum(np.outer(root, root), np.finfo(np.float32).tiny))[above]))


_kernel = jax.jit(partial(gram, features="outer_product"))
