"""Co-moments of two models' activations, streamed over batches."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from permjax.match.nested import Label, Named
from permjax.symmetry.spec import PermutationSpec

STATISTICS = ("correlation", "covariance", "moment")
_DEAD = 1e-10  # variance, relative to the squared mean, below which a unit counts as constant


class Moments(NamedTuple):
    """Sums over samples of two models' features; feature axes last, batch axes before them.

    Attributes:
        count: number of samples.
        mean_a: means of the anchor, `[*batch, f]`.
        mean_b: means of the other model, `[*batch, f]`.
        square_a: sums of squared deviations of the anchor, `[*batch, f]`.
        square_b: the same of the other model.
        cross: sums of products of deviations, `[*batch, f, f]`.
    """

    count: Any
    mean_a: Any
    mean_b: Any
    square_a: Any
    square_b: Any
    cross: Any


NOTHING = Moments(0, 0, 0, 0, 0, 0)
"""The moments of no samples."""


class Tap(NamedTuple):
    """Activations that decide on one group: the axes that are free in them, and those that are held.

    Attributes:
        group: the group.
        name: the tap of that group.
        batch: groups that index it and are held.
        free: groups that index it and are solved with it, then the group itself.
    """

    group: str
    name: str
    batch: tuple[str, ...]
    free: tuple[str, ...]


def taps(spec: PermutationSpec, root: str, groups: Mapping[str, Iterable[str]]) -> tuple[Tap, ...]:
    """Return the taps that decide on a root group and on those below it.

    A tap that also carries a group below is left to that one: its units cannot be compared before those inside are.

    Args:
        spec: the symmetry.
        root: a group that is per no free group.
        groups: group -> names of its taps.
    """
    tree = [g.name for g in spec.groups if root in (g.name, *g.per)]
    found = []
    for group in tree:
        per = spec.group(group).per
        inner = {name for g in tree if group in spec.group(g).per for name in groups[g]}
        batch, free = (tuple(h for h in per if (h in tree) == solved) for solved in (False, True))
        found += [Tap(group, name, batch, (*free, group)) for name in groups[group] if name not in inner]
    return tuple(found)


def observe(spec: PermutationSpec, tap: Tap, a: jax.Array, b: jax.Array) -> Moments:
    """Return the moments of one batch of activations `[samples, *per, n]` of the anchor and of another model."""
    places = {name: i for i, name in enumerate((*spec.group(tap.group).per, tap.group), 1)}
    order = (*(places[h] for h in tap.batch), 0, *(places[h] for h in tap.free))
    x, y = (_features(v.transpose(order), len(tap.batch)) for v in (a, b))
    (x, mean_a), (y, mean_b) = ((v - v.mean(-2, keepdims=True), v.mean(-2)) for v in (x, y))
    cross = jnp.matmul(x.swapaxes(-1, -2), y, precision=jax.lax.Precision.HIGHEST)
    return Moments(jnp.float32(x.shape[-2]), mean_a, mean_b, (x * x).sum(-2), (y * y).sum(-2), cross)


def merge(one: Moments, two: Moments) -> Moments:
    """Return the moments of two sets of samples together (Chan, Golub, LeVeque 1979), in float64.

    `M = M1 + M2 + n1 n2 / (n1 + n2) d d^T` with `d` the difference of the means.
    """
    one, two = (Moments(*(np.asarray(x, np.float64) for x in m)) for m in (one, two))
    count = one.count + two.count
    delta_a, delta_b = two.mean_a - one.mean_a, two.mean_b - one.mean_b
    share, weight = two.count / count, one.count * two.count / count
    return Moments(
        count,
        one.mean_a + share * delta_a,
        one.mean_b + share * delta_b,
        one.square_a + two.square_a + weight * delta_a**2,
        one.square_b + two.square_b + weight * delta_b**2,
        one.cross + two.cross + weight * delta_a[..., :, None] * delta_b[..., None, :],
    )


def kernel(spec: PermutationSpec, tap: Tap, moments: Moments, statistic: str) -> Named:
    """Return the statistic of every anchor unit with every other unit; constant units correlate with nothing."""
    values = moments.cross / moments.count
    if statistic == "moment":
        values = values + moments.mean_a[..., :, None] * moments.mean_b[..., None, :]
    if statistic == "correlation":
        a, b = (
            np.where(square > _DEAD * moments.count * mean**2, square / moments.count, np.inf)
            for square, mean in ((moments.square_a, moments.mean_a), (moments.square_b, moments.mean_b))
        )
        values = values / np.sqrt(a[..., :, None] * b[..., None, :])
    sizes = {h: spec.group(h).size for h in (*tap.batch, *tap.free)}
    labels: tuple[Label, ...] = (*((h, 0) for h in tap.batch), *((h, side) for side in (0, 1) for h in tap.free))
    return Named(labels, values.reshape([sizes[name] for name, _ in labels]))


def _features(x: jax.Array, batch: int) -> jax.Array:
    shape = x.shape
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide.reshape((*shape[: batch + 1], prod(shape[batch + 1 :])))
