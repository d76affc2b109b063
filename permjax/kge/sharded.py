"""Entity tables in parts on many devices: training and ranking against all entities without moving their rows.

Each device holds some rows of the entity table with their moments; relations are everywhere. A step sums two small
arrays over the devices: the rows of the heads, and the gradients of the queries with the losses. The cross-entropy
sums two numbers per query more. Nothing else travels, whatever the size of the table.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from permjax.kge import losses
from permjax.kge.base import Family, Linear, Params, Row
from permjax.kge.batches import Examples, examples, order
from permjax.kge.models import product, rows
from permjax.kge.queries import Batch, queries
from permjax.kge.rank import Counts, Ranks, ranks_of, tally, without_answer
from permjax.kge.shards import ENTITIES, SAME, TABLES, Block, Place, entity_mesh, init_sharded, over, summed
from permjax.kge.step import KgeTraining, State
from permjax.kge.triples import Graph

_STATE = State(TABLES, optax.ScaleByAdamState(SAME, TABLES, TABLES))


class ShardedResult(NamedTuple):
    """A trained model.

    Attributes:
        params: its tables, the entities in parts; `permjax.kge.shards.whole_params` puts them together.
        loss: the mean loss of every epoch.
    """

    params: Params
    loss: Float[np.ndarray, " epochs"]


# training


def train_sharded(
    family: Family, graph: Graph, training: KgeTraining, seed: int = 0, *, mesh: Mesh | None = None
) -> ShardedResult:
    """Train one model with its entity table in parts; the same steps as `train_kge`, without validation.

    Args:
        family: the family of embeddings.
        graph: its training triples are learned in both directions.
        training: loss (`bce_all` or `ce_all`), optimizer and schedule.
        seed: decides the initial rows and the order of the triples.
        mesh: from `entity_mesh`; all devices by default.

    Raises:
        ValueError: the loss is another one, or has the penalty n3.

    Example:
        >>> result = train_sharded(Nfe1(dimension=64), graph, KgeTraining(epochs=10))
        >>> metrics(rank_sharded(Nfe1(dimension=64), result.params, graph))["mrr"]
    """
    mesh = entity_mesh() if mesh is None else mesh
    key = jax.random.fold_in(jax.random.key(seed), 0)
    params = init_sharded(family, key, graph.size, 2 * len(graph.relations), training.init_bound, mesh)
    programs = sharded_programs(family, training, graph.size, mesh)
    state, found, means = programs.begin(params), examples(graph, grouped=False), []
    for epoch in range(training.epochs):
        batches = order(seed, epoch, len(found.heads), training.batch_size)
        rate = np.float32(training.learning_rate * training.decay**epoch)
        state, total = programs.advance(state, batches, rate, found)
        means.append(float(total) / len(found.heads))
    return ShardedResult(state.params, np.array(means))


class ShardedPrograms(NamedTuple):
    """Compiled functions over a mesh.

    Attributes:
        gradient: `gradient(params, heads [b], relations [b], tails [b]) -> (losses [b], gradient of their mean)`; a
            negative head is no query, and has no part in the mean.
        begin: `begin(params) -> State`.
        advance: `advance(state, batches [steps, b], rate, examples) -> (state, sum of losses)`; donates the state.
    """

    gradient: Callable[..., tuple[Array, Params]]
    begin: Callable[[Params], State]
    advance: Callable[..., tuple[State, Array]]


@functools.lru_cache(maxsize=16)
def sharded_programs(family: Family, training: KgeTraining, entities: int, mesh: Mesh) -> ShardedPrograms:
    """The compiled functions for training a family with tables in parts; kept for the next call.

    Raises:
        ValueError: the loss is not `bce_all` or `ce_all`, or has the penalty n3.
    """
    if training.loss not in _LOSSES or training.n3:
        message = f"tables in parts are trained with the losses {' and '.join(_LOSSES)} without n3, not with {training}"
        raise ValueError(f"{message}; change `loss` and `n3`, or use `train_kge`.")
    adam = optax.scale_by_adam()
    gradient = functools.partial(_gradient, family, training, entities)

    def step(found: Examples, rate: Array, state: State, ids: Array) -> tuple[State, Array]:
        heads = jnp.where(ids >= 0, found.heads[ids], -1)
        each, slope = gradient(state.params, heads, found.relations[ids], found.tails[ids])
        updates, moments = adam.update(slope, state.moments)
        params = jax.tree.map(lambda x, update: x - rate * update, state.params, updates)
        return State(params, moments), each.sum()

    def advance(state: State, batches: Array, rate: Array, found: Examples) -> tuple[State, Array]:
        state, totals = jax.lax.scan(functools.partial(step, found, rate), state, batches)
        return state, totals.sum()

    return ShardedPrograms(
        jax.jit(over(mesh, gradient, (TABLES, SAME, SAME, SAME), (SAME, TABLES))),
        jax.jit(over(mesh, lambda params: State(params, adam.init(params)), (TABLES,), _STATE)),
        jax.jit(over(mesh, advance, (_STATE, SAME, SAME, SAME), (_STATE, SAME)), donate_argnums=0),
    )


def _gradient(
    family: Family,
    training: KgeTraining,
    entities: int,
    params: Params,
    heads: Int[Array, " b"],
    relations: Int[Array, " b"],
    tails: Int[Array, " b"],
) -> tuple[Float[Array, " b"], Params]:
    """On one device: the losses of all queries, 0 where there is none, and the gradient of its own rows."""
    table, real = params["entity"], heads >= 0
    place = Place.of(table, entities)
    blocks = place.blocks(table)
    fetched = place.fetch(table, heads)
    query, query_back = jax.vjp(functools.partial(_query, family, relations), params["relation"], fetched)
    scores_of = functools.partial(_block_scores, family, training.gamma)
    loss = _LOSSES[training.loss]
    start, shared = loss.begin(functools.partial(scores_of, query), blocks, len(heads))

    def add(sums: tuple[Array, Linear], block: Block) -> tuple[tuple[Array, Linear], dict[str, Array]]:
        scores, back = jax.vjp(lambda query, rows: scores_of(query, block._replace(rows=rows)), query, block.rows)
        each, slopes = loss.part(scores, tails - block.first, shared)
        of_query, of_rows = back(slopes * (real / real.sum())[:, None])
        return jax.tree.map(jnp.add, sums, (each, of_query)), of_rows

    sums, of_blocks = jax.lax.scan(add, (start, jax.tree.map(jnp.zeros_like, query)), blocks)
    each, of_query = summed(sums)
    of_relation, of_heads = query_back(of_query)
    of_table = jax.tree.map(lambda of, rows: of.reshape(rows.shape), of_blocks, dict(table))
    return jnp.where(real, each, 0), {"entity": place.add(of_table, heads, of_heads), "relation": of_relation}


def _query(family: Family, relations: Int[Array, " b"], relation: Row, heads: Row) -> Linear:
    """The queries of rows of heads and a relation table."""
    return family.query(family.act(family.relation(rows({**relation}, relations)), family.entity(heads)))


def _scores(family: Family, query: Linear, table: Row) -> Float[Array, "b rows"]:
    """Similarities of queries and the rows of a device."""
    return product(query, family.key(family.entity(table)))


def _block_scores(family: Family, gamma: float, query: Linear, block: Block) -> Float[Array, "b rows"]:
    """The scores of a block; minus infinity, which no loss sees, for rows that fill up."""
    return jnp.where(block.real[None], _scores(family, query, block.rows) + gamma, -jnp.inf)


class _Loss(NamedTuple):
    """A loss as a sum over blocks of rows.

    Attributes:
        begin: `begin(scores_of, blocks, b) -> (losses [b] to add to on this device, what all blocks need to know)`.
        part: `part(scores, tails, shared) -> (losses [b] of a block, their slopes [b, rows])`.
    """

    begin: Callable[..., tuple[Array, Any]]
    part: Callable[..., tuple[Array, Array]]


def _bce_begin(scores_of: Any, blocks: Block, size: int) -> tuple[Array, None]:  # noqa: ARG001
    return jnp.zeros(size, jnp.float32), None


def _bce_part(scores: Float[Array, "b rows"], tails: Int[Array, " b"], shared: None) -> tuple[Array, Array]:  # noqa: ARG001
    each, back = jax.vjp(lambda scores: losses.bce_all(scores, tails), scores)
    return each, back(jnp.ones_like(each))[0]


def _ce_begin(scores_of: Any, blocks: Block, size: int) -> tuple[Array, tuple[Array, Array]]:
    """The largest score and the sum of the powers exp(score - largest) over all blocks of all devices."""

    def add(carry: tuple[Array, Array], block: Block) -> tuple[tuple[Array, Array], None]:
        before, total = carry
        scores = scores_of(block)
        top = jnp.maximum(before, scores.max(axis=1))
        return (top, total * jnp.exp(before - top) + jnp.exp(scores - top[:, None]).sum(axis=1)), None

    least = jnp.full(size, jnp.finfo(jnp.float32).min)
    (own, total), _ = jax.lax.scan(add, (least, jnp.zeros(size, jnp.float32)), blocks)
    top = jax.lax.pmax(own, ENTITIES)
    total = jax.lax.psum(total * jnp.exp(own - top), ENTITIES)
    return jnp.where(jax.lax.axis_index(ENTITIES) == 0, jnp.log(total), 0), (top, total)


def _ce_part(
    scores: Float[Array, "b rows"], tails: Int[Array, " b"], shared: tuple[Array, Array]
) -> tuple[Array, Array]:
    top, total = shared
    answer = jnp.arange(scores.shape[1])[None] == tails[:, None]
    right = jnp.sum(jnp.where(answer, scores - top[:, None], 0), axis=1)
    return -right, jnp.exp(scores - top[:, None]) / total[:, None] - answer


_LOSSES = {"bce_all": _Loss(_bce_begin, _bce_part), "ce_all": _Loss(_ce_begin, _ce_part)}


# ranks


def rank_sharded(
    family: Family,
    params: Params,
    graph: Graph,
    split: str = "test",
    *,
    filtered: Sequence[str] | None = None,
    batch: int | None = None,
) -> Ranks:
    """The ranks of a model whose entity table is in parts, as `permjax.kge.rank.rank_model` gives them.

    Each device counts among its own rows; the counts are added. As they are integers, ranks do not depend on the
    number of devices where the scores do not.

    Args:
        family: its family.
        params: from `shard_params`, `init_sharded` or `train_sharded`.
        graph: the graph.
        split: `train`, `valid` or `test`.
        filtered: the splits whose answers are not ranked; see `permjax.kge.rank.ranks`.
        batch: queries per batch; by default as many as make 16 million scores over all devices.

    Raises:
        ValueError: a score is NaN.
    """
    asked = queries(graph, split, filtered=filtered, batch=batch)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return ranks_of(_counting(family, graph.size, mesh)(params, asked.batches), asked)


@functools.lru_cache(maxsize=16)
def _counting(family: Family, entities: int, mesh: Mesh) -> Callable[[Params, Batch], Counts]:
    """The compiled counts of all batches."""

    def all_of(params: Params, batches: Batch) -> Counts:
        return jax.lax.map(functools.partial(_counts, family, entities, params), batches)

    return jax.jit(over(mesh, all_of, (TABLES, SAME), SAME))


def _counts(family: Family, entities: int, params: Params, batch: Batch) -> Counts:
    """On one device: the counts of a batch among its own rows, summed over the devices."""
    table = params["entity"]
    place = Place.of(table, entities)
    query = _query(family, batch.relations, params["relation"], place.fetch(table, batch.heads))
    scores = _scores(family, query, table)
    own = jnp.take_along_axis(scores, jnp.clip(batch.answers - place.first, 0, place.size - 1)[:, None], axis=1)
    answers = jax.lax.psum(place.mine(batch.answers, own[:, 0]), ENTITIES)
    candidates = jnp.where(place.real[None], scores, jnp.nan)  # what fills up is neither above nor beside an answer
    counts = tally(candidates, answers, batch, place.first)
    undefined = (jnp.isnan(scores) & place.real[None]).any(axis=1)
    *numbers, undefined = jax.lax.psum(jnp.stack([*counts[:-1], undefined.astype(jnp.int32)]), ENTITIES)
    return without_answer(Counts(*numbers, undefined=undefined > 0))
