"""Averages of aligned models: one point between two or more of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from permjax import tree
from permjax.permutation import is_traced, namespace
from permjax.steps import MergeState, Result
from permjax.symmetry.spec import PermutationSpec

Weights: TypeAlias = Sequence[ArrayLike] | Array | np.ndarray | None

_COLLINEAR = 1e-6  # below this distance of |cosine| from one there is no arc to follow


class AverageInfo(NamedTuple):
    """The weights of an average, adding up to one."""

    weights: Float[Array | np.ndarray, " models"]


class SlerpInfo(NamedTuple):
    """Cosines between the two models, one or one per leaf of role weight, and where a line replaced the arc."""

    cosine: Float[Array | np.ndarray, "*leaves"]
    collinear: Bool[Array | np.ndarray, "*leaves"]


def average(spec: PermutationSpec, models: Sequence[Any], *, weights: Weights = None) -> Result:
    """The weighted mean of aligned models: sum_m w_m theta_m / sum_m w_m, statistics included.

    Frozen leaves are constants of the architecture: they must be equal and are taken over.

    Args:
        spec: the symmetry of the models.
        models: aligned pytrees of one structure; NumPy leaves stay NumPy. Under a trace values are not checked.
        weights: one number >= 0 for each model, normalised here; equal ones by default.

    Returns:
        The mean as the only model, no plan, and an `AverageInfo`.

    Raises:
        ValueError: models that differ in structure or in a frozen leaf, do not fit the spec or are not finite; weights
            that are negative, not finite, all zero or not as many as the models.

    Example:
        >>> aligned = weight_matching(spec, [a, b], key=key).models
        >>> merged = average(spec, aligned, weights=[3, 1]).models[0]
    """
    models = tuple(models)
    check_aligned(spec, models)
    given = [1.0] * len(models) if weights is None else list(weights)
    if any(not is_traced(w) and w < 0 for w in given):
        raise ValueError(f"The weights {given} of an average must not be negative; give numbers >= 0.")
    merged = tree.average(models, given)
    shares = namespace(*given).asarray(given, dtype=float)
    return Result((merged,), None, AverageInfo(shares / shares.sum()))


def slerp(spec: PermutationSpec, models: Sequence[Any], *, t: ArrayLike = 0.5, per_leaf: bool = False) -> Result:
    """The point at `t` on the arc between two aligned models: [sin((1-t)w) a + sin(t w) b] / sin w, cos w = cos(a, b).

    The angle w is that of all leaves of role weight as one vector. Statistics follow the line (1-t) a + t b, and so
    does everything where the models are nearly collinear. Frozen leaves must be equal and are taken over.

    Args:
        spec: the symmetry of the models.
        models: two aligned pytrees of one structure; NumPy leaves stay NumPy.
        t: where to go, from 0 (first model) to 1 (second model).
        per_leaf: measure an angle for every leaf by itself.

    Returns:
        The point as the only model, no plan, and a `SlerpInfo`.

    Raises:
        ValueError: not two models, or models that `average` refuses.

    Source:
        Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    models = tuple(models)
    if len(models) != 2:
        raise ValueError(f"slerp runs between two models, not {len(models)}; use `average` for more.")
    check_aligned(spec, models)
    a, b = map(tree.flatten, models)
    moving = [leaf.name for leaf in spec.leaves if leaf.role == "weight" and _is_floating(a[leaf.name])]
    mixed, infos = tree.flatten(tree.lerp(*models, t)), []
    for names in [[name] for name in moving] if per_leaf else [moving]:
        of_a, of_b, info = _arc({n: a[n] for n in names}, {n: b[n] for n in names}, t)
        mixed |= {n: _blend(a[n], b[n], of_a, of_b) for n in names}
        infos.append(info)
    xp = namespace(*jax.tree.leaves(infos))
    info = jax.tree.map(lambda *x: xp.stack(x), *infos) if per_leaf else infos[0]
    return Result((tree.unflatten(models[0], mixed),), None, info)


@dataclass(frozen=True)
class Average:
    """Step form of `average`: the models of a state become their mean."""

    weights: tuple[float, ...] | None = None

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with the mean as its only model."""
        return state.after(average(state.spec, state.models, weights=self.weights))


@dataclass(frozen=True)
class Slerp:
    """Step form of `slerp`: the two models of a state become a point between them."""

    t: float = 0.5
    per_leaf: bool = False

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with the point as its only model."""
        return state.after(slerp(state.spec, state.models, t=self.t, per_leaf=self.per_leaf))


def check_aligned(spec: PermutationSpec, models: Sequence[Any]) -> None:
    """Check that models can be merged: one structure, that of the spec, finite, with equal frozen leaves.

    Raises:
        ValueError: names the leaf and the model.
    """
    tree.check_same_structure(models)
    spec.validate({name: np.shape(leaf) for name, leaf in tree.flatten(models[0]).items()}, "model 0")
    for index, model in enumerate(models):
        tree.check_finite(model, f"model {index}")
    frozen = [leaf.name for leaf in spec.leaves if leaf.role == "frozen"]
    first, *others = map(tree.flatten, models)
    for index, other in enumerate(others, 1):
        _check_frozen(frozen, first, other, index)


def _check_frozen(names: Sequence[str], first: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
    for name in names:
        if is_traced(first[name], other[name]) or np.array_equal(first[name], other[name]):
            continue
        message = (
            f"The frozen leaf '{name}' differs between model 0 and model {index}; frozen leaves are constants that no "
            "average can mix: make it equal in all models, or trace the spec without freezing it."
        )
        raise ValueError(message)


def _arc(a: Mapping[str, Any], b: Mapping[str, Any], t: ArrayLike) -> tuple[Any, Any, SlerpInfo]:
    """Return the factors of `a` and `b` at `t`; those of the line where there is no arc."""
    product, scale = tree.dot(a, b), tree.norm(a) * tree.norm(b)
    xp = namespace(product, t)
    product, scale = xp.asarray(product), xp.asarray(scale)
    collinear = ~(xp.abs(product) < (1 - _COLLINEAR) * scale)
    cosine = product / xp.where(scale > 0, scale, xp.ones_like(scale))
    angle = xp.arccos(xp.where(collinear, xp.zeros_like(cosine), cosine))
    of_a = xp.where(collinear, 1 - t, xp.sin((1 - t) * angle) / xp.sin(angle))
    of_b = xp.where(collinear, t, xp.sin(t * angle) / xp.sin(angle))
    return of_a, of_b, SlerpInfo(cosine, collinear)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _blend(x: Any, y: Any, of_x: Any, of_y: Any) -> Any:
    """Return `of_x x + of_y y` of the kind and dtype of `x`; half precision is computed in float32."""
    factors = (of_x, of_y) if is_traced(of_x, of_y) else (np.asarray(of_x), np.asarray(of_y))
    xp = jnp if is_traced(*factors) else namespace(x, y)
    arrays = [xp.asarray(v) for v in (x, y)]
    wide = np.result_type(np.float32, *(v.dtype for v in arrays))
    total = sum(v.astype(wide) * xp.asarray(f, wide) for v, f in zip(arrays, factors, strict=True))
    return xp.asarray(total, arrays[0].dtype)
