"""Families whose entities are points of R^d, C^d or H^d."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from permjax.kge.base import Euclidean, Inner, OnItself, Params, Point, Row
from permjax.kge.groups import AffineMaps, ComplexScalings, Element, Quaternions, Scalings, Translations


class Transe(Translations, Euclidean):
    """Translations of R^d under the squared distance; also NFE-1 with unit scales ("NFE-1-mu").

    `-|h + r - t|^2`: the square keeps the ranks of the norm of Bordes et al. 2013. Reference point: 0.
    """

    entity_parts = ("mean",)
    relation_parts = ("shift",)

    def act(self, element: Element, point: Point) -> dict[str, Any]:
        """Translate points."""
        return {"mean": point["mean"] + element["shift"]}

    def lift(self, point: Point) -> dict[str, Any]:
        """The translation from 0 to the point."""
        return {"shift": point["mean"]}

    def reference(self, like: Point) -> dict[str, Any]:
        """The point 0."""
        return {"mean": jnp.zeros_like(like["mean"])}

    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """The point itself."""
        return point["mean"]


class Affine(AffineMaps, Euclidean):
    """Affine maps of R^d under the squared distance: NFE-1 without uncertainty, `-|s_r h + m_r - t|^2`.

    Reference point: 0, which the translations among the maps move anywhere.
    """

    entity_parts = ("mean",)
    relation_parts = ("scale", "shift")

    def act(self, element: Element, point: Point) -> dict[str, Any]:
        """Scale, then translate points."""
        return {"mean": element["scale"] * point["mean"] + element["shift"]}

    def lift(self, point: Point) -> dict[str, Any]:
        """The translation from 0 to the point."""
        return {"scale": jnp.ones_like(point["mean"]), "shift": point["mean"]}

    def reference(self, like: Point) -> dict[str, Any]:
        """The point 0."""
        return {"mean": jnp.zeros_like(like["mean"])}

    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """The point itself."""
        return point["mean"]


class Distmult(Scalings, OnItself, Inner):
    """Scalings of R^d under the inner product (Yang et al. 2015): `sum_k h_k r_k t_k`. Reference point: all ones."""

    entity_parts = ("scale",)
    relation_parts = ("scale",)


class _OnComplexNumbers(ComplexScalings, OnItself):
    """C^d, and complex scalings that act on it; reference point 1."""

    entity_parts = ("real", "imag")


class Complex(_OnComplexNumbers, Inner):
    """Complex scalings under the real inner product (Trouillon et al. 2016): `Re <h r, conj t>`."""

    relation_parts = ("real", "imag")


class Rotate(_OnComplexNumbers, Euclidean):
    """Rotations of C^d under the squared distance: `-|h r - t|^2` with |r_k| = 1.

    Sun et al. 2019 sum moduli of coordinates; the squared distance keeps the score one matrix product.
    """

    relation_parts = ("phase",)

    def init(self, key: Any, entities: int, relations: int, bound: float = 0.1) -> Params:
        """Draw entities from U(-bound, bound) and phases from U(-pi, pi)."""
        key, own = jax.random.split(key)
        params = super().init(key, entities, relations, bound)
        shape = (relations, self.dimension)
        return {**params, "relation": {"phase": jax.random.uniform(own, shape, minval=-jnp.pi, maxval=jnp.pi)}}

    def relation(self, row: Row) -> dict[str, Any]:
        """The unit numbers of the phases."""
        return {"real": jnp.cos(row["phase"]), "imag": jnp.sin(row["phase"])}

    def coordinates(self, point: Point) -> Float[Array, "*batch width"]:
        """Real and imaginary parts."""
        return jnp.concatenate([point["real"], point["imag"]], axis=-1)


class Quate(Quaternions, OnItself, Inner):
    """Unit quaternions that act on H^d from the left, under the inner product (Zhang et al. 2019)."""

    entity_parts = ("r", "i", "j", "k")
    relation_parts = ("r", "i", "j", "k")

    def relation(self, row: Row) -> dict[str, Any]:
        """The quaternions of length one along those of the row."""
        size = jnp.sqrt(sum(row[part] ** 2 for part in "rijk") + 1e-24)
        return {part: row[part] / size for part in "rijk"}
