"""Families by name, and the scores of their models."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from permjax.kge.base import Family, Params, Point, Row
from permjax.kge.flows import Nfe1, Nfe1Sigma, Nfe2, Nfe3, NfeK
from permjax.kge.vectors import Affine, Complex, Distmult, Quate, Rotate, Transe

FAMILIES: dict[str, type[Family]] = {
    "nfe_1": Nfe1,
    "nfe_2": Nfe2,
    "nfe_3": Nfe3,
    "nfe_k": NfeK,
    "affine": Affine,
    "nfe_1_mu": Transe,
    "nfe_1_sigma": Nfe1Sigma,
    "transe": Transe,
    "distmult": Distmult,
    "complex": Complex,
    "rotate": Rotate,
    "quate": Quate,
}
"""All families; `nfe_1_mu`, NFE-1 with unit scales, is TransE under the squared distance."""


def rows(table: dict[str, Array], ids: Int[Array, "*batch"]) -> Row:
    """Rows of a table."""
    return {part: jnp.take(values, ids, axis=0) for part, values in table.items()}


def moved(family: Family, params: Params, heads: Int[Array, " n"], relations: Int[Array, " n"]) -> Point:
    """Heads as relations move them."""
    element = family.relation(rows(params["relation"], relations))
    return family.act(element, family.entity(rows(params["entity"], heads)))


def score(family: Family, params: Params, triples: Int[Array, "n 3"]) -> Float[Array, " n"]:
    """The similarity of each triple, without gamma, by its definition."""
    x = moved(family, params, triples[:, 0], triples[:, 1])
    return family.similarity(x, family.entity(rows(params["entity"], triples[:, 2])))


def score_all(
    family: Family, params: Params, heads: Int[Array, " n"], relations: Int[Array, " n"]
) -> Float[Array, "n entities"]:
    """The similarity of every (head, relation, entity), without gamma: one matrix product and two biases."""
    return against_all(family, params, moved(family, params, heads, relations))


def against_all(family: Family, params: Params, x: Point) -> Float[Array, "n entities"]:
    """The similarity of moved heads with every entity."""
    return product(family.query(x), family.key(family.entity(params["entity"])))


def product(query: Any, key: Any) -> Float[Array, "n entities"]:
    """All similarities of queries `[n, width]` and keys `[entities, width]`, at the highest precision."""
    scores = jnp.matmul(query.vector, key.vector.T, precision=jax.lax.Precision.HIGHEST)
    return scores + query.bias[:, None] + key.bias[None]
