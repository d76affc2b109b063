"""ROME and its consistent form: one fact by a change of rank one (Meng et al., 2022; Yang et al., 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from permjax.edit.base import Cache, EditResult, Statistics, cosine
from permjax.edit.covariance import Covariance
from permjax.edit.delta import LowRank, apply_delta, compose
from permjax.edit.places import MlpPlace, mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import Value, ValueSettings, check_edits, solve_values
from permjax.nets.base import Net
from permjax.nets.language import Weights

Key: TypeAlias = Literal["mixed", "mean", "bare"]

ROME_VALUE = ValueSettings()


class RankOne(NamedTuple):
    """The solution of one constraint, `dW = u v^T`.

    Attributes:
        u: in the space of values, `residual / denominator`.
        v: in the space of keys, of length one.
        denominator: `k v`; where it is tiny the change is huge, as `|dW| = |residual| / |k v|`.
    """

    u: Float[np.ndarray, " d"]
    v: Float[np.ndarray, " m"]
    denominator: float


def rank_one(direction: Any, key: Any, residual: Any) -> RankOne:
    """The change of rank one in a given direction that moves the value of a key: `dW k = residual`.

    With `direction = C^-1 k` it is, of all dW with `dW k = residual`, the one of least `tr(dW C dW^T)`.

    Args:
        direction: `C^-1 k'`, `[m]`, with k' = k in the consistent form.
        key: k, `[m]`.
        residual: the value that is missing, `v* - W k`, `[d]`.

    Source:
        Meng et al. (2022), section 3.1.
    """
    direction, key, residual = (np.asarray(x, np.float64) for x in (direction, key, residual))
    v = direction / np.linalg.norm(direction)
    denominator = key @ v
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is for a guard to refuse
        return RankOne(residual / denominator, v, float(denominator))


class RomeInfo(NamedTuple):
    """What is known of every edit before the weight is changed.

    Attributes:
        losses: of the search for the value; NaN after its end.
        denominator: `k v`; see `RankOne`.
        cosine: between the key of the bare prompt and the mean of all rows.
        norm: `|dW|`.
        energy: `sqrt(tr(dW C dW^T) / tr(W C W^T))`; see `Statistics.energy`.
    """

    losses: Float[np.ndarray, "edits steps"]
    denominator: Float[np.ndarray, " edits"]
    cosine: Float[np.ndarray, " edits"]
    norm: Float[np.ndarray, " edits"]
    energy: Float[np.ndarray, " edits"]


def rome(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    layer: int,
    key: Key = "mixed",
    ridge: float = 0.0,
    value: ValueSettings = ROME_VALUE,
    covariances: Mapping[int, Covariance] | Statistics | None = None,
    values: Value | None = None,
) -> EditResult:
    """Write facts into one MLP matrix, each by a change of rank one.

    `dW = (v* - W k) (C^-1 k')^T / (k'^T C^-1 k)`: afterwards `(W + dW) k = v*`.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits.
        layer: of the MLP.
        key: which key is k and which k'. `"mixed"` is ROME as published and in its reference code: k of the bare
            prompt, k' the mean over all rows; the two may be far apart, and then the change explodes. `"mean"` takes
            the mean for both (C-ROME, R-ROME), `"bare"` the bare prompt (p-ROME).
        ridge: added to the diagonal of C, relative to its mean.
        value: of the search for v*.
        covariances: layer -> `E[k k^T]` of these parameters, or statistics; None for the identity.
        values: what `solve_values` found on these parameters for each edit. By default it is searched here, on the
            parameters that the edits before have changed.

    Returns:
        An `EditResult` with a `RomeInfo`.

    Raises:
        ValueError: no such layer, covariances of other parameters, or a singular one.

    Example:
        >>> result = rome(net, params, [edit], layer=5, covariances=covariances)
        >>> edited = apply_delta(params, result.delta)

    Source:
        Meng et al. (2022); for `"mean"` Yang et al., The Fall of ROME (2024), and Gupta et al., Rebuilding ROME (2024).
    """
    check_edits(edits)
    place = mlp_place(net.config, layer)
    statistics = Statistics.of(net, params, covariances)
    changes, rows = [], []
    for i, edit in enumerate(edits):
        current = apply_delta(params, compose(*changes))
        found = solve_values(net, current, [edit], place, value) if values is None else values.one(i)
        solution = _written(found, statistics, layer, key, ridge)
        changes.append({place.weight: _change(solution, place)})
        rows.append(_row(found, solution, statistics, layer, changes[-1][place.weight]))
    return EditResult(compose(*changes), RomeInfo(*map(np.stack, zip(*rows, strict=True))))


def _written(found: Value, statistics: Statistics, layer: int, key: Key, ridge: float) -> RankOne:
    keys, outputs = (np.asarray(x[0], np.float64) for x in (found.keys, found.outputs))
    bare, mean = keys[0], keys.mean(axis=0)
    direction = bare if key == "bare" else mean
    solved = statistics.inverse(layer, direction[:, None], ridge=ridge)[:, 0]
    old = outputs.mean(axis=0) if key == "mean" else outputs[0]
    target = np.asarray(found.start[0], np.float64) + found.delta[0]
    return rank_one(solved, mean if key == "mean" else bare, target - old)


def _change(solution: RankOne, place: MlpPlace) -> LowRank:
    return LowRank(solution.u[:, None], solution.v[:, None], place.orientation)


def _row(found: Value, solution: RankOne, statistics: Statistics, layer: int, change: LowRank) -> tuple:
    keys = found.keys[0]
    norm = np.linalg.norm(solution.u)
    return (
        found.losses[0],
        solution.denominator,
        cosine(keys[0], keys.mean(axis=0)),
        norm,
        statistics.energy(layer, change),
    )


c_rome = partial(rome, key="mean")
"""`rome` with the mean key on both sides (C-ROME, R-ROME); it needs prefixed prompts to show its efficacy."""


@dataclass(frozen=True)
class Rome:
    """Hyper-parameters of `rome`."""

    layer: int
    key: Key = "mixed"
    ridge: float = 0.0
    value: ValueSettings = ROME_VALUE

    def solve(self, net: Net, params: Weights, edits: Sequence[PreparedEdit], *, chunk: int = 1) -> Value:
        """Return the values that are to be written, each searched on the parameters as they are."""
        return solve_values(net, params, edits, mlp_place(net.config, self.layer), self.value, chunk=chunk)

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
        """Return the delta of `rome`; it remembers nothing, so a cache passes through."""
        given = {"covariances": covariances, "values": values, **vars(self)}
        return rome(net, params, edits, **given)._replace(cache=cache)


@dataclass(frozen=True)
class CRome(Rome):
    """Hyper-parameters of `c_rome`."""

    key: Key = "mean"
