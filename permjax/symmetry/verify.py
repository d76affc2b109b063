"""Check a spec numerically: permuted random weights must compute the same function, and the check must have power."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from permjax import tree
from permjax.action import permute, permute_leaf
from permjax.permutation import Permutations, identity, random_permutations
from permjax.symmetry.spec import Axis, Fixed, Leaf, Member, Of, PermutationSpec, Product, Sum, Verification

TOLERANCE = 1e-10
"""Largest relative change of the output in float64 that counts as none."""
TOLERANCE_FLOAT32 = 1e-3
"""The same where `apply` itself computes in float32."""
POWER = 1e4
"""How many tolerances the output must change when one member moves alone."""


class SpecError(ValueError):
    """A spec that does not describe a symmetry of the function."""


def equivalence_error(apply: Callable, params: Any, spec: PermutationSpec, key: jax.Array, *inputs: Any) -> float:
    """Return `max |f(p(theta)) - f(theta)| / max |f(theta)|` for one random permutation p of every group.

    Args:
        apply: `apply(params, *inputs)`.
        params: the model's own weights, in their own precision.
        spec: the symmetry to check.
        key: random key of the permutation.
        *inputs: concrete inputs.

    Example:
        >>> equivalence_error(apply, params, spec, jax.random.key(0), x) < 1e-5
        True
    """
    run = jax.jit(apply)
    return _change(run(params, *inputs), run(permute(spec, random_permutations(spec, key), params), *inputs))


def verify(
    apply: Callable,
    params: Any,
    spec: PermutationSpec,
    *inputs: Any,
    seed: int = 0,
    on_failure: Literal["raise", "pin"] = "raise",
    bound: int | None = None,
) -> PermutationSpec:
    """Check a spec on random weights in float64 and return it with the verdict in `spec.verification`.

    Weights are drawn anew (vectors uniform in [.5, 1.5), others normal times 1.5/sqrt(fan-in)): at initialisation a
    moved norm gain would change nothing. Decided in float64, at a relative change of at most 1e-10; float32 is
    reported. Where `apply` computes in float32 itself the tolerance is 1e-3, and the verdict says so. Groups of which
    no member, moved alone, changes the output by more than 1e-6 (1e-2 in float32) are listed in `spec.unverified`.

    Args:
        apply: `apply(params, *inputs)`.
        params: pytree of arrays or of `jax.ShapeDtypeStruct`; of concrete ones only integer leaves are used.
        spec: the spec, traced or written by hand.
        *inputs: concrete or abstract inputs.
        seed: seed of weights, inputs and permutations.
        on_failure: raise, or return a spec in which the failing groups are pinned.
        bound: abstract integer inputs are drawn below it.

    Raises:
        SpecError: names the groups that change the output, and by how much.
    """
    key, draw = jax.random.key(seed), np.random.default_rng(seed)
    check = _widest_check(apply, spec, _random_params(params, draw), _random_inputs(inputs, draw, bound))
    with jax.enable_x64(check.wide):
        perms = {g: _moving(np.asarray(p)) for g, p in random_permutations(spec, key).items()}
        error = check.change(perms)
        if error > check.tolerance:
            bad = check.failing(perms, error)
            if on_failure == "raise":
                raise SpecError(_complaint(bad, error))
            pinned = pin_groups(spec, [g for g in spec.groups if g.name in bad], "failed verification")
            return verify(apply, params, pinned, *inputs, seed=seed, bound=bound)
        unverified = tuple(g.name for g in spec.groups if not check.has_power(g.name))
    single = _Check(apply, spec, _cast(check.params, np.float32), _cast(check.inputs, np.float32)).change(perms)
    verdict = Verification(error, single, TOLERANCE if error <= TOLERANCE else check.tolerance)
    return replace(spec, unverified=unverified, verification=verdict)


def _moving(rows: np.ndarray) -> np.ndarray:
    """Return permutations that leave no unit in its place: a function may depend on the place of a single one."""
    size = rows.shape[-1]
    moved = rows.reshape(-1, size).copy()
    for row in moved:
        still = np.flatnonzero(row == np.arange(size))
        if len(still) == 1:
            still = np.append(still, (still + 1) % size)
        row[still] = np.roll(row[still], 1)
    return moved.reshape(rows.shape)


class _Check:
    """The function at random weights, and how much moving units changes it."""

    def __init__(self, apply: Callable, spec: PermutationSpec, params: Any, inputs: Any):
        self.run = jax.jit(lambda p, i: apply(p, *i))
        self.spec, self.params, self.inputs = spec, params, inputs
        self.wide = jnp.zeros(()).dtype == jnp.float64
        self.device = jax.tree.map(jnp.asarray, params)
        self.base = jax.device_get(self.run(self.device, inputs))
        self.tolerance = TOLERANCE if self._wide() else TOLERANCE_FLOAT32

    def change(self, permutations: Permutations) -> float:
        """Return the relative change of the output under permutations of all groups."""
        return _change(self.base, self.run(permute(self.spec, permutations, self.params), self.inputs))

    def failing(self, permutations: Permutations, error: float) -> dict[str, float]:
        """Return the groups that change the output by themselves, else all that were moved."""
        still = identity(self.spec)
        alone = {g: self.change({**still, g: p}) for g, p in permutations.items()}
        return {g: e for g, e in alone.items() if e > self.tolerance} or dict.fromkeys(permutations, error)

    def has_power(self, group: str) -> bool:
        """Tell whether some member of a group, moved alone, changes the output."""
        still = identity(self.spec)
        threshold = min(POWER * self.tolerance, 1e-2)
        moved = {**still, group: np.roll(still[group], 1, axis=-1)}
        return any(self._alone(m, moved) > threshold for m in self.spec.members(group))

    def _alone(self, member: Member, moved: Permutations) -> float:
        leaf = _only(self.spec, member)
        params = tree.flatten(self.device)
        params[member.leaf] = permute_leaf(self.spec, leaf, moved, tree.flatten(self.params)[member.leaf])
        return _change(self.base, self.run(tree.unflatten(self.device, params), self.inputs))

    def _wide(self) -> bool:
        """Tell whether every floating-point value inside is float64, as the weights are."""
        closed = jax.make_jaxpr(self.run)(self.device, self.inputs)
        return not any(_narrow(v.aval) for v in _variables(closed))


def _widest_check(apply: Callable, spec: PermutationSpec, params: Any, inputs: Any) -> _Check:
    """Return the check in float64, or in float32 where `apply` does not accept float64.

    Flax's recurrent carries do not, and JAX keeps the 32-bit copies of NumPy constants of functions that have run.
    """
    single = _cast(params, np.float32), _cast(inputs, np.float32)
    try:
        with jax.enable_x64(True):
            return _Check(apply, spec, params, inputs)
    except TypeError:
        with jax.enable_x64(True):
            return _Check(apply, spec, *single)
    except ValueError:
        with jax.enable_x64(False):
            return _Check(apply, spec, *single)


def _variables(jaxpr: Any):
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in inner.eqns:
        yield from eqn.outvars
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    yield from _variables(sub)


def _narrow(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", np.dtype(bool))
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 64 and aval.size > 0


def _change(base: Any, other: Any) -> float:
    """Return the largest absolute change over all outputs, relative to the largest output."""
    one, two = ([_numbers(x) for x in jax.tree.leaves(t)] for t in (base, other))
    top = max((np.abs(x[np.isfinite(x)]).max(initial=0.0) for x in one), default=0.0)
    gap = max((_gap(x, y) for x, y in zip(one, two, strict=True)), default=0.0)
    return float(gap / top) if top > 0 else float(gap)


def _numbers(output: Any) -> np.ndarray:
    array = np.asarray(output)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _gap(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest difference; what is not finite has to stay as it is."""
    finite = np.isfinite(x) & np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf
    return np.abs(x[finite] - y[finite]).max(initial=0.0)


def _random_params(params: Any, draw: np.random.Generator) -> Any:
    def fill(leaf):
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        shape, dtype = np.shape(leaf), leaf.dtype
        if _is_key(leaf):
            return _some_key(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return np.zeros(shape, dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)
        drawn = _random_weight(shape, draw)
        return drawn + 1j * _random_weight(shape, draw) if jnp.issubdtype(dtype, jnp.complexfloating) else drawn

    return jax.tree.map(fill, params)


def _random_weight(shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    if len(shape) < 2:
        return draw.uniform(0.5, 1.5, shape)
    fan_in = np.prod(shape[:-1])
    return draw.standard_normal(shape) * (1.5 / np.sqrt(max(fan_in, 1)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key)


def _some_key(leaf: Any) -> Any:
    """Return random keys as they are, or keys for abstract ones."""
    return jax.random.split(jax.random.key(0), leaf.shape) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _random_inputs(inputs: Any, draw: np.random.Generator, bound: int | None) -> Any:
    def fill(leaf):
        if _is_key(leaf):
            return _some_key(leaf)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return _widen(np.asarray(leaf))
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return draw.standard_normal(leaf.shape)
        return draw.integers(0, 2 if bound is None else bound, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, inputs)


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _cast(values: Any, dtype: Any) -> Any:
    def cast(x):
        return x.astype(dtype) if isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, values)


def _only(spec: PermutationSpec, member: Member) -> Leaf:
    """Return the member's leaf with everything fixed but the member itself and the groups that it is per."""
    leaf = spec.leaf(member.leaf)
    moving = spec.group(_end(leaf.axes[member.axis], member.path))
    still = {g.name: "" for g in spec.groups if g.name not in moving.per}
    paths = [member.path if i == member.axis else None for i in range(len(leaf.axes))]
    return replace(leaf, axes=tuple(_fix(a, still, spec, keep=p) for a, p in zip(leaf.axes, paths, strict=True)))


def _end(axis: Axis, path: tuple[int, ...]) -> str:
    for k in path:
        axis = (axis.factors if isinstance(axis, Product) else axis.segments)[k]  # type: ignore[union-attr]
    return axis.group  # type: ignore[union-attr]


def _fix(axis: Axis, groups: Mapping[str, str], spec: PermutationSpec, keep=None, path=()) -> Axis:
    """Return the axis tree with the given groups fixed for the given reasons, except at the path `keep`."""
    match axis:
        case Of(group) if group in groups and path != keep:
            return Fixed(spec.group(group).size, groups[group])
        case Product(parts):
            return Product(tuple(_fix(p, groups, spec, keep, (*path, i)) for i, p in enumerate(parts)))
        case Sum(parts):
            return Sum(tuple(_fix(p, groups, spec, keep, (*path, i)) for i, p in enumerate(parts)))
    return axis


def pin_groups(spec: PermutationSpec, groups: Any, reason: str) -> PermutationSpec:
    """Return the spec without some groups; groups that were per them move to one permutation per fixed index."""
    reasons = {g.name: reason for g in groups}
    outer = {name for g in spec.groups if g.name not in reasons for name in g.per if name in reasons}
    gone = {name: why for name, why in reasons.items() if name not in outer}
    leaves = tuple(replace(f, axes=tuple(_fix(a, gone, spec) for a in f.axes)) for f in spec.leaves)
    free = tuple(g for g in spec.groups if g.name not in reasons)
    fixed = tuple(g for g in spec.groups if g.name in outer)
    return PermutationSpec(free, leaves, (*spec.indices, *fixed))


def _complaint(bad: Mapping[str, float], error: float) -> str:
    worst = sorted(bad.items(), key=lambda item: -item[1])[:5]
    rows = ", ".join(f"'{name}' (relative change {e:.1e})" for name, e in worst)
    return (
        f"permuting these groups changes the output, so the spec does not fit the function: {rows}; all groups "
        f'together change it by {error:.1e}. Correct the spec, or pin them with on_failure="pin".'
    )
