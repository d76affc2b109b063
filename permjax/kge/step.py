"""One step of training, and an epoch of steps in one compiled call."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from permjax.kge import losses
from permjax.kge.base import Family, Params, Point
from permjax.kge.batches import Examples, known_tails
from permjax.kge.blocks import against_table
from permjax.kge.models import moved, product, rows
from permjax.kge.vectors import Complex, Distmult, Quate

Loss: TypeAlias = Literal["bce_all", "ce_all", "k_vs_all", "negatives"]


@dataclass(frozen=True)
class KgeTraining:
    """How to train; the defaults suit small graphs.

    gamma, the dimension and `init_bound` belong together: see `permjax.kge.losses.coupled_bound`.

    Attributes:
        loss: `bce_all` (published), `ce_all`, `k_vs_all` or `negatives`; see `permjax.kge.losses`.
        gamma: the constant of the scores.
        init_bound: initial rows are drawn from U(-init_bound, init_bound).
        learning_rate: of Adam, in the first epoch.
        decay: factor of the learning rate from epoch to epoch.
        epochs: passes over the training triples in both directions.
        batch_size: triples per step, or with `k_vs_all` different (head, relation); the last batch may have fewer.
        n3: weight of the nuclear 3-norm penalty, for families that multiply numbers.
        negatives: entities drawn for each chunk of a batch, with the loss `negatives`.
        chunk: triples that share the entities drawn for them.
        valid_every: epochs between two validations, after which the state is saved; 0 never validates, and saves
            after every epoch. The last epoch is always validated and saved.
        patience: validations without a better MRR after which the training of a seed ends; 0 never ends it.
    """

    loss: Loss = "bce_all"
    gamma: float = 4.0
    init_bound: float = 0.3
    learning_rate: float = 0.01
    decay: float = 0.95
    epochs: int = 30
    batch_size: int = 256
    n3: float = 0.0
    negatives: int = 256
    chunk: int = 32
    valid_every: int = 5
    patience: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that no run can have."""
        for name in ("epochs", "batch_size", "negatives", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.loss == "negatives" and self.batch_size % self.chunk:
            message = f"a batch of {self.batch_size} triples does not fall into chunks of {self.chunk}; "
            raise ValueError(message + "make batch_size a multiple of chunk.")
        if self.loss == "k_vs_all" and self.n3:
            raise ValueError("the penalty n3 is one of triples, which the loss k_vs_all does not see; set n3 to 0.")


class State(NamedTuple):
    """What a step changes; between calls every leaf has a first axis over seeds."""

    params: Params
    moments: Any


class Programs(NamedTuple):
    """Compiled: `init(keys)`, `advance(state, ...)` (see `_advance`) and `better(best, params, chosen)`."""

    init: Callable[..., State]
    advance: Callable[..., tuple[State, Array, Array]]
    better: Callable[..., Params]


def programs(family: Family, training: KgeTraining, entities: int, relations: int, most: int) -> Programs:
    """The compiled functions; kept, so that only what changes a step compiles again.

    Args:
        family: what to train.
        training: how.
        entities: number of entities.
        relations: number of relation rows, two for each relation.
        most: the largest number of known tails of a batch, for the loss `k_vs_all`.

    Raises:
        ValueError: the penalty n3 is asked for a family that does not multiply numbers.
    """
    if training.n3 and not isinstance(family, Distmult | Complex | Quate):
        message = f"the penalty n3 is for families that multiply numbers, such as Complex, not for {family}; "
        raise ValueError(message + "set n3 to 0.")
    outside = {"epochs": 1, "learning_rate": 0.0, "decay": 1.0, "valid_every": 0, "patience": 0}
    return _programs(family, dataclasses.replace(training, **outside), entities, relations, most)


@functools.lru_cache(maxsize=16)
def _programs(family: Family, training: KgeTraining, entities: int, relations: int, most: int) -> Programs:
    adam = optax.scale_by_adam()

    @jax.jit
    @jax.vmap
    def draw(key: Array) -> Params:
        return family.init(jax.random.fold_in(key, 0), entities, relations, training.init_bound)

    start = jax.jit(jax.vmap(adam.init))

    def init(keys: Array) -> State:
        params = draw(keys)  # in a call of its own, whose memory is free again before there are moments
        return State(params, start(params))

    def better(best: Params, params: Params, chosen: Array) -> Params:
        return jax.tree.map(
            lambda old, new: jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old), best, params
        )

    advance = functools.partial(_advance, functools.partial(objective, family, training, most), adam)
    return Programs(init, jax.jit(advance, donate_argnums=0), jax.jit(better, donate_argnums=0))


def _advance(
    measure: Callable[..., tuple[Array, Array]],
    adam: optax.GradientTransformation,
    state: State,
    keys: Shaped[Array, " seeds"],
    batches: Int[Array, "seeds steps b"],
    first: Int[Array, ""],
    rate: Float[Array, ""],
    found: Examples,
) -> tuple[State, Float[Array, " seeds"], Bool[Array, " seeds"]]:
    """An epoch whose steps are numbered from `first` on; also the sum of its losses, and whether all is finite."""
    numbers = first + jnp.arange(batches.shape[1])

    def one(state: State, key: Array, batches: Array) -> tuple[State, Array, Array]:
        def step(state: State, batch: tuple[Array, Array]) -> tuple[State, Array]:
            ids, number = batch
            key_of_step = jax.random.fold_in(key, number)
            gradient, total = jax.grad(measure, has_aux=True)(state.params, found, ids, key_of_step)
            updates, moments = adam.update(gradient, state.moments)
            params = jax.tree.map(lambda x, update: x - rate * update, state.params, updates)
            return State(params, moments), total

        state, totals = jax.lax.scan(step, state, (batches, numbers))
        finite = [jnp.isfinite(x).all() for x in (totals, *jax.tree.leaves(state.params))]
        return state, totals.sum(), jnp.stack(finite).all()

    return jax.vmap(one)(state, keys, batches)


def objective(
    family: Family, training: KgeTraining, most: int, params: Params, found: Examples, ids: Int[Array, " b"], key: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean loss of a batch, penalty included, and the sum of its losses without penalty.

    Args:
        family: the family.
        training: loss, gamma, penalty.
        most: as in `programs`.
        params: the tables.
        found: what there is to learn.
        ids: the examples of the batch; -1 is none.
        key: for drawing negatives.
    """
    real = ids >= 0
    ids = jnp.maximum(ids, 0)
    heads, relations, tails = found.heads[ids], found.relations[ids], found.tails[found.starts[ids]]
    x = moved(family, params, heads, relations)
    if training.loss == "negatives":
        each = _against_drawn(family, training, params, x, tails, key)
    else:
        scores = against_table(family, params["entity"], x) + training.gamma
        if training.loss == "k_vs_all":
            each = losses.k_vs_all(scores, *known_tails(found, ids, real, most))
        else:
            each = {"bce_all": losses.bce_all, "ce_all": losses.ce_all}[training.loss](scores, tails)
    total, count = jnp.sum(jnp.where(real, each, 0)), real.sum()
    if not training.n3:
        return total / count, total
    entity, relation = params["entity"], params["relation"]
    penalty = losses.n3(rows(entity, heads), rows(relation, relations), rows(entity, tails))
    return (total + training.n3 * jnp.sum(jnp.where(real, penalty, 0))) / count, total


def _against_drawn(
    family: Family, training: KgeTraining, params: Params, x: Point, tails: Int[Array, " b"], key: Any
) -> Float[Array, " b"]:
    """Losses with negatives drawn from the table, the same for all triples of a chunk."""
    entities, chunks = len(jax.tree.leaves(params["entity"])[0]), len(tails) // training.chunk
    drawn = jax.random.randint(key, (chunks, training.negatives), 0, entities)
    in_chunks = functools.partial(jax.tree.map, lambda a: a.reshape(chunks, -1, *a.shape[1:]))
    others = family.key(family.entity(rows(params["entity"], drawn)))
    scores = jax.vmap(product)(in_chunks(family.query(x)), others) + training.gamma
    same = in_chunks(tails)[:, :, None] == drawn[:, None]
    positive = family.similarity(x, family.entity(rows(params["entity"], tails))) + training.gamma
    flat = (len(tails), training.negatives)
    return losses.negatives(positive, scores.reshape(flat), same.reshape(flat), entities)
