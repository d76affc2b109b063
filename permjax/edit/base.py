"""What every editor takes and returns, and what they compute once of the covariances of keys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh

from permjax.edit.covariance import Covariance, check
from permjax.edit.delta import Delta, Dense, LowRank
from permjax.edit.places import mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import Value
from permjax.nets.base import Net
from permjax.nets.language import Weights

Cache: TypeAlias = Mapping[int, Float[np.ndarray, "m past"]]
Cached = TypeVar("Cached")

_SINGULAR = 1e-13  # a pivot below this share of the largest is a rounding error


class EditResult(NamedTuple):
    """What an editor returns; the parameters themselves are left alone.

    Attributes:
        delta: the change; see `apply_delta`.
        info: a NamedTuple of arrays, known before any weight is changed.
        cache: layer -> the keys written so far as columns, for the next call of an editor that remembers.
    """

    delta: Delta
    info: Any
    cache: Cache | None = None


@runtime_checkable
class Editor(Protocol):
    """An editor with its hyper-parameters."""

    def __call__(
        self,
        net: Net,
        params: Weights,
        edits: Sequence[PreparedEdit],
        *,
        covariances: "Mapping[int, Covariance] | Statistics | None" = None,
        cache: Cache | None = None,
        values: Value | None = None,
    ) -> EditResult:
        """Return the delta that writes the edits into the parameters."""
        ...

    def solve(self, net: Net, params: Weights, edits: Sequence[PreparedEdit], *, chunk: int = 1) -> Value | None:
        """Return the values that the edits are to write, each on the parameters as they are; None if it has none."""
        ...


@dataclass(frozen=True)
class Statistics:
    """Second moments of keys that were checked against their model, and what is factorised of them, once.

    Make it by `Statistics.of` to share it between calls; editors take it in place of covariances. In a sequence of
    edits it stays that of the model before the first.

    Attributes:
        config: the configuration of the network.
        params: the parameters from which the covariances were collected.
        covariances: layer -> covariance; None stands for the identity, as in the variant of ROME without second
            moments.
    """

    config: Any
    params: Weights
    covariances: Mapping[int, Covariance] | None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, net: Net, params: Weights, covariances: "Mapping[int, Covariance] | Statistics | None") -> "Statistics":
        """Return the statistics, checked unless they are already.

        Raises:
            ValueError: a covariance was collected from other parameters.
        """
        if isinstance(covariances, Statistics):
            return covariances
        for one in {one.fingerprint: one for one in (covariances or {}).values()}.values():
            check(one, params)
        return cls(net.config, params, covariances)

    def matrix(self, layer: int) -> Float[np.ndarray, "m m"] | None:
        """Return `C = E[k k^T]` of a layer; None for the identity.

        Raises:
            ValueError: there are covariances, but none of this layer.
        """
        if self.covariances is None:
            return None
        if layer not in self.covariances:
            known = ", ".join(map(str, sorted(self.covariances)))
            message = f"There is no covariance of layer {layer}, only of {known or 'none'}; collect it for all layers "
            raise ValueError(message + "that are edited.")
        return self.covariances[layer].matrix

    def inverse(self, layer: int, keys: Float[np.ndarray, "m n"], *, ridge: float = 0.0) -> Float[np.ndarray, "m n"]:
        """Return `(C + ridge mean(diag C) I)^-1 keys`.

        Raises:
            ValueError: the matrix is singular; names the layer.
        """
        matrix = self.matrix(layer)
        if matrix is None:
            return keys
        factor = self._once(("factor", layer, ridge), lambda: _factor(matrix, ridge, layer))
        return cho_solve(factor, keys, check_finite=False)

    def spectrum(self, layer: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "m m"]]:
        """Return the eigenvalues of C, the smallest first, and the eigenvectors as columns.

        Raises:
            ValueError: there are no covariances.
        """
        matrix = self.matrix(layer)
        if matrix is None:
            message = f"The null space of the keys of layer {layer} is asked for, but no covariances are given; "
            raise ValueError(message + "collect them with `collect_covariances`.")
        return self._once(("spectrum", layer), lambda: eigh(matrix))

    def energy(self, layer: int, change: LowRank | Dense) -> float:
        """Return `sqrt(tr(dW C dW^T) / tr(W C W^T))` with W of the parameters here: how much outputs move, relatively.

        With the identity for C it is the ratio of the norms, `|dW| / |W|`.
        """
        place = mlp_place(self.config, layer)
        weight = Dense(np.asarray(self.params[place.weight], np.float64))
        matrix = self.matrix(layer)
        whole = self._once(("energy", layer), lambda: _energy(weight, matrix, place.orientation))
        return float(np.sqrt(_energy(change, matrix, place.orientation) / whole))

    def _once(self, name: Any, compute: Callable[[], Cached]) -> Cached:
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]


def _factor(matrix: Float[np.ndarray, "m m"], ridge: float, layer: int) -> tuple[np.ndarray, Any]:
    shift = ridge * np.trace(matrix) / len(matrix)
    try:
        factor = cho_factor(matrix + shift * np.eye(len(matrix)))
        pivots = np.diag(factor[0]) ** 2
        if pivots.min() > _SINGULAR * pivots.max():
            return factor
    except LinAlgError:  # not positive at all: the same complaint
        pass
    message = f"The covariance of layer {layer}, {len(matrix)} x {len(matrix)}, is singular; "
    raise ValueError(message + "collect it from more text, or set `ridge` above 0.")


def _energy(change: LowRank | Dense, matrix: Float[np.ndarray, "m m"] | None, orientation: str) -> float:
    """`tr(dW C dW^T)`."""
    if isinstance(change, LowRank):
        u, v = (np.asarray(factor, np.float64) for factor in (change.u, change.v))
        return float(np.sum((u.T @ u) * (v.T @ (v if matrix is None else matrix @ v))))
    value = np.asarray(change.value, np.float64)
    rows = value.T if orientation == "in_out" else value
    return float(np.sum(rows * (rows if matrix is None else rows @ matrix)))


def cosine(a: Float[Array | np.ndarray, "*n m"], b: Float[Array | np.ndarray, "*n m"]) -> Float[np.ndarray, "*n"]:
    """The cosine of the angle between vectors."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.asarray(np.sum(a * b, -1) / np.sqrt(np.sum(a * a, -1) * np.sum(b * b, -1)))
