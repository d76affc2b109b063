"""The least squares of a convolution: sums over the windows that its kernel sees."""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax.merge.products import Sums, chunked, columns_of, half, product, sums, whole

_CHANNELS = 16  # channels from which products of shifted images are as fast as those of patches
_WORK = 0.75  # share of the multiplications below which shifts are taken


class Window(NamedTuple):
    """The geometry of a convolution, channels last; padding in pairs (low, high), dilation that of the kernel."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def taps(self) -> Int[np.ndarray, "taps axes"]:
        """The taps of a window in row-major order, numbered by axis."""
        return _grid([np.arange(size) for size in self.window])

    @property
    def places(self) -> Int[np.ndarray, "taps axes"]:
        """The distance of every tap from the first."""
        return self.taps * np.array(self.dilation, np.int32)

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first to the last place of a window, by axis."""
        return tuple(d * (size - 1) for size, d in zip(self.window, self.dilation, strict=True))

    def outputs(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the output for those of the input."""
        room = [n + sum(p) - r - 1 for n, p, r in zip(spatial, self.padding, self.reach, strict=True)]
        return tuple(max(0, n // stride + 1) for n, stride in zip(room, self.strides, strict=True))

    def starts(self, spatial: tuple[int, ...]) -> Int[np.ndarray, "positions axes"]:
        """Return the first place of every window in row-major order; negative ones lie in the padding."""
        sizes = zip(self.outputs(spatial), self.strides, self.padding, strict=True)
        return _grid([stride * np.arange(n) - low for n, stride, (low, _) in sizes])

    def border(self, spatial: tuple[int, ...]) -> Int[np.ndarray, "positions axes"]:
        """Return the starts of all windows that meet the image but are none of the convolution; strides of one."""
        every = _grid([np.arange(-reach, n) for n, reach in zip(spatial, self.reach, strict=True)])
        lows = np.array([low for low, _ in self.padding])
        seen = (every >= -lows) & (every < self.outputs(spatial) - lows)
        return every[~seen.all(1)]


def conv_sums(x: Float[Array, "samples *spatial c"], y: Float[Array, "samples *out n"], window: Window) -> Sums:
    """Return the sums over all positions, in the way that takes less time.

    Columns of X are the places of the window in row-major order, then the channels.
    """
    return (shift_sums if _is_shiftable(window, x.shape[1:-1], x.shape[-1]) else patch_sums)(x, y, window)


def patch_sums(x: Float[Array, "samples *spatial c"], y: Float[Array, "samples *out n"], window: Window) -> Sums:
    """Return the sums over all positions from patches, a chunk of samples at a time."""

    def rows(x: Array, y: Array) -> Sums:
        patches = jnp.stack([*_slices(x, window)], -2)
        lead = x.shape[0], prod(y.shape[1:-1])
        return sums(patches.reshape((*lead, prod(patches.shape[-2:]))), y.reshape((*lead, y.shape[-1])))

    numbers = len(window.taps) * x.shape[-1] + y.shape[-1]
    return chunked(rows, (x, y), prod(y.shape[1:-1]), numbers)


def shift_sums(x: Float[Array, "samples *spatial c"], y: Float[Array, "samples *out n"], window: Window) -> Sums:
    """Return the sums over all positions from products of shifted images; strides of one.

    Summed over all windows that meet the image, the product of two places u and v depends on v - u alone:
    `X^T X = T - B^T B` with one product of the image and its shifted self per difference in T, and B the patches of
    those windows that are none of the convolution, near the border.
    """
    taps, spatial, channels = len(window.taps), x.shape[1:-1], x.shape[-1]
    border = window.border(spatial)

    def patches(x: Array) -> Any:
        found = jax.vmap(lambda image: _gathered(image, jnp.asarray(border), window))(x)
        return half(columns_of(found.reshape(-1, found.shape[-1])))

    rows, outputs = prod(spatial), y.shape[-1]
    inputs = _tiled(chunked(lambda x: _lagged(x, window), (x,), rows, 3 * channels), window)
    if len(border):
        inputs = inputs - whole(chunked(patches, (x,), len(border), taps * channels))
    rest = chunked(lambda x, y: _crossed(x, y, window), (x, y), rows, 3 * channels + outputs)
    return rest._replace(inputs=inputs)


def sampled_sums(
    x: Float[Array, "samples *spatial c"],
    y: Float[Array, "samples *out n"],
    picks: Int[Array, "samples picked"],
    window: Window,
) -> Sums:
    """Return the sums over some positions of every sample; `picks` are their row-major numbers."""
    starts = jnp.asarray(window.starts(x.shape[1:-1]))

    def rows(x: Array, y: Array, picks: Array) -> Sums:
        patches = jax.vmap(lambda image, chosen: _gathered(image, starts[chosen], window))(x, picks)
        outputs = jax.vmap(lambda image, chosen: image.reshape(-1, image.shape[-1])[chosen])(y, picks)
        return sums(patches, outputs)

    return chunked(rows, (x, y, picks), picks.shape[1], len(window.taps) * x.shape[-1] + y.shape[-1])


def pick_positions(key: Array, samples: int, positions: int, count: int) -> Int[Array, "samples count"]:
    """Draw `count` of `positions` numbers for every sample: one in each of `count` equal parts, all equally likely."""
    uniform = jax.random.uniform(key, (samples, count), jnp.float64)
    drawn = (jnp.arange(count, dtype=jnp.float64)[None] + uniform) * (positions / count)
    return jnp.minimum(drawn.astype(jnp.int32), positions - 1)


def _grid(axes: list[np.ndarray]) -> Int[np.ndarray, "points axes"]:
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes)).astype(np.int32)


def _slices(x: Float[Array, "samples *spatial c"], window: Window) -> Iterator[Float[Array, "samples *out c"]]:
    """Yield, for every place of the window, what it sees at all positions."""
    padded, outputs = _padded(x, window.padding), window.outputs(x.shape[1:-1])
    for place in window.places.tolist():
        ends = (first + (n - 1) * s + 1 for first, n, s in zip(place, outputs, window.strides, strict=True))
        yield jax.lax.slice(padded, (0, *place, 0), (x.shape[0], *ends, x.shape[-1]), (1, *window.strides, 1))


def _gathered(
    image: Float[Array, "*spatial c"], starts: Int[Array, "positions axes"], window: Window
) -> Float[Array, "positions k"]:
    """Return the patches of one image at these starts; zero outside of it."""
    *spatial, channels = image.shape
    places = starts[:, None] + jnp.asarray(window.places)[None]
    inside = ((places >= 0) & (places < jnp.array(spatial, jnp.int32)[None, None])).all(-1)
    flat = jnp.ravel_multi_index(tuple(jnp.moveaxis(places, -1, 0)), tuple(spatial), mode="clip")
    chosen = jnp.where(inside, flat, prod(spatial))
    patches = jnp.take(image.reshape(-1, channels), chosen, axis=0, mode="fill", fill_value=0)
    return patches.reshape(len(starts), -1)


def _lagged(x: Float[Array, "samples *spatial c"], window: Window) -> Float[Array, "lags c c"]:
    """Return the products of the images and their shifted selves, for every other difference of places."""
    lags = _lags(window)
    columns = columns_of(x.reshape(-1, x.shape[-1]))
    padded = _padded(x, tuple((reach, reach) for reach in window.reach)).astype(jnp.float64)
    shifts = np.array(window.dilation) * lags[len(lags) // 2 :] + np.array(window.reach)
    return jax.lax.map(lambda shift: product(columns, _seen(padded, shift, x.shape[1:-1])), jnp.asarray(shifts))


def _tiled(lagged: Float[Array, "lags c c"], window: Window) -> Float[Array, "k k"]:
    """Return the matrix whose block at two places is that of their difference; opposite ones are transposed."""
    both = jnp.concatenate([lagged[:0:-1].swapaxes(1, 2), lagged])
    taps = window.taps
    order = np.ravel_multi_index(tuple((taps[None] - taps[:, None] + taps[-1]).T), tuple(taps[-1] * 2 + 1)).T
    return both[order].swapaxes(1, 2).reshape((len(taps) * lagged.shape[-1],) * 2)


def _crossed(x: Float[Array, "samples *spatial c"], y: Float[Array, "samples *out n"], window: Window) -> Sums:
    """Return all sums but X^T X, a place of the window at a time; strides of one."""
    padded = _padded(x, window.padding).astype(jnp.float64)
    columns = columns_of(y.reshape(-1, y.shape[-1]))

    def at(place: Array) -> tuple[Array, Array]:
        seen = _seen(padded, place, y.shape[1:-1])
        return product(columns, seen), seen.sum(0)

    cross, total = jax.lax.map(at, jnp.asarray(window.places))
    cross = cross.swapaxes(1, 2).reshape(-1, len(columns))
    return Sums((), cross, (columns * columns).sum(1), total.reshape(-1), columns.sum(1))


def _padded(x: Float[Array, "samples *spatial c"], padding: tuple[tuple[int, int], ...]) -> Array:
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))


def _seen(padded: Array, start: Int[Array, " axes"], sizes: tuple[int, ...]) -> Float[Array, "rows c"]:
    """Return the rows of a box of images at a start that may be traced."""
    box = jax.lax.dynamic_slice(padded, jnp.pad(start, 1), (padded.shape[0], *sizes, padded.shape[-1]))
    return box.reshape(-1, padded.shape[-1])


def _lags(window: Window) -> Int[np.ndarray, "lags axes"]:
    """Return all differences of two places in row-major order, so that opposite ones lie opposite."""
    return _grid([np.arange(1 - size, size) for size in window.window])


def _is_shiftable(window: Window, spatial: tuple[int, ...], channels: int) -> bool:
    """Tell whether shifts are likely to be faster than patches, by the number of multiplications."""
    if any(stride != 1 for stride in window.strides) or channels < _CHANNELS:
        return False
    pairs = len(window.taps) ** 2 / 2
    lags = prod(2 * size - 1 for size in window.window) / 2
    work = lags * prod(spatial) + pairs * len(window.border(spatial))
    return work < _WORK * pairs * prod(window.outputs(spatial))
