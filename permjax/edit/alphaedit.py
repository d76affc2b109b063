"""AlphaEdit: changes that stay in the null space of the keys to be preserved (Fang et al., 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from permjax.edit.base import Cache, EditResult, Statistics
from permjax.edit.covariance import Covariance
from permjax.edit.memit import MEMIT_VALUE, places_of, remembered, spread
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import Value, ValueSettings, solve_values
from permjax.nets.base import Net
from permjax.nets.language import Weights

Rule: TypeAlias = Literal["absolute", "relative", "energy"]


def null_space(values: Any, vectors: Any, threshold: float, rule: Rule = "absolute") -> Float[np.ndarray, "m p"]:
    """The directions in which there are next to no keys, as orthonormal columns U; `P = U U^T` projects on them.

    Args:
        values: eigenvalues of `C = E[k k^T]`, ascending, `[m]`.
        vectors: its eigenvectors as columns, `[m, m]`.
        threshold: what an eigenvalue must stay below.
        rule: `"absolute"` compares eigenvalues themselves, as published, which fits models of one scale only;
            `"relative"` compares them with their mean; `"energy"` takes as many of the smallest as together hold less
            than that share of the trace.

    Raises:
        ValueError: no eigenvalue is that small, so that no edit could be written.
    """
    values, vectors = (np.asarray(x, np.float64) for x in (values, vectors))
    measure = {"absolute": values, "relative": values / values.mean(), "energy": np.cumsum(values) / values.sum()}[rule]
    small = measure < threshold
    if not small.any():
        message = f"The null space of the keys is empty: the least of {len(values)} eigenvalues is {values[0]:.3g} "
        message += f"({measure[0]:.3g} by the rule {rule!r}), not below the threshold {threshold:g}; "
        raise ValueError(message + "raise `threshold`, or choose another `rule`.")
    return vectors[:, small]


def projected_solution(basis: Any, past: Any, keys: Any, ridge: float) -> Float[np.ndarray, "m n"]:
    """`X = (P (K K^T + K_p K_p^T) + ridge I)^-1 P K` with `P = U U^T`, solved within the null space.

    `dW = R X^T` then minimises `|dW K - R|^2 + |dW K_p|^2 + ridge |dW|^2` over all `dW = dW P`.

    Args:
        basis: U, `[m, p]`.
        past: keys of facts to be kept, `[m, q]`.
        keys: K, `[m, n]`.
        ridge: L2, above 0.

    Raises:
        ValueError: the ridge is not above 0.

    Source:
        Fang et al. (2025).
    """
    if ridge <= 0:
        raise ValueError(f"`ridge` is {ridge:g}, but AlphaEdit needs one above 0 to have one solution.")
    inside, before = basis.T @ keys, basis.T @ past
    system = inside @ inside.T + before @ before.T + ridge * np.eye(len(inside))
    return basis @ np.linalg.solve(system, inside)


def alphaedit(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    layers: tuple[int, ...],
    threshold: float = 0.02,
    rule: Rule = "absolute",
    ridge: float = 10.0,
    relative: bool = False,
    value: ValueSettings = MEMIT_VALUE,
    covariances: Mapping[int, Covariance] | Statistics | None = None,
    cache: Cache | None = None,
    values: Value | None = None,
) -> EditResult:
    """Write all facts together as MEMIT does, but only in the null space of the keys of ordinary text.

    `dW_l^T = (P (K_l K_l^T + K_p K_p^T) + L2 I)^-1 P K_l R_l^T`; R_l and Z as in `memit`. It always remembers: the
    cache of the result holds the keys of all facts so far, as they are after the change.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits.
        layers: of the MLPs, ascending.
        threshold: which eigenvalues of C count as zero; see `null_space`.
        rule: how they are compared with it.
        ridge: L2.
        relative: take `ridge` times the mean of `|P k|^2` over the edits for L2.
        value: of the search for Z.
        covariances: layer -> `E[k k^T]` of these parameters, or statistics.
        cache: that of the last result of a sequence; none yet by default.
        values: what `solve_values` found with `at="block"` on these parameters; searched here by default.

    Returns:
        An `EditResult` with a `SpreadInfo` and a cache.

    Raises:
        ValueError: the null space of a layer is empty, no covariances or those of other parameters, no such layer.
    """
    statistics = Statistics.of(net, params, covariances)
    bases = {layer: _basis(statistics, layer, threshold, rule) for layer in layers}

    def solve(layer: int, past: Float[np.ndarray, "m p"], keys: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
        basis = bases[layer]
        scale = np.sum(np.square(basis.T @ keys)) / keys.shape[1] if relative else 1.0
        return projected_solution(basis, past, keys, ridge * scale)

    result = spread(net, params, edits, layers, solve, statistics, value=value, cache=cache or {}, values=values)
    return result._replace(cache=remembered(net, params, edits, layers, cache, result.delta))


def _basis(statistics: Statistics, layer: int, threshold: float, rule: Rule) -> Float[np.ndarray, "m p"]:
    values, vectors = statistics.spectrum(layer)
    try:
        return null_space(values, vectors, threshold, rule)
    except ValueError as error:
        raise ValueError(f"Layer {layer}: {error}") from None


@dataclass(frozen=True)
class AlphaEdit:
    """Hyper-parameters of `alphaedit`."""

    layers: tuple[int, ...]
    threshold: float = 0.02
    rule: Rule = "absolute"
    ridge: float = 10.0
    relative: bool = False
    value: ValueSettings = MEMIT_VALUE

    def solve(self, net: Net, params: Weights, edits: Sequence[PreparedEdit], *, chunk: int = 1) -> Value:
        """Return the values that are to be written, each searched on the parameters as they are."""
        last = places_of(net, self.layers)[-1]
        return solve_values(net, params, edits, last, self.value, at="block", chunk=chunk)

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
        """Return the delta of `alphaedit`."""
        given = {"covariances": covariances, "cache": cache, "values": values, **vars(self)}
        return alphaedit(net, params, edits, **given)
