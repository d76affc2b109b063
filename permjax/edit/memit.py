"""MEMIT: many facts at once, spread over several layers (Meng et al., 2023); and what it shares with AlphaEdit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from permjax.edit.base import Cache, EditResult, Statistics, cosine
from permjax.edit.covariance import Covariance
from permjax.edit.delta import Delta, LowRank, apply_delta
from permjax.edit.places import MlpPlace, mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import Value, ValueSettings, observe, solve_values
from permjax.nets.base import Net
from permjax.nets.language import Weights

MEMIT_VALUE = ValueSettings(clamp=0.75)

Solve = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


class SpreadInfo(NamedTuple):
    """What is known before the weights are changed.

    Attributes:
        losses: of the search for the values; NaN after its end.
        cosine: between the key of the bare prompt and the mean of all rows, in the last layer.
        share: the part of the residual that a layer's change gives to the keys it is written for, in the mean over
            edits: 1 where `dW k = r`.
        norm: `|dW|` of each layer.
        energy: `sqrt(tr(dW C dW^T) / tr(W C W^T))` of each layer; see `Statistics.energy`.
    """

    losses: Float[np.ndarray, "edits steps"]
    cosine: Float[np.ndarray, " edits"]
    share: Float[np.ndarray, " layers"]
    norm: Float[np.ndarray, " layers"]
    energy: Float[np.ndarray, " layers"]


def ridge_solution(solved: Any, keys: Any) -> Float[np.ndarray, "m n"]:
    """`X = (A + K K^T)^-1 K`, by the smaller inverse of `X = S (I + K^T S)^-1` with `S = A^-1 K`.

    `dW = R X^T` then minimises `tr(dW A dW^T) + |dW K - R|^2`: residuals R of all keys against what else goes through
    the matrix. For MEMIT A is `lambda C`, with lambda C as the sum of lambda keys.

    Args:
        solved: S, `[m, n]`.
        keys: K, `[m, n]`.

    Source:
        Meng et al., Mass-Editing Memory in a Transformer (2023).
    """
    solved, keys = (np.asarray(x, np.float64) for x in (solved, keys))
    return np.linalg.solve((np.eye(keys.shape[1]) + keys.T @ solved).T, solved.T).T


def memit(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    layers: tuple[int, ...],
    weight: float = 20_000.0,
    relative: bool = False,
    ridge: float = 0.0,
    remember: bool = False,
    value: ValueSettings = MEMIT_VALUE,
    covariances: Mapping[int, Covariance] | Statistics | None = None,
    cache: Cache | None = None,
    values: Value | None = None,
) -> EditResult:
    """Write all facts together, each layer taking its part of what is still missing after the layers before it.

    `dW_l = R_l K_l^T (lambda C_l + K_p K_p^T + K_l K_l^T)^-1` with `R_l = (Z - H) / (layers from l on)`, where Z are
    the values wanted after the last layer, H those of the model with the earlier layers changed, and K_p the keys in
    the cache.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits; their order does not matter.
        layers: of the MLPs, ascending.
        weight: lambda.
        relative: take `weight` times the number of inputs of the matrix for lambda: `k^T C^-1 k` is about that number,
            so that one setting fits models of any scale.
        ridge: added to the diagonal of C, relative to its mean.
        remember: give the keys of these edits, as they are after the change, and those of the cache in the result.
        value: of the search for Z, which is done on the output of the last layer's block.
        covariances: layer -> `E[k k^T]` of these parameters, or statistics; None for the identity.
        cache: layer -> keys of facts that were written before and are to stay.
        values: what `solve_values` found with `at="block"` on these parameters; searched here by default.

    Returns:
        An `EditResult` with a `SpreadInfo`.

    Raises:
        ValueError: no such layer or layers out of order, a weight that is not above 0, covariances of other parameters,
            or a singular one.

    Source:
        Meng et al. (2023); the cache as in the code of Fang et al., AlphaEdit (2025).
    """
    statistics = Statistics.of(net, params, covariances)

    def solve(layer: int, past: Float[np.ndarray, "m p"], keys: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
        every = np.concatenate([past, keys], axis=1)
        strength = weight * (len(keys) if relative else 1)
        solved = statistics.inverse(layer, every, ridge=ridge) / strength
        return ridge_solution(solved, every)[:, past.shape[1] :]

    if weight <= 0:
        raise ValueError(f"`weight` is {weight:g}, but MEMIT needs one above 0: nothing else would be preserved.")
    result = spread(net, params, edits, layers, solve, statistics, value=value, cache=cache or {}, values=values)
    return result._replace(cache=remembered(net, params, edits, layers, cache, result.delta) if remember else None)


def spread(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    layers: tuple[int, ...],
    solve: Solve,
    statistics: Statistics,
    *,
    value: ValueSettings,
    cache: Cache,
    values: Value | None,
) -> EditResult:
    """Write facts layer by layer: `dW_l = R_l X_l^T` with `X_l = solve(l, past keys, keys)`; see `memit`."""
    places = places_of(net, layers)
    if values is None:
        values = solve_values(net, params, edits, places[-1], value, at="block")
    wanted = np.asarray(values.start, np.float64) + values.delta
    changes: dict[str, LowRank] = {}
    rows, current = [], params
    for i, (layer, place) in enumerate(zip(layers, places, strict=True)):
        seen = observe(net, current, edits, places)
        keys = mixed_keys(seen.keys[i])
        residuals = (wanted - seen.block[:, 0]).T / (len(layers) - i)
        solution = solve(layer, cache.get(layer, keys[:, :0]), keys)
        change = changes[place.weight] = LowRank(residuals, solution, place.orientation)
        current = apply_delta(current, {place.weight: change})
        norm = np.sqrt(np.sum((residuals.T @ residuals) * (solution.T @ solution)))
        rows.append((np.mean(np.sum(solution * keys, axis=0)), norm, statistics.energy(layer, change)))
    last = values.keys
    info = SpreadInfo(np.asarray(values.losses), cosine(last[:, 0], last.mean(axis=1)), *np.asarray(rows).T)
    return EditResult(changes, info)


def places_of(net: Net, layers: tuple[int, ...]) -> tuple[MlpPlace, ...]:
    """The places of several layers.

    Raises:
        ValueError: there is none, or they do not ascend.
    """
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"The layers to edit are {layers}; give one or more, each once, in ascending order.")
    return tuple(mlp_place(net.config, layer) for layer in layers)


def mixed_keys(keys: Any) -> Float[np.ndarray, "m edits"]:
    """MEMIT's keys as columns: the mean of the bare prompt's key and of the mean of the prefixed ones.

    Args:
        keys: `[edits, rows, m]`.
    """
    keys = np.asarray(keys, np.float64)
    prefixed = keys[:, 1:].mean(axis=1) if keys.shape[1] > 1 else keys[:, 0]
    return ((keys[:, 0] + prefixed) / 2).T


def remembered(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    layers: tuple[int, ...],
    cache: Cache | None,
    delta: Delta,
) -> dict[int, np.ndarray]:
    """The cache and, beside its keys, those of the edits as they are after the change."""
    seen = observe(net, apply_delta(params, delta), edits, places_of(net, layers))
    fresh = {layer: mixed_keys(keys) for layer, keys in zip(layers, seen.keys, strict=True)}
    past = cache or {}
    return {**past, **{n: np.concatenate([past.get(n, keys[:, :0]), keys], axis=1) for n, keys in fresh.items()}}


@dataclass(frozen=True)
class Memit:
    """Hyper-parameters of `memit`."""

    layers: tuple[int, ...]
    weight: float = 20_000.0
    relative: bool = False
    ridge: float = 0.0
    remember: bool = False
    value: ValueSettings = MEMIT_VALUE

    def solve(self, net: Net, params: Weights, edits: Sequence[PreparedEdit], *, chunk: int = 1) -> Value:
        """Return the values that are to be written, each searched on the parameters as they are."""
        return solve_values(net, params, edits, places_of(net, self.layers)[-1], self.value, at="block", chunk=chunk)

    def __call__(
        self,
        net: Net,
        params: Weights,
        edits: Sequence[PreparedEdit],
        *,
        covariances: Mapping[int, Covariance] | Statistics | None = None,
        cache: Cache | None = None,
        values: Value | None = None,
    ) -> EditResult:
        """Return the delta of `memit`."""
        given = {"covariances": covariances, "cache": cache, "values": values, **vars(self)}
        return memit(net, params, edits, **given)
