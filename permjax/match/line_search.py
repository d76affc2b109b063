"""Exact line search where the objective is a polynomial in the step: sample, interpolate, take the best critical point.

Between two soft permutations every place of a group in a block is linear in the step, so a block is a polynomial whose
degree is the number of its places, and one sample more than the degree determines it.
"""

from collections.abc import Container, Iterable

import numpy as np
from jaxtyping import Float
from numpy.polynomial import Chebyshev

from permjax.symmetry.blocks import Block

_ROUNDING = 1e-15  # coefficients below this share of the largest value are none, so that no root lies at infinity


def degree(blocks: Iterable[Block], free: Container[str]) -> int:
    """Return the largest number of places of free groups in a block, at least one.

    Args:
        blocks: what the objective is made of.
        free: the groups that move.
    """
    return max((sum(name in free for name in block.names) for block in blocks), default=1) or 1


def samples(order: int) -> Float[np.ndarray, " n"]:
    """Return the `order + 1` Chebyshev-Lobatto points of [0, 1], both ends included."""
    return (1 - np.cos(np.pi * np.arange(order + 1) / order)) / 2


def slope(values: Float[np.ndarray, " n"]) -> float:
    """Return the derivative of the interpolating polynomial at step 0, or zero where it is negative.

    Args:
        values: the objective at `samples(degree)`.
    """
    return max(float(interpolant(values).deriv()(0.0)), 0.0)


def best_step(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the step in [0, 1] at which the interpolating polynomial is largest, and its gain over step 0.

    Args:
        values: the objective at `samples(degree)`.

    Example:
        >>> best_step(np.array([0.0, 1.0, 0.0]))
        (0.5, 1.0)
    """
    polynomial = interpolant(values)
    steps = np.clip([0.0, 1.0, *np.real(polynomial.deriv().roots())], 0, 1)
    gains = polynomial(steps) - polynomial(0.0)
    best = int(np.argmax(gains))
    return float(steps[best]), float(gains[best])


def interpolant(values: Float[np.ndarray, " n"]) -> Chebyshev:
    """Return the polynomial with these values at `samples(n - 1)`, in float64."""
    order, values = len(values) - 1, np.asarray(values, np.float64)
    return Chebyshev.fit(samples(order), values, order, domain=[0, 1]).trim(_ROUNDING * np.abs(values).max())
