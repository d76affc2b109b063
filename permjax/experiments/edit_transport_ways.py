"""Ways to carry an edit from one language model to another: matchings of units, a turned stream, and controls."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from permjax.action import permute
from permjax.edit.delta import Delta, LowRank, permute_delta
from permjax.edit.places import layer_count, mlp_place
from permjax.lmc.barrier import interpolate, l2_distance
from permjax.match.activations import ActivationMatching, activation_matching
from permjax.match.residual import residual_matching
from permjax.match.weights import WeightMatching, weight_matching
from permjax.nets.base import Net
from permjax.nets.folding import fold_norms
from permjax.nets.llama import LlamaConfig
from permjax.permutation import Permutations, compose, identity, invert, random_permutations
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.symmetry.verify import pin_groups
from permjax.train import cross_entropy

WAYS = {
    "matched": "weights matched",
    "mlp": "MLP weights matched",
    "activations": "activations matched",
    "rotated": "stream turned",
    "identity": "as it is",
    "random": "random units",
}
"""Names of all ways with their titles."""

_ROWS = 32  # at a time


class Matchings(NamedTuple):
    """Hyper-parameters of what is matched.

    Attributes:
        weights: of weight matching, also where the stream is turned.
        activations: of activation matching.
    """

    weights: WeightMatching
    activations: ActivationMatching


class View(NamedTuple):
    """A network and its symmetry."""

    net: Net
    spec: PermutationSpec


class Both(NamedTuple):
    """Two models of one network.

    Attributes:
        plain: the network as it was trained.
        folded: the same with the gains of its norms folded into other weights, so that its stream may be turned.
        a: weights of the model where edits are made.
        b: weights of the model to which they are carried.
        rows: tokens whose activations are matched.
        held_out: tokens on which the line between the models is measured.
        planted: what was done to the units of b; None where nobody knows which unit belongs to which.
    """

    plain: View
    folded: View
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    rows: Int[np.ndarray, "n t"]
    held_out: Int[np.ndarray, "m t"]
    planted: Permutations | None = None


class Way(NamedTuple):
    """How edits are carried, and how near the second model comes to the first when it is carried back.

    Attributes:
        carry: a change of the first model -> the change of the second.
        distance: of the weights, `|a - b'| / |a|`.
        barrier: loss in the middle between the two, above the mean of both ends, in nats.
        found: the share of units that are back where they were before they were permuted; NaN where nobody knows.
    """

    carry: Callable[[Delta], Delta]
    distance: float
    barrier: float
    found: float = float("nan")


def views_of(net: Net, params: Mapping[str, Any], tokens: Int[np.ndarray, "n t"]) -> tuple[View, View]:
    """A network as it is and with folded norms; its weights and some tokens serve to find the symmetries."""
    folded, weights = fold_norms(net, params)
    some = jnp.asarray(tokens[:2])
    return View(net, trace_spec(net.apply, params, some)), View(folded, trace_spec(folded.apply, weights, some))


def ways_between(both: Both, settings: Matchings, key: jax.Array) -> dict[str, Way]:
    """All ways of `WAYS` from the first to the second of two models.

    Args:
        both: the models.
        settings: of the matchings.
        key: draws the orders of matching, and the random units.
    """
    (net, spec), models = both.plain, (both.a, both.b)
    match = partial(weight_matching, models=models, key=key, **vars(settings.weights))
    batches = [jnp.asarray(both.rows[i : i + _ROWS]) for i in range(0, len(both.rows), _ROWS)]
    seen = activation_matching(spec, models, apply=net.apply, data=batches, **vars(settings.activations))
    still = identity(spec)
    permutations = {
        "matched": _found(match(spec)),
        "mlp": still | _found(match(_of_mlps(both.plain))),
        "activations": _found(seen),
        "identity": still,
        "random": random_permutations(spec, jax.random.fold_in(key, 1)),
    }
    ways = {name: _permuted(both, found) for name, found in permutations.items()}
    ways["rotated"] = _turned(both, settings.weights, key)
    return {name: ways[name] for name in WAYS}


def _found(result: Any) -> Permutations:
    return cast(Plan, result.plan).permutations(1)


def _of_mlps(view: View) -> PermutationSpec:
    """The symmetry of the MLPs' units alone."""
    config, spec = view.net.config, view.spec
    places = [mlp_place(config, layer) for layer in range(layer_count(config))]
    axes = [spec.leaf(p.weight).axes[0 if p.orientation == "in_out" else 1] for p in places]
    kept = {cast(Any, axis).group for axis in axes}
    return pin_groups(spec, [g for g in spec.groups if g.name not in kept], "not matched")


def _permuted(both: Both, permutations: Permutations) -> Way:
    """The way of permutations that bring b to a."""
    spec, host = both.plain.spec, {name: np.asarray(rows) for name, rows in permutations.items()}
    near = _nearness(both.plain, both.a, permute(spec, host, both.b), both.held_out)
    return Way(partial(permute_delta, spec, invert(spec, host)), *near, _share_found(both, host))


def _share_found(both: Both, permutations: Permutations) -> float:
    if both.planted is None:
        return float("nan")
    whole, still = compose(both.plain.spec, permutations, both.planted), identity(both.plain.spec)
    return float(np.mean(np.concatenate([(np.asarray(whole[name]) == still[name]).ravel() for name in still])))


def _turned(both: Both, weights: WeightMatching, key: jax.Array) -> Way:
    """The way of an orthogonal map of the stream and permutations of all other units, of models with folded norms.

    Folding changes no matrix in which edits are but for means that no norm sees, so that edits carry over as they are.
    """
    net, spec = both.folded
    pair = tuple(fold_norms(both.plain.net, params)[1] for params in (both.a, both.b))
    options: dict[str, Any] = {"fixed": "none" if isinstance(net.config, LlamaConfig) else "ones"}
    options |= {"solver": weights.solver, "max_sweeps": weights.max_sweeps, "restarts": weights.restarts}
    inputs = (jnp.asarray(both.held_out[:2]),)
    found = residual_matching(spec, pair, key=key, apply=net.apply, inputs=inputs, **options)
    back = invert(spec, found.plan.permutations(1))

    def carry(delta: Delta) -> Delta:
        moved = permute_delta(spec, back, delta)
        return {name: _turn(found.rotations[1].T, cast(LowRank, one)) for name, one in moved.items()}

    return Way(carry, *_nearness(both.folded, pair[0], found.models[1], both.held_out))


def _turn(rotation: Float[np.ndarray, "d d"], change: LowRank) -> LowRank:
    return replace(change, u=rotation @ change.u)


def _nearness(view: View, a: Mapping[str, Any], b: Mapping[str, Any], rows: np.ndarray) -> tuple[float, float]:
    """Return the distance and the barrier of two models that lie in the same coordinates."""
    length = l2_distance(view.spec, a, jax.tree.map(np.zeros_like, a))
    ends = interpolate(_loss_of(view.net.apply), a, b, (rows[:, :-1], rows[:, 1:]), points=3, batch_size=_ROWS)
    return l2_distance(view.spec, a, b) / length, float(ends[1] - (ends[0] + ends[2]) / 2)


@cache
def _loss_of(apply: Callable) -> Callable:
    """Return the loss of a batch; one function for all pairs, so that it is compiled once."""
    return lambda params, x, y: cross_entropy(apply(params, x), y)
