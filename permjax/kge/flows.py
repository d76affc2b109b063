"""Families whose entities are random variables: normalizing flows of one base variable Z, coordinate by coordinate.

Z has mean 0, variance 1 and a symmetric law. An entity is the law of g(Z) for a monotone piecewise linear g, a relation
an affine map y -> s y + m that pushes laws forward ("Knowledge Graph Embedding by Normalizing Flows", section 3).
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.integrate import quad

from permjax.kge.base import Euclidean, Family, Linear, OnItself, Point, Row
from permjax.kge.groups import AffineMaps, Element, Scalings, SpreadAffineMaps

Mode: TypeAlias = Literal["published", "exact"]
Base: TypeAlias = Literal["normal", "uniform"]


class _Flows(AffineMaps, Euclidean):
    """Flows of K linear pieces under the squared 2-Wasserstein distance.

    `g(z) = mean + sum_k slope_k b_k(z)` with slopes >= 0, where `b_k(z)` is the signed part of the way from 0 to z that
    lies in piece k. Pieces are parted at points symmetric about 0, which hold equal shares of the law of Z. As the
    flows are monotone, `W2^2 = E (g(Z) - g'(Z))^2 = v^T G v` with v the differences of (mean, slopes) and
    `G = E b b^T = L L^T`, so that it is the squared distance of the coordinates `L^T (mean, slopes)`.
    """

    relation_parts = ("scale", "shift")
    mode: Mode = "published"
    base: Base = "normal"
    pieces: int

    def entity_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every part of a row of the entity table."""
        return {"mean": (self.dimension,), "slopes": (self.pieces, self.dimension)}

    def entity(self, row: Row) -> dict[str, Any]:
        """The law with the absolute values of the slopes of the row."""
        return {"mean": row["mean"], "slopes": jnp.abs(row["slopes"])}

    def act(self, element: Element, point: Point) -> dict[str, Any]:
        """Push laws forward: `mean -> s mean + m`, `slopes -> |s| slopes`.

        A negative s turns the law around, so the k-th slope from the left becomes that from the right. In the mode
        `published` it does not, as in the released code: relations then still are bijections of the set of laws and
        form a group, but they are no longer maps of the values that the variables take.
        """
        scale, size = element["scale"], jnp.abs(element["scale"])
        slopes = [point["slopes"][..., k, :] for k in range(self.pieces)]  # on a CPU, XLA is slow on sums over pieces
        if self.mode == "exact" and self.pieces > 1:
            slopes = [jnp.where(scale < 0, other, slope) for slope, other in zip(slopes, slopes[::-1], strict=True)]
        mean = scale * point["mean"] + element["shift"]
        return {"mean": mean, "slopes": jnp.stack([size * slope for slope in slopes], axis=-2)}

    def flow(self, point: Point, z: Float[Array, "samples d"]) -> Float[Array, "samples d"]:
        """The map of one entity at values of Z: `g(z)`, coordinate by coordinate.

        Args:
            point: one law, mean `[d]` and slopes `[K, d]`.
            z: values of the base variable.
        """
        ways = _ways(self.pieces, self.base, z)
        return point["mean"][None] + sum(way * slope[None] for way, slope in zip(ways, point["slopes"], strict=True))

    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """The vectors `L^T (mean, slopes)`: their squared distance is the squared 2-Wasserstein one of the laws."""
        parts = [point["mean"], *jnp.moveaxis(point["slopes"], -2, 0)]
        root = np.linalg.cholesky(gram(self.pieces, self.base))
        return jnp.concatenate([_combined(root[:, column], parts) for column in range(len(parts))], axis=-1)

    def deviation(self, point: Point) -> Any:
        """The standard deviation of every coordinate, `[..., d]`: the distance of a law from its own mean."""
        parts = [jnp.zeros_like(point["mean"]), *jnp.moveaxis(point["slopes"], -2, 0)]
        moments = gram(self.pieces, self.base)
        root = np.linalg.cholesky(moments)
        second = sum(_combined(root[:, column], parts) ** 2 for column in range(len(parts)))
        return jnp.sqrt(jnp.maximum(second - _combined(moments[0], parts) ** 2, 0.0))


@dataclass(frozen=True)
class Nfe1(_Flows):
    """NFE-1: linear flows under W2, `-sum_k (s_r m_h + m_r - m_t)^2 + (|s_r| |s_h| - |s_t|)^2`, for any base."""

    pieces: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleMethodOverride]

    def lift(self, point: Point) -> dict[str, Any]:
        """The affine map from Z to the law."""
        return {"scale": point["slopes"][..., 0, :], "shift": point["mean"]}

    def reference(self, like: Point) -> dict[str, Any]:
        """The law of Z."""
        return {"mean": jnp.zeros_like(like["mean"]), "slopes": jnp.ones_like(like["slopes"])}


@dataclass(frozen=True)
class Nfe2(_Flows):
    """NFE-2: flows of two linear pieces that meet at 0, under W2.

    Attributes:
        mode: `published` does not exchange the slopes where a relation has a negative scale, `exact` does.
        base: the law of Z.
    """

    pieces: ClassVar[int] = 2  # pyright: ignore[reportIncompatibleMethodOverride]
    mode: Mode = "published"
    base: Base = "normal"


@dataclass(frozen=True)
class NfeK(_Flows):
    """Flows of any number of linear pieces, under W2; NFE-1 and NFE-2 are those of one and two.

    Attributes:
        pieces: number of pieces K.
        mode: `published` does not turn the slopes around where a relation has a negative scale, `exact` does.
        base: the law of Z.
    """

    pieces: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    mode: Mode = "exact"
    base: Base = "normal"

    def __post_init__(self) -> None:
        """Refuse what is no flow."""
        super().__post_init__()
        if self.pieces < 1:
            raise ValueError(f"a flow has at least one piece; pieces is {self.pieces}.")


class Nfe1Sigma(Scalings, OnItself, Euclidean):
    """NFE-1 with all means 0: `-sum_k (|s_r| |s_h| - |s_t|)^2`. Relations scale centred laws."""

    entity_parts = ("scale",)
    relation_parts = ("scale",)

    def entity(self, row: Row) -> dict[str, Any]:
        """The law with the absolute values of the deviations of the row."""
        return {"scale": jnp.abs(row["scale"])}

    def relation(self, row: Row) -> dict[str, Any]:
        """The absolute values of the scales: a centred symmetric law does not tell s from -s."""
        return {"scale": jnp.abs(row["scale"])}

    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """The deviations."""
        return point["scale"]

    def deviation(self, point: Point) -> Any:
        """The standard deviation of every coordinate, `[..., d]`."""
        return point["scale"]


@dataclass(frozen=True)
class Nfe3(SpreadAffineMaps, Family):
    """NFE-3: normal laws under the Kullback-Leibler divergence of the moved head from the tail.

    `-sum_k log(s_t / s') + (s'^2 + (m' - m_t)^2) / (2 s_t^2) - 1/2` with `m' = a m_h + m_r` and `s' = b s_h`, where b
    is the softplus of the relation's scale, and s_h and s_t are the softplus of those of the entities.

    Attributes:
        mode: in `published` a is the scale of the row itself, as in the released code, so that means may be turned
            around; in `exact` a is b, so that relations are affine maps.
    """

    entity_parts = ("mean", "deviation")
    relation_parts = ("scale", "shift")
    mode: Mode = "published"

    def entity(self, row: Row) -> dict[str, Any]:
        """The law with the softplus of the deviations of the row."""
        return {"mean": row["mean"], "deviation": jax.nn.softplus(row["deviation"])}

    def relation(self, row: Row) -> dict[str, Any]:
        """The map of means and that of deviations."""
        spread = jax.nn.softplus(row["scale"])
        scale = row["scale"] if self.mode == "published" else spread
        return {"scale": scale, "shift": row["shift"], "spread": spread}

    def act(self, element: Element, point: Point) -> dict[str, Any]:
        """Move means and deviations."""
        mean = element["scale"] * point["mean"] + element["shift"]
        return {"mean": mean, "deviation": element["spread"] * point["deviation"]}

    def lift(self, point: Point) -> dict[str, Any]:
        """The map from the standard normal law to the law."""
        return {"scale": point["deviation"], "shift": point["mean"], "spread": point["deviation"]}

    def reference(self, like: Point) -> dict[str, Any]:
        """The standard normal law."""
        return {"mean": jnp.zeros_like(like["mean"]), "deviation": jnp.ones_like(like["deviation"])}

    def deviation(self, point: Point) -> Any:
        """The standard deviation of every coordinate, `[..., d]`."""
        return point["deviation"]

    def similarity(self, x: Point, y: Point) -> Float[Array, "*batch"]:
        """The negative Kullback-Leibler divergence of x from y, in nats."""
        variance = y["deviation"] ** 2
        gap = (x["deviation"] ** 2 + (x["mean"] - y["mean"]) ** 2) / (2 * variance)
        return -jnp.sum(jnp.log(y["deviation"]) - jnp.log(x["deviation"]) + gap - 0.5, axis=-1)

    def query(self, x: Point) -> Linear:
        """A moved head as one side of the similarity."""
        power = (x["deviation"] ** 2 + x["mean"] ** 2) / 2
        bias = jnp.sum(jnp.log(x["deviation"]) + 0.5, axis=-1)
        return Linear(jnp.concatenate([-power, x["mean"]], axis=-1), bias)

    def key(self, y: Point) -> Linear:
        """A tail as the other side of the similarity."""
        precision = y["deviation"] ** -2
        bias = -jnp.sum(jnp.log(y["deviation"]) + y["mean"] ** 2 * precision / 2, axis=-1)
        return Linear(jnp.concatenate([precision, y["mean"] * precision], axis=-1), bias)


@cache
def gram(pieces: int, base: Base = "normal") -> Float[np.ndarray, "basis basis"]:
    """The second moments `E b_i(Z) b_j(Z)` of the basis (1, ways in each piece), in float64."""
    law = _law(base)
    lower, upper = law.support()

    def moment(i: int, j: int) -> float:
        def integrand(z: float) -> float:
            values = [1.0, *(float(way) for way in _ways(pieces, base, np.asarray(z)))]
            return values[i] * values[j] * float(law.pdf(z))

        ends = sorted({lower, *_breaks(pieces, base), 0.0, upper})
        return sum(quad(integrand, *some, epsabs=1e-13, epsrel=1e-13)[0] for some in pairwise(ends))

    found = np.zeros((pieces + 1, pieces + 1))
    for i in range(pieces + 1):
        for j in range(i + 1):
            found[i, j] = found[j, i] = moment(i, j)
    return found


@cache
def _law(base: Base) -> Any:
    """The law of Z, from SciPy, whose import takes a while."""
    from scipy import stats

    return {"normal": stats.norm(), "uniform": stats.uniform(-np.sqrt(3), 2 * np.sqrt(3))}[base]


def _breaks(pieces: int, base: Base) -> tuple[float, ...]:
    """Where pieces meet: the quantiles of Z, made exactly symmetric about 0."""
    cuts = _law(base).ppf(np.arange(1, pieces) / pieces)
    return tuple(float(cut) for cut in (cuts - cuts[::-1]) / 2)


def _ways(pieces: int, base: Base, z: Any) -> list[Any]:
    """The signed part of the way from 0 to z in each piece."""
    xp = jnp if isinstance(z, jax.Array) else np
    ends = [-np.inf, *_breaks(pieces, base), np.inf]
    return [xp.clip(z, low, high) - float(np.clip(0.0, low, high)) for low, high in pairwise(ends)]


def _combined(factors: Any, parts: list[Any]) -> Any:
    """The sum of parts with factors, leaving out those that are 0."""
    return sum(
        part if factor == 1 else float(factor) * part
        for factor, part in zip(factors, parts, strict=True)
        if abs(factor) > 1e-12
    )
