"""Slopes and curvatures of the loss along a direction, and what a Taylor expansion makes of a barrier."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from permjax import tree
from permjax.lmc.batches import cut, each_batch, over_batches

Loss = Callable[..., Any]
"""`loss(params, *batch) -> scalar`, a mean over the batch."""


class TaylorBarrier(NamedTuple):
    """The second-order estimate of a barrier half way, and its two terms.

    Attributes:
        barrier: their sum.
        slope: (g_a - g_b) . (b - a) / 4.
        curvature: (b - a) . (H_a + H_b) (b - a) / 16.
    """

    barrier: float
    slope: float
    curvature: float


def taylor_barrier(loss: Loss, a: PyTree, b: PyTree, data: Sequence[Any], *, batch_size: int = 1000) -> TaylorBarrier:
    """What the loss near two models says about the barrier half way between them.

    With mu = b - a over all floating leaves, the expansions of L((a + b) / 2) from a and from b are
    L(a) + g_a . mu / 2 + mu . H_a mu / 8 and L(b) - g_b . mu / 2 + mu . H_b mu / 8. Their mean, less the mean loss of a
    and b, is

        B = (g_a - g_b) . mu / 4 + mu . (H_a + H_b) mu / 16

    which is exact for quadratic losses. The curvatures are exact Hessian-vector products, a gradient differentiated
    along mu; where activations are kinked, like ReLU, the kinks count for nothing.

    Args:
        loss: `loss(params, *batch) -> scalar`, a mean over the batch; give the same function object for every pair.
        a: the first model.
        b: the second model, aligned or not.
        data: arrays of equal length, such as (x, y), cut into batches.
        batch_size: examples at a time.

    Raises:
        ValueError: models of different structure or not finite, or arrays of unequal length.

    Source:
        Ito et al., ICLR 2025, section 3; the estimate as derived here.
    """
    tree.check_same_structure([a, b])
    for index, model in enumerate((a, b)):
        tree.check_finite(model, f"model {index}")
    parts, sizes = cut(data, batch_size)
    start, end = floating(a), floating(b)
    step = {name: end[name] - start[name] for name in start}
    found = [along(loss, model, step, parts) for model in (a, b)]
    (slope_a, curved_a), (slope_b, curved_b) = [[float(over_batches(sizes, x)) for x in terms] for terms in found]
    slope, curvature = (slope_a - slope_b) / 4, (curved_a + curved_b) / 16
    return TaylorBarrier(slope + curvature, slope, curvature)


def floating(model: PyTree) -> dict[str, Array]:
    """The floating leaves by name, as JAX arrays: those that a loss is differentiated by."""
    leaves = {name: jnp.asarray(leaf) for name, leaf in tree.flatten(model).items()}
    return {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


@partial(jax.jit, static_argnums=0)
def along(
    loss: Loss, params: PyTree, direction: Mapping[str, Array], parts: list[tuple]
) -> tuple[Float[Array, " batches"], Float[Array, " batches"]]:
    """Slope g . d and curvature d . H d of every batch along a direction over the floating leaves."""
    named = tree.flatten(params)
    start = {name: jnp.asarray(named[name]) for name in direction}

    def of_batch(*batch: Any) -> tuple[Array, Array]:
        gradient = jax.grad(lambda moved: loss(tree.unflatten(params, named | moved), *batch))
        slope, change = jax.jvp(gradient, (start,), (dict(direction),))
        return tree.dot(slope, direction), tree.dot(direction, change)

    return each_batch(of_batch, parts)
