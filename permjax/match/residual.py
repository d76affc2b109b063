"""Orthogonal residual alignment: the stream of a transformer turned, while all other units are permuted.

This is no permutation matching. A residual stream that is read through plain norms only (see
`permjax.nets.folding`) may be turned by any orthogonal map, of which permutations are a few. Results keep the
rotations apart from the plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import helmert

from permjax import tree
from permjax.action import permute
from permjax.lmc.barrier import l2_distance
from permjax.match import costs
from permjax.match.assignment import Solver
from permjax.match.models import check_models, entries
from permjax.match.weights import weight_matching
from permjax.permutation import Permutations, compose, identity
from permjax.plan import Plan
from permjax.steps import MergeState, Result
from permjax.symmetry.blocks import Block, extract, leaf_blocks
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.verify import TOLERANCE_FLOAT32, pin_groups

Keeps = Literal["none", "ones"]
"""What every admissible rotation leaves alone: nothing (RMSNorm), or the all-ones direction (LayerNorm)."""

_RTOL = 1e-6  # smallest relative gain for which another round is worth it


class ResidualInfo(NamedTuple):
    """Diagnostics of `residual_matching`, with one entry for every model but the anchor.

    Attributes:
        group: the group that was turned.
        objective: inner product with the anchor over leaves of role weight, float64: after the first rotation, then
            after every permutation and every further rotation in turn; shorter runs repeat their last value.
        rounds: permutations, each with the rotation after it.
        converged: whether a run ended because the objective stopped growing.
        symmetry_error: largest relative change of the outputs under a random admissible rotation, by model.
        l2_before: distance to the anchor over leaves of role weight.
        l2_after: the same after alignment.
    """

    group: str
    objective: Float[np.ndarray, "models steps"]
    rounds: Int[np.ndarray, " models"]
    converged: Bool[np.ndarray, " models"]
    symmetry_error: Float[np.ndarray, " models"]
    l2_before: Float[np.ndarray, " models"]
    l2_after: Float[np.ndarray, " models"]


class ResidualResult(NamedTuple):
    """What `residual_matching` returns.

    Attributes:
        models: the anchor as it is, and the others turned and permuted.
        plan: permutations of all groups but the turned one, for which it holds the identity.
        rotations: for every model the orthogonal map of the turned group, float64 `[n, n]`.
        info: a `ResidualInfo`.
    """

    models: tuple[Any, ...]
    plan: Plan
    rotations: tuple[Float[np.ndarray, "n n"], ...]
    info: ResidualInfo


class _Stream(NamedTuple):
    """The group that is turned, and where: `places` holds, by leaf, the blocks in which it stands."""

    group: str
    size: int
    fixed: Keeps
    places: Mapping[str, tuple[Block, ...]]


class _Search(NamedTuple):
    """What all models share: the stream, the spec without it, the anchor's leaves, and `_matched` with its options."""

    stream: _Stream
    others: PermutationSpec
    anchor: dict[str, Any]
    match: Callable[..., tuple[Permutations, Any]]


def residual_matching(
    spec: PermutationSpec,
    models: Sequence[Any],
    *,
    key: jax.Array,
    apply: Callable,
    inputs: tuple,
    group: str | None = None,
    fixed: Keeps = "none",
    iterations: int = 20,
    solver: Solver = "auto",
    max_sweeps: int = 100,
    restarts: int = 1,
) -> ResidualResult:
    """Align models to the first one by an orthogonal map of one group and permutations of all others.

    `max_{O, p} sum_l <a_l, permute(p, rotate(O, b))_l>` over leaves of role weight, in turn over the permutations
    (weight matching without the group) and over O (the polar factor of the Gram matrix of anchor and model, summed
    over all places of the group), so that no half of a round lowers it. The first O comes from the leaves in which
    the group stands beside no other, such as embeddings; without any, from plain weight matching.

    Vectors of equal entries stay as they are: gains of one that multiply the stream, and biases of zero. Works on
    the host; where the group stands twice in a leaf a rotation is kept only if the objective grows.

    Args:
        spec: the symmetry of the models, the norms of which are folded (`permjax.nets.folding.fold_norms`).
        models: two or more pytrees; the first is the anchor.
        key: draws the orders of weight matching, and the rotation with which the symmetry is checked.
        apply: `apply(params, *inputs) -> outputs`.
        inputs: example inputs for that check.
        group: the group to turn; by default the one with the most members, in a transformer its residual stream.
        fixed: `"ones"` for LayerNorm, which subtracts the mean: rotations then keep the all-ones direction.
        iterations: upper limit of rounds.
        solver: of weight matching; see there.
        max_sweeps: of weight matching.
        restarts: of weight matching, in the first round.

    Returns:
        A `ResidualResult`; `models[m]` is `permute(spec, plan.permutations(m), rotate(spec, group, rotations[m], ..))`.

    Raises:
        ValueError: fewer than two models, models that do not fit, a group that is not free or indexes others, or one
            of which a random rotation changes the outputs: the norms are not folded, or `fixed` is wrong.

    Example:
        >>> result = residual_matching(spec, [a, b], key=key, apply=folded.apply, inputs=(tokens,), fixed="ones")
        >>> result.rotations[1] @ result.rotations[1].T  # the identity

    Source:
        "Generalized linear mode connectivity for transformers", 2025, its weight matching; Schönemann, "A generalized
        solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """
    models = tuple(models)
    check_models(spec, models)
    if iterations < 1 or fixed not in ("none", "ones"):
        raise ValueError(f"iterations must be at least 1 and fixed 'none' or 'ones', not {iterations} and {fixed!r}.")
    found = [entries(model, f"model {index}", local=True) for index, model in enumerate(models)]
    stream = _stream(spec, _chosen(spec, group), fixed, found)
    errors = [_checked(stream, leaves, model, apply, inputs, key) for leaves, model in zip(found, models, strict=True)]
    others = pin_groups(spec, [spec.group(stream.group)], "turned, not permuted")
    match = partial(_matched, key=key, solver=solver, max_sweeps=max_sweeps, restarts=restarts)
    search = _Search(stream, others, found[0], match)
    runs = [_align(spec, search, leaves, iterations) for leaves in found[1:]]
    still = identity(spec)
    plan = Plan.from_permutations(spec, [still, *(still | run.permutations for run in runs)])
    aligned = tuple(_like(model, run.leaves) for model, run in zip(models[1:], runs, strict=True))
    rotations = (np.eye(stream.size), *(run.rotation for run in runs))
    return ResidualResult((models[0], *aligned), plan, rotations, _info(spec, stream, found, errors, runs))


@dataclass(frozen=True)
class ResidualMatching:
    """Step form of `residual_matching`: turns and permutes the models of a state; the plan holds the permutations."""

    group: str | None = None
    fixed: Keeps = "none"
    iterations: int = 20
    solver: str = "auto"
    max_sweeps: int = 100
    restarts: int = 1

    def __call__(self, state: MergeState) -> MergeState:
        """Return the state with aligned models, the plan and a `ResidualInfo`; needs `apply` and `data`."""
        apply, data = (state.need(name, "ResidualMatching") for name in ("apply", "data"))
        state, key = state.split()
        batch = next(iter(data))
        inputs = batch if isinstance(batch, tuple) else (batch,)
        found = residual_matching(state.spec, state.models, key=key, apply=apply, inputs=inputs, **vars(self))
        return state.after(Result(found.models, found.plan, found.info))


def rotate(spec: PermutationSpec, group: str, rotation: Float[np.ndarray, "n n"], params: Any) -> Any:
    """Turn one group of a model: `leaf -> O leaf` on every axis where the group stands, on the host.

    Vectors of equal entries stay as they are; see `residual_matching`.

    Args:
        spec: the symmetry.
        group: the group to turn.
        rotation: the orthogonal map O; unit `i` of the result is `sum_j O[i, j]` times unit `j`.
        params: pytree with the spec's leaf names and shapes.
    """
    leaves = entries(params, "params", local=True)
    return _like(params, _turned(_stream(spec, group, "none", [leaves]), rotation, leaves))


def random_rotation(key: jax.Array, size: int, fixed: Keeps = "none") -> Float[np.ndarray, "n n"]:
    """Draw an orthogonal map, uniformly from all that keep what is fixed."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    return _polar(rng.standard_normal((size, size)), fixed)


# the group and its places


def _chosen(spec: PermutationSpec, group: str | None) -> str:
    if not spec.groups:
        raise ValueError("the spec has no free group, so there is none to turn.")
    name = max(spec.groups, key=lambda g: len(spec.members(g.name))).name if group is None else group
    outer, inside = spec.group(name).per, [g.name for g in spec.groups if name in g.per]
    if name not in spec or outer or inside:
        why = f"it indexes '{inside[0]}'" if inside else f"it is per '{outer[0]}'" if outer else "it never moves"
        raise ValueError(f"group '{name}' cannot be turned, as {why}; give `group`, the one of the residual stream.")
    return name


def _stream(spec: PermutationSpec, group: str, fixed: Keeps, models: Sequence[Mapping[str, Any]]) -> _Stream:
    """Return the places of a group, without the vectors that are equal throughout in every model."""
    places = {}
    for leaf in dict.fromkeys(member.leaf for member in spec.members(group)):
        blocks = tuple(block for block in leaf_blocks(spec, spec.leaf(leaf)) if group in block.names)
        vectors = all(block.names == (group,) for block in blocks)
        if not (vectors and all(np.ptp(model[leaf]) == 0 for model in models)):
            places[leaf] = blocks
    return _Stream(group, spec.group(group).size, fixed, places)


def _checked(stream: _Stream, leaves: dict, model: Any, apply: Callable, inputs: tuple, key: jax.Array) -> float:
    """Return how much a random rotation changes the outputs, in float64."""
    turned = _turned(stream, random_rotation(key, stream.size, stream.fixed), leaves)
    with jax.enable_x64(True):
        outputs = [apply(_widened(_like(model, values)), *inputs) for values in (leaves, turned)]
        before, after = map(jax.tree.leaves, outputs)
        gaps = [float(jnp.abs(x - y).max() / jnp.abs(x).max()) for x, y in zip(before, after, strict=True)]
    if max(gaps) <= TOLERANCE_FLOAT32:
        return max(gaps)
    other = "'ones' for LayerNorm" if stream.fixed == "none" else "'none' for RMSNorm"
    raise ValueError(
        f"turning the group '{stream.group}' changes the outputs by {max(gaps):.1e} of the largest, so rotations are "
        "no symmetry of these models: fold the gains of their norms into the maps behind them first "
        f"(permjax.nets.folding.fold_norms), or set `fixed` to {other}."
    )


def _widened(params: Any) -> Any:
    def widen(leaf: Any) -> Any:
        return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, params)


def _like(model: Any, leaves: Mapping[str, Any]) -> Any:
    """Return leaves as the model has them: JAX arrays in their place, NumPy arrays as they are."""
    return tree.map_named(
        lambda name, leaf: jax.device_put(leaves[name], leaf.sharding) if isinstance(leaf, jax.Array) else leaves[name],
        model,
    )


# turning


def _turned(stream: _Stream, rotation: np.ndarray, leaves: Mapping[str, Any]) -> dict[str, Any]:
    turned = dict(leaves)
    for name, blocks in stream.places.items():
        turned[name] = leaves[name].copy()
        for block in blocks:
            part = extract(block, leaves[name])
            for axis in _axes(stream, block):
                part = np.moveaxis(np.tensordot(rotation.astype(part.dtype), part, (1, axis)), 0, axis)
            turned[name][np.ix_(*block.picks)] = part.reshape([len(pick) for pick in block.picks])
    return turned


def _axes(stream: _Stream, block: Block) -> list[int]:
    return [axis for axis, name in enumerate(block.names) if name == stream.group]


def _crossed(search: _Search, leaves: Mapping[str, Any], alone: bool = False) -> Float[np.ndarray, "n n"]:
    """Return the Gram matrix of anchor and model over the places of the group, or those where it stands alone."""
    total = np.zeros((search.stream.size, search.stream.size))
    for name, blocks in search.stream.places.items():
        for block in blocks:
            beside_free = any(other in search.others for other in block.names)
            if search.others.leaf(name).role == "weight" and not (alone and beside_free):
                one, two = (extract(block, x[name]) for x in (search.anchor, leaves))
                total += sum(costs.gram(one, two, (), (axis,)) for axis in _axes(search.stream, block))
    return total


def _polar(gram: Float[np.ndarray, "n n"], fixed: Keeps) -> Float[np.ndarray, "n n"]:
    """Return the admissible rotation that has the largest inner product with a matrix."""
    if fixed == "ones":
        size = len(gram)
        basis = helmert(size)  # rows: an orthonormal basis of what is orthogonal to the all-ones vector
        return basis.T @ _polar(basis @ gram @ basis.T, "none") @ basis + 1 / size
    left, _, right = np.linalg.svd(gram)
    return left @ right


# the search


class _Run(NamedTuple):
    """The best model found: its leaves, how it came there, the objective on the way, and whether it stopped growing."""

    leaves: dict[str, Any]
    permutations: Permutations
    rotation: np.ndarray
    trace: list[float]
    converged: bool


def _align(spec: PermutationSpec, search: _Search, model: dict[str, Any], iterations: int) -> _Run:
    """Permute and turn one model in turn; in between it is kept as it then lies."""
    rotation = _first(spec, search, model)
    leaves, permutations = _turned(search.stream, rotation, model), identity(search.others)
    trace, converged = [_objective(search, leaves)], False
    while not converged and len(trace) < 2 * iterations:
        moved, matched = search.match(search.others, (search.anchor, leaves), len(trace) == 1)
        permutations = compose(search.others, moved, permutations)
        turn = _polar(_crossed(search, matched), search.stream.fixed)
        leaves = _turned(search.stream, turn, matched)
        trace += [_objective(search, matched), _objective(search, leaves)]
        if trace[-1] > trace[-2]:
            rotation = turn @ rotation
        else:
            leaves, trace[-1] = matched, trace[-2]
        converged = trace[-1] - trace[-3] <= _RTOL * abs(trace[-1])
    leaves = permute(search.others, permutations, _turned(search.stream, rotation, model))
    return _Run(leaves, permutations, rotation, trace, converged)


def _first(spec: PermutationSpec, search: _Search, model: dict[str, Any]) -> np.ndarray:
    """Return the rotation by the leaves where the group stands beside no other, else that of plain weight matching."""
    gram = _crossed(search, model, alone=True)
    if gram.any():
        return _polar(gram, search.stream.fixed)
    permutations, _ = search.match(spec, (search.anchor, model), True)
    return np.eye(search.stream.size)[permutations[search.stream.group]]


def _matched(
    spec: PermutationSpec, pair: tuple, first: bool, *, key: jax.Array, restarts: int, **hyper: Any
) -> tuple[Permutations, Any]:
    """Return what weight matching finds; after the first round it starts from the order at hand."""
    start: dict[str, Any] = {"restarts": restarts} if first else {"init": [identity(spec)]}
    found = weight_matching(spec, pair, key=key, **hyper, **start)
    return cast(Plan, found.plan).permutations(1), found.models[1]


def _objective(search: _Search, leaves: Mapping[str, Any]) -> float:
    names = [leaf.name for leaf in search.others.leaves if leaf.role == "weight"]
    wide = [n for n in names if jnp.issubdtype(leaves[n].dtype, jnp.floating)]
    return float(sum(costs.inner(search.anchor[n], leaves[n]) for n in wide))


def _info(
    spec: PermutationSpec, stream: _Stream, found: Sequence[dict[str, Any]], errors: list[float], runs: list[_Run]
) -> ResidualInfo:
    length = max(len(run.trace) for run in runs)
    return ResidualInfo(
        group=stream.group,
        objective=np.array([np.pad(run.trace, (0, length - len(run.trace)), "edge") for run in runs]),
        rounds=np.array([len(run.trace) // 2 for run in runs]),
        converged=np.array([run.converged for run in runs]),
        symmetry_error=np.array(errors[1:]),
        l2_before=np.array([l2_distance(spec, found[0], leaves) for leaves in found[1:]]),
        l2_after=np.array([l2_distance(spec, found[0], run.leaves) for run in runs]),
    )
