"""Cold start: the row of a new entity from a few triples, in closed form, without training.

Where entities are points or laws whose similarity is a squared distance and relations move their coordinates linearly,
the sum of the squared distances of some triples is a quadratic function of the new entity, and its least is found by
one small linear system per coordinate. For the affine family and the means of NFE-1, of triples (e, r, t), (h, r, e),

    m_e = (sum s_r (m_t - m_r) + sum (s_r m_h + m_r)) / (sum s_r^2 + number of triples (h, r, e)).

With reciprocal relations a triple says this both ways. NFE-3 has a closed form for triples (e, r, t) only, in which
each coordinate of t counts by its precision; reciprocal relations bring all triples to that form. Inner products have
none: they grow without bound with the new entity.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from permjax.kge.base import Euclidean, Family, Params, Point, Row
from permjax.kge.flows import Nfe3
from permjax.kge.groups import Element
from permjax.kge.models import rows
from permjax.kge.triples import both_ways


def cold_start(
    family: Family,
    params: Params,
    triples: Int[np.ndarray, "n 3"],
    relations: int,
    *,
    entity: int | None = None,
    contrast: float = 0.5,
) -> dict[str, Any]:
    """The row of a new entity: the one at which its triples have the greatest sum of scores.

    A trained entity is near to what it is related to and far from the rest, which triples alone do not say: between
    all its neighbours it would be a likely answer to too many questions. So the mean score over all entities in place
    of the other side of each triple is subtracted, `contrast` times. That leaves a quadratic function, the one in which
    the other sides are moved away from their mean by the factor `1 / (1 - contrast)`.

    Args:
        family: a family under a squared distance (TransE, affine, RotatE, all NFE under W2), or NFE-3.
        params: the trained rows; they stay as they are.
        triples: triples that have the new entity as head or tail, and entities of the table on the other side.
        relations: number of relations of the graph R; with 2 R relation rows, those from R on are reciprocal.
        entity: the id of the new entity; by default the first one that is not in the table. One that is there is
            solved again, without a look at its row.
        contrast: from 0, triples alone, to less than 1. Without effect on NFE-3, where nothing bounds a difference.

    Returns:
        The row, part -> [d] or [k, d]; `with_entity` appends it to the table. Slopes of flows that come out negative
        are 0.

    Raises:
        ValueError: the family has no closed form, a triple does not fit, or the triples leave a coordinate open.

    Example:
        >>> row = cold_start(family, params, np.array([[graph.size, graph.relation("child_of"), 5]]), 13)
        >>> params = with_entity(params, row)
    """
    count, relation_rows = (len(_first(params[table])) for table in ("entity", "relation"))
    entity, reciprocal = count if entity is None else entity, relation_rows == 2 * relations
    _check(family, triples, count, relations, entity, reciprocal)
    if not 0 <= contrast < 1:
        raise ValueError(f"contrast is {contrast}; it must be at least 0 and less than 1.")
    triples = both_ways(triples, relations) if reciprocal else triples
    leaving, arriving = triples[triples[:, 0] == entity], triples[triples[:, 2] == entity]
    if not isinstance(family, Euclidean):
        row = _normal_law(*_sides(family, params, leaving[:, 1], leaving[:, 2]))
    else:
        table = family.entity(params["entity"])
        centre = {part: jnp.mean(values[np.arange(count) != entity], axis=0) for part, values in table.items()}
        (out, there), (back, here) = _padded(leaving[:, 1:]), _padded(arriving[:, 1::-1])
        sides = *_sides(family, params, *out.T), there, *_sides(family, params, *back.T), here
        row = _least_squares(family, *sides, centre, 1 / (1 - contrast))
    if not all(np.isfinite(values).all() for values in row.values()):
        message = "the triples of the new entity leave a coordinate open, as every relation of theirs has the scale 0 "
        raise ValueError(message + "there; give a triple with another relation, or with the entity as its tail.")
    return row


def with_entity(params: Params, row: Row) -> Params:
    """The tables with one more entity, whose id is the number of entities before."""
    table = params["entity"]
    added = {part: jnp.concatenate([values, row[part][None]]) for part, values in table.items()}
    return {**params, "entity": added}


def _sides(family: Family, params: Params, relations: np.ndarray, others: np.ndarray) -> tuple[Element, Point]:
    """The relations of some triples, and their other entities."""
    element = family.relation(rows(params["relation"], jnp.asarray(relations)))
    return element, family.entity(rows(params["entity"], jnp.asarray(others)))


def _padded(pairs: Int[np.ndarray, "n 2"]) -> tuple[Int[np.ndarray, "m 2"], Float[np.ndarray, " m"]]:
    """Pairs filled up to a power of two, with weights 1 and 0, so that few shapes are compiled."""
    size = max(4, 1 << (len(pairs) - 1).bit_length())
    filled = np.concatenate([pairs, np.zeros((size - len(pairs), 2), pairs.dtype)])
    return filled, (np.arange(size) < len(pairs)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _least_squares(
    family: Euclidean,
    out: Row,
    tails: Point,
    there: Float[Array, " n"],
    back: Row,
    heads: Point,
    here: Float[Array, " m"],
    centre: Point,
    stretch: Float[Array, ""] | float,
) -> dict[str, Any]:
    """The least of `sum |out x - tail|^2 + sum |x - back head|^2` over points x, coordinate by coordinate.

    As `[p, d]`, coordinate k of what a relation makes of a point depends on coordinate k of the p parts of the point
    only. Matrices and shifts are read off from where 0 and the p units go. The sums have weights `there` and `here`.
    """
    like = {part: values.shape for part, values in centre.items()}
    width = like[next(iter(like))][-1]
    size = sum(int(np.prod(shape[:-1], dtype=int)) for shape in like.values())
    flat = jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)])[..., None] * jnp.ones((1, 1, width))
    units = jax.vmap(lambda x: _point(x, like))(flat)

    def place(point: Point) -> Array:
        return family.coordinates(point).reshape(size, width)

    def linear(element: Element) -> tuple[Array, Array]:
        found = jax.vmap(lambda unit: place(family.act(element, unit)))(units)
        return found[1:] - found[:1], found[0]

    def away(point: Array, mean: Array) -> Array:
        return mean + stretch * (point - mean)

    matrices, shifts = jax.vmap(linear)(out)
    plain = jax.vmap(place)(units)
    matrices = jnp.concatenate([matrices, jnp.repeat((plain[1:] - plain[:1])[None], len(here), axis=0)])
    ends = away(jax.vmap(place)(tails), place(centre)[None]) - shifts
    starts = jax.vmap(lambda g, head: away(place(family.act(g, head)), place(family.act(g, centre))))(back, heads)
    aims, weights = jnp.concatenate([ends, starts]), jnp.concatenate([there, here])
    with jax.default_matmul_precision("highest"):
        normal = jnp.einsum("n,niok,njok->kij", weights, matrices, matrices)
        right = jnp.einsum("n,niok,nok->ki", weights, matrices, aims)
    solved = _point(jnp.linalg.solve(normal, right[..., None])[..., 0].T, like)
    return {part: jnp.maximum(x, 0) if part == "slopes" else x for part, x in solved.items()}


def _normal_law(elements: Element, tails: Point) -> dict[str, Any]:
    """The least sum of divergences of the moved law from the tails: `sum KL(a m + b, c s | tail)`."""
    precision = tails["deviation"] ** -2
    weight = jnp.sum(elements["scale"] ** 2 * precision, axis=0)
    mean = jnp.sum(elements["scale"] * precision * (tails["mean"] - elements["shift"]), axis=0) / weight
    spread = jnp.sqrt(len(precision) / jnp.sum(elements["spread"] ** 2 * precision, axis=0))
    return {"mean": mean, "deviation": jnp.log(jnp.expm1(spread))}


def _point(flat: Float[Array, "parts d"], like: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The point whose parts have given shapes from all its coordinates."""
    counts = [int(np.prod(shape[:-1], dtype=int)) for shape in like.values()]
    pieces = jnp.split(flat, np.cumsum(counts)[:-1])
    return {part: piece.reshape(shape) for (part, shape), piece in zip(like.items(), pieces, strict=True)}


def _first(table: Mapping[str, Array]) -> Array:
    return next(iter(table.values()))


def _check(family: Family, triples: np.ndarray, count: int, relations: int, entity: int, reciprocal: bool) -> None:
    name = type(family).__name__
    if not isinstance(family, Euclidean | Nfe3):
        message = f"{name} has no closed form for a new entity: an inner product grows without bound with it. "
        raise ValueError(message + "Train it on, or take a family under a squared distance.")
    if not len(triples) or not ((triples[:, 0] == entity) ^ (triples[:, 2] == entity)).all():
        message = f"every triple must have the new entity, id {entity}, on one side and another one on the other side; "
        raise ValueError(f"{message}given are {len(triples)} triples.")
    others = np.where(triples[:, 0] == entity, triples[:, 2], triples[:, 0])
    for what, ids, limit in (("entity", others, count), ("relation", triples[:, 1], relations)):
        if len(wrong := ids[(ids < 0) | (ids >= limit)]):
            message = f"a triple of the new entity has the {what} id {wrong[0]}, but ids there are 0..{limit - 1}."
            raise ValueError(message)
    if isinstance(family, Nfe3) and not reciprocal and (triples[:, 2] == entity).any():
        message = "Nfe3 has a closed form for triples (new entity, r, t) only, or for all with reciprocal relations."
        raise ValueError(message)
