"""Sinkhorn scaling: doubly stochastic matrices from scores, with derivatives, and from weights, for projecting."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float

from permjax.match.soft import Soft, soft_shape
from permjax.permutation import is_traced
from permjax.symmetry.spec import PermutationSpec

_HIGHEST = jax.lax.Precision.HIGHEST


class Sinkhorn(NamedTuple):
    """Doubly stochastic matrices and how well they are so.

    Attributes:
        plan: the matrices; every row sums to one.
        error: the largest distance of a column's sum from one, by matrix.
        converged: whether the error is within the tolerance, by matrix.
    """

    plan: Float[Array, "*batch n n"]
    error: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]


class SoftPlan(NamedTuple):
    """Soft permutations and how well they are so; see `Sinkhorn` for the entries by group."""

    soft: Soft
    error: dict[str, Array]
    converged: dict[str, Array]


def sinkhorn(
    scores: Float[Array | np.ndarray, "*batch n n"],
    *,
    temperature: Any = 1.0,
    iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Sinkhorn:
    """Return the doubly stochastic matrix `argmax_P <P, scores> + temperature * entropy(P)`.

    `P = exp(scores / temperature + u_i + v_j)`, with `u` and `v` from alternating normalisation of rows and columns in
    the logarithmic domain. All matrices of a batch are iterated until all are within the tolerance. Derivatives are
    those of the exact solution, by the implicit function theorem, and so do not depend on the number of iterations;
    of a matrix that is not converged they are only approximate.

    Args:
        scores: one matrix or a batch, `[*batch, n, n]`.
        temperature: a positive number; near zero the plan becomes the best assignment and takes many iterations.
        iterations: upper limit.
        tolerance: how far a column's sum may be from one.

    Returns:
        The plan, its error, and whether it is within the tolerance; works under `jit`, `vmap`, `grad` and `jvp`.

    Raises:
        ValueError: the scores are not square or not finite in units of the temperature, or a hyper-parameter is out
            of range; values are not checked under a trace.

    Example:
        >>> sinkhorn(jnp.zeros((2, 2))).plan
        Array([[0.5, 0.5],
               [0.5, 0.5]], dtype=float32)

    Source:
        Cuturi, "Sinkhorn distances", NeurIPS 2013, algorithm 1; Mena et al., "Learning latent permutations with
        Gumbel-Sinkhorn networks", ICLR 2018, theorem 1.
    """
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"the scores must be square, [..., n, n], not of shape {scores.shape}.")
    if iterations < 1 or tolerance <= 0:
        raise ValueError(f"iterations and tolerance must be positive, not {iterations} and {tolerance}.")
    if not is_traced(temperature) and not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"the temperature must be a positive number, not {temperature}.")
    scores = jnp.asarray(scores)
    scaled = scores / jnp.asarray(temperature, scores.dtype)
    _check_finite(scaled)
    plan, error = _scaled_exponential(iterations, tolerance, scaled)
    return Sinkhorn(plan, error, error <= tolerance)


def soft_plan(
    spec: PermutationSpec,
    scores: Mapping[str, Any],
    *,
    temperature: Any = 1.0,
    iterations: int = 1000,
    tolerance: float = 1e-4,
) -> SoftPlan:
    """Return the soft permutations of scores for every group: `sinkhorn` of every pair of outer units.

    `permjax.match.soft.rounded` makes permutations of them.

    Args:
        spec: the symmetry.
        scores: group -> scores `[*outer, n, n]`, in the shapes of `Soft`.
        temperature: see `sinkhorn`.
        iterations: see `sinkhorn`.
        tolerance: see `sinkhorn`.

    Raises:
        ValueError: a group is missing, unknown or of another shape, or what `sinkhorn` refuses.
    """
    if set(scores) != (names := {g.name for g in spec.groups}):
        missing, extra = sorted(names - set(scores)), sorted(set(scores) - names)
        raise ValueError(f"scores do not match the spec's groups: missing {missing}, unknown {extra}.")
    for group, value in scores.items():
        if value.shape != (shape := soft_shape(spec, group)):
            raise ValueError(f"the scores of group '{group}' have shape {value.shape}, the spec expects {shape}.")
    hyper: dict[str, Any] = {"temperature": temperature, "iterations": iterations, "tolerance": tolerance}
    found = {g.name: sinkhorn(scores[g.name], **hyper) for g in spec.groups}
    return SoftPlan(*({name: getattr(s, part) for name, s in found.items()} for part in Sinkhorn._fields))


def balance(weights: Float[Array, "*batch n n"], rounds: int = 10) -> Float[Array, "*batch n n"]:
    """Normalise columns and rows of positive matrices in turn: nearly doubly stochastic, the rows exactly."""

    def step(_: Any, x: Array) -> Array:
        x = x / x.sum(-2, keepdims=True)
        return x / x.sum(-1, keepdims=True)

    return jax.lax.fori_loop(0, rounds, step, weights)


class _Duals(NamedTuple):
    """Logarithmic factors `v` of the columns, and the column sums that they lead to, `exp(v + columns)`."""

    v: Array
    columns: Array
    count: Array


def _duals(scores: Array, v: Array, count: Array) -> _Duals:
    rows = logsumexp(scores + v[..., None, :], axis=-1, keepdims=True)
    return _Duals(v, logsumexp(scores - rows, axis=-2), count)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@partial(jax.jit, static_argnums=(0, 1))
def _scaled_exponential(iterations: int, tolerance: float, scores: Array) -> tuple[Array, Array]:
    """Return `exp(scores + u_i + v_j)` with rows that sum to one and columns that nearly do, and their error."""

    def unfinished(duals: _Duals) -> Array:
        return (duals.count < iterations) & (jnp.abs(jnp.expm1(duals.columns + duals.v)) > tolerance).any()

    first = _duals(scores, jnp.zeros(scores.shape[:-1], scores.dtype), jnp.int32(0))
    last = jax.lax.while_loop(unfinished, lambda d: _duals(scores, -d.columns, d.count + 1), first)
    plan = jax.nn.softmax(scores + last.v[..., None, :], axis=-1)
    return plan, jnp.abs(plan.sum(-2) - 1).max(-1)


@_scaled_exponential.defjvp
def _tangent(iterations: int, tolerance: float, primals: tuple, tangents: tuple) -> tuple:
    """Push a change of the scores through: `dP = P (dS + a_i + b_j)`, with `a` and `b` that keep all sums.

    Eliminating `b` leaves `(1 - P P^T) a = P c - r` for the row and column sums `r` and `c` of `P dS`; the constant
    vector, which changes nothing, is fixed by `mean(a) = 0`.
    """
    plan, error = _scaled_exponential(iterations, tolerance, primals[0])
    pushed = plan * tangents[0]

    def times(x: Array, spec: str) -> Array:
        return jnp.einsum(spec, plan, x, precision=_HIGHEST)

    def matrix(a: Array) -> Array:
        return a - times(times(a, "...ij,...i->...j"), "...ij,...j->...i") + a.mean(-1, keepdims=True)

    right = times(pushed.sum(-2), "...ij,...j->...i") - pushed.sum(-1)
    right = right - right.mean(-1, keepdims=True)
    a = jax.lax.custom_linear_solve(
        matrix, right, lambda m, r: cg(m, r, tol=tolerance, maxiter=iterations)[0], symmetric=True
    )
    b = -pushed.sum(-2) - times(a, "...ij,...i->...j")
    return (plan, error), (pushed + plan * (a[..., :, None] + b[..., None, :]), jnp.zeros_like(error))


def _check_finite(scaled: Array) -> None:
    if is_traced(scaled) or bool(jnp.isfinite(scaled).all()):
        return
    bad = ~np.isfinite(np.asarray(scaled))
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise ValueError(
        f"the scores of shape {scaled.shape} hold {int(bad.sum())} values that are not finite in units of the "
        f"temperature, the first at {first}; look for NaN, Inf or overflow, or raise the temperature."
    )
