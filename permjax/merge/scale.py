"""Canonical scale: units brought to one scale before averaging, where the function does not depend on it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from permjax import tree
from permjax.permutation import namespace
from permjax.steps import MergeState, Result
from permjax.symmetry.capture import capture
from permjax.symmetry.spec import Axis, Of, PermutationSpec, Product, Sum, walk

Place: TypeAlias = tuple[str, int]  # leaf and axis

_KINDS = ("plain", "after norm")


class ScaleInfo(NamedTuple):
    """What was brought to canonical scale.

    Attributes:
        groups: the groups that were rescaled, in forward order.
        kinds: for each of them `"plain"` or `"after norm"`.
        left: the groups that were left alone, being per others or because no rescaling preserves the function.
        change: relative change of the output by all of it.
    """

    groups: tuple[str, ...]
    kinds: tuple[str, ...]
    left: tuple[str, ...]
    change: float


def canonical_scale(
    spec: PermutationSpec, params: Any, *, apply: Callable, inputs: Any, tolerance: float = 1e-4
) -> Result:
    """Rescale the units of a model such that what writes each of them has norm one and the function stays.

    With factors s of a group, `"plain"` multiplies by s what writes the group (contractions, and what is added) and
    divides by s what reads it, as ReLU allows; `"after norm"` multiplies only the norms' scales and biases (leaves of
    one axis that are no bias of a contraction) and divides what reads. For every group that is not per others both are
    tried on the inputs, with random factors in [0.5, 2], in float64 (float32 where `apply` takes no other), and the
    first that leaves the output as it is decides. Then s is one over the joint norm of all entries that s multiplies,
    per unit; units of norm zero keep s = 1. Groups take their turn in forward order, and leaves that also carry a group
    whose turn comes later (writers further down a residual stream) do not count for the norm. So models that differ by
    such factors become equal.

    Args:
        spec: the symmetry.
        params: a pytree; NumPy leaves stay NumPy.
        apply: `apply(params, *inputs) -> outputs`.
        inputs: one batch, an array or a tuple or list of inputs; a few samples will do.
        tolerance: largest change of the output, relative to the largest output, that counts as none.

    Returns:
        The rescaled model as the only one, no plan, and a `ScaleInfo`.

    Raises:
        ValueError: a model that does not fit the spec or is not finite, a tolerance that is not above zero, or outputs
            that are not finite.

    Example:
        >>> models = [canonical_scale(spec, m, apply=apply, inputs=x).models[0] for m in (a, b)]
    """
    inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    named = tree.flatten(params)
    spec.validate({name: np.shape(leaf) for name, leaf in named.items()}, "the model")
    tree.check_finite(params, "the model")
    if not tolerance > 0:
        raise ValueError(f"The tolerance is {tolerance}; give a relative change of the output above zero.")
    uses = _uses(apply, spec, params, inputs)
    change, wide, done = _change_of(apply, params, inputs), _widened(named), {}
    kinds = {g: k for g in uses.order if (k := _kind(spec, uses, g, wide, change, tolerance)) is not None}
    for position, (group, kind) in enumerate(kinds.items()):
        powers = _powers(spec, uses, group, kind)
        norm = _norm(spec, wide, powers, group, set(list(kinds)[position:]))
        found = _scaled(spec, wide, powers, group, 1 / np.where(norm > 0, norm, 1.0))
        if change(found) <= tolerance:
            wide, done = found, {**done, group: kind}
    scaled = {name: _like(leaf, wide[name]) for name, leaf in named.items()}
    left = tuple(g.name for g in spec.groups if g.name not in done)
    info = ScaleInfo(tuple(done), tuple(done.values()), left, change(_widened(scaled)))
    return Result((tree.unflatten(params, scaled),), None, info)


@dataclass(frozen=True)
class CanonicalScale:
    """Step form of `canonical_scale`: every model of a state by itself, checked on the first batch of the data."""

    tolerance: float = 1e-4

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with rescaled models and one `ScaleInfo` for each; needs `apply` and `data`."""
        apply, data = (state.need(name, "CanonicalScale") for name in ("apply", "data"))
        hyper = {"apply": apply, "inputs": _first(data), "tolerance": self.tolerance}
        results = [canonical_scale(state.spec, model, **hyper) for model in state.models]
        models, infos = tuple(r.models[0] for r in results), tuple(r.info for r in results)
        return state.after(Result(models, None, infos))


def _first(data: Iterable) -> Any:
    for batch in data:
        return batch
    raise ValueError("`data` gave no batches; give a list or a loader with one batch or more.")


# where units are written and read


class _Uses(NamedTuple):
    """Where contractions take and make features, the biases of their results, and the groups in forward order."""

    read: frozenset[Place]
    written: frozenset[Place]
    contracted: frozenset[str]
    biases: frozenset[str]
    order: tuple[str, ...]


def _uses(apply: Callable, spec: PermutationSpec, params: Any, inputs: tuple) -> _Uses:
    """Find them from the shapes alone; nothing is computed."""
    read, written, biases = {}, {}, set()

    def trace(params: Any, *inputs: Any) -> None:
        for label, io in capture(apply, spec, params, *inputs).leaves.items():
            name = label.rstrip("'")
            depthwise = io.kind == "conv" and io.input.shape[-1] != spec.leaf(name).shape[io.in_axes[0]]
            written.update({(name, axis): None for axis in io.out_axes})
            read.update({(name, axis): None for axis in (*io.in_axes, *(io.out_axes if depthwise else ()))})
            biases.add(io.bias)

    jax.eval_shape(trace, params, *inputs)
    plain = {g.name: None for g in spec.groups if not g.per}
    forward = [group for leaf, axis in written for group in _groups(spec.leaf(leaf).axes[axis]) if group in plain]
    contracted = frozenset(leaf for leaf, _ in (*read, *written))
    order = tuple(dict.fromkeys(forward) | plain)
    return _Uses(frozenset(read), frozenset(written), contracted, frozenset(biases), order)


def _powers(spec: PermutationSpec, uses: _Uses, group: str, kind: str) -> dict[Place, int]:
    """Return the power of s that every place of a group takes; empty where this kind has nothing to multiply."""
    members = [m for m in spec.members(group) if spec.leaf(m.leaf).role == "weight"]
    places = list(dict.fromkeys((m.leaf, m.axis) for m in members))
    added = [p for p in places if p[0] not in uses.contracted]
    if kind == "plain":
        taken = {*added, *(p for p in places if p in uses.written)}
    else:
        taken = {p for p in added if p[0] not in uses.biases and len(spec.leaf(p[0]).axes) == 1}
    powers = {p: (p in taken) - (p in uses.read) for p in places}
    return {p: power for p, power in powers.items() if power} if taken else {}


def _kind(
    spec: PermutationSpec, uses: _Uses, group: str, wide: Mapping[str, Any], change: Callable, tolerance: float
) -> str | None:
    """Return the first kind of rescaling that leaves the output as it is under random factors."""
    factors = 2 ** np.random.default_rng(0).uniform(-1, 1, spec.group(group).size)
    for kind in _KINDS:
        powers = _powers(spec, uses, group, kind)
        if powers and change(_scaled(spec, wide, powers, group, factors)) <= tolerance:
            return kind
    return None


# factors along axis trees


def _groups(axis: Axis) -> list[str]:
    return [end.group for _, end in walk(axis) if isinstance(end, Of)]


def _units(spec: PermutationSpec, axis: Axis, group: str) -> Int[np.ndarray, " positions"]:
    """Return the unit of a group at every position of an axis, -1 where there is none."""
    match axis:
        case Of(name) if name == group:
            return np.arange(spec.group(group).size)
        case Product(factors):
            found = np.full(1, -1)
            for factor in factors:
                found = np.maximum(found[:, None], _units(spec, factor, group)[None, :]).reshape(-1)
            return found
        case Sum(segments):
            return np.concatenate([_units(spec, segment, group) for segment in segments])
        case _:
            return np.full(spec.size(axis), -1)


def _scaled(
    spec: PermutationSpec,
    named: Mapping[str, Any],
    powers: Mapping[Place, int],
    group: str,
    scale: Float[np.ndarray, " n"],
) -> dict[str, Any]:
    """Return the leaves multiplied by powers of the units' factors."""
    result = dict(named)
    for (name, axis), power in powers.items():
        units = _units(spec, spec.leaf(name).axes[axis], group)
        factors = np.where(units >= 0, scale[units] ** power, 1.0)
        result[name] = result[name] * factors.reshape([-1 if i == axis else 1 for i in range(result[name].ndim)])
    return result


def _norm(
    spec: PermutationSpec, named: Mapping[str, Any], powers: Mapping[Place, int], group: str, pending: set[str]
) -> Float[np.ndarray, " n"]:
    """Return the norm, per unit, of the multiplied entries of leaves that carry no other group still to be scaled."""
    total = np.zeros(spec.group(group).size)
    for (name, axis), power in powers.items():
        axes = spec.leaf(name).axes
        beside = {g for i, other in enumerate(axes) for g in _groups(other) if i != axis or g != group}
        if power > 0 and not beside & pending:
            units = _units(spec, axes[axis], group)
            squares = np.square(named[name]).sum(axis=tuple(i for i in range(len(axes)) if i != axis))
            total += np.bincount(units[units >= 0], squares[units >= 0], minlength=len(total))
    return np.sqrt(total)


# numbers


def _change_of(apply: Callable, params: Any, inputs: tuple) -> Callable[[Mapping[str, Any]], float]:
    """Return the function from named leaves to the relative change of the output against the given model."""
    run, named = jax.jit(apply), tree.flatten(params)

    def outputs(leaves: Mapping[str, Any], wide: bool) -> list[np.ndarray]:
        dtype = np.float64 if wide else np.float32
        with jax.enable_x64(wide):
            given = jax.tree.map(lambda x: _cast(x, dtype), (tree.unflatten(params, leaves), inputs))
            return [np.asarray(x, np.float64) for x in jax.tree.leaves(run(given[0], *given[1]))]

    try:
        wide, base = True, outputs(named, True)
    except (TypeError, ValueError):  # as in flax's recurrent carries
        wide, base = False, outputs(named, False)
    top = max((np.abs(x).max(initial=0.0) for x in base), default=0.0)
    if not np.isfinite(top):
        raise ValueError("The outputs of the model on these inputs are not finite; look at the inputs.")

    def change(leaves: Mapping[str, Any]) -> float:
        gaps = [np.abs(x - y).max(initial=0.0) for x, y in zip(base, outputs(leaves, wide), strict=True)]
        gap = max(map(float, gaps), default=0.0)
        return gap / float(top) if top > 0 else gap

    return change


def _cast(leaf: Any, dtype: Any) -> Any:
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(np.asarray(leaf).astype(dtype)) if floating else leaf


def _widened(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves with float64 NumPy arrays in place of floating ones."""
    floating = {name for name, leaf in named.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}
    return {n: np.asarray(leaf).astype(np.float64) if n in floating else leaf for n, leaf in named.items()}


def _like(leaf: Any, value: Any) -> Any:
    """Return a value as an array of the kind and dtype of a leaf; untouched leaves of no floating type as they are."""
    return leaf if value is leaf else namespace(leaf).asarray(value.astype(leaf.dtype))
