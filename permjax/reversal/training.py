"""One loop for all methods: permute or mask inside the compiled step, whatever the rows hold; exact resume."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from permjax.io.runs import load_run, save_run
from permjax.nets.base import Net
from permjax.nets.gpt import GPT2Config, build
from permjax.reversal.layout import visible
from permjax.reversal.methods import Method, prepare
from permjax.reversal.packing import pack
from permjax.reversal.vocabulary import WORD_TOKENS, Special

Rows = Mapping[str, np.ndarray]
Watch = Callable[[int, PyTree], None]


@dataclass(frozen=True)
class ReversalTraining:
    """How to train; nothing in here depends on the method or on a seed.

    Attributes:
        steps: updates of the weights.
        batch_size: rows per step; what is left of an epoch is dropped, another remnant each epoch.
        learning_rate: the peak, after which a cosine falls to zero at the last step.
        warmup_steps: steps of linear rise from zero.
        weight_decay: of AdamW, on leaves of two axes.
        beta2: of AdamW.
        accumulate: pieces of a batch whose gradients are added up one after the other; the result is the same.
        bfloat16: compute in half precision; weights and their moments stay float32.
        every: steps of one compiled call, after which a checkpoint is written.
    """

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.98
    accumulate: int = 1
    bfloat16: bool = False
    every: int = 250


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        params: its weights.
        losses: of every step, in nats per token that counted.
        orders: how many documents came in the original, the reversed and a random order.
    """

    params: PyTree
    losses: Float[np.ndarray, " steps"]
    orders: Int[np.ndarray, " 3"]


class _State(NamedTuple):
    params: PyTree
    optimizer: PyTree


def small_gpt(words: int, length: int, *, width: int = 128, layers: int = 2, heads: int = 4) -> Net:
    """A GPT-2 for rows of so many tokens; it also has room for texts that are given twice."""
    return build(GPT2Config(vocab_size=words, n_positions=2 * length, n_embd=width, n_layer=layers, n_head=heads))


def rows_of(documents: Sequence[Mapping[str, Any]], length: int | None = None, *, packed: bool = False) -> Rows:
    """Documents in rows, one to a row, or as many as fit.

    Args:
        documents: from `permjax.reversal.corpus.token_documents`.
        length: tokens of a row; those of the longest document by default.
        packed: whether documents share rows.
    """
    longest = max(len(document["tokens"]) for document in documents)
    return pack(documents, longest if length is None else length, packed=packed)


def train(
    net: Net,
    rows: Rows,
    method: Method,
    config: ReversalTraining,
    seed: int,
    *,
    start: PyTree | None = None,
    frozen: PyTree | None = None,
    special: Special = WORD_TOKENS,
    mesh: Mesh | None = None,
    checkpoint_dir: str | Path | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train a model by one of the methods.

    The order and the masks of a document follow from the seed, the epoch and the number of its example, whatever row
    it is in.

    Args:
        net: a language model that takes `positions` and `visible`.
        rows: from `rows_of`.
        method: from `permjax.reversal.methods.METHODS`.
        config: optimizer and steps.
        seed: of the first weights, of the order of rows, and of all that is drawn.
        start: weights to begin with.
        frozen: weights that stay as they are; `net.apply` is given them as `frozen`, and its own `params` are trained.
        special: the tags and the mask of the model.
        mesh: of one axis, over whose devices the rows of a batch are shared; the result is the same up to rounding.
        checkpoint_dir: where to keep the state after each call of `config.every` steps. A run that finds its own state
            there goes on from it and ends with the bits of an uninterrupted one.
        watch: called as `watch(steps done, params)` after each call, before its state is kept.

    Raises:
        ValueError: a batch is larger than the data or is not so many pieces, or `checkpoint_dir` holds another run.

    Example:
        >>> documents = token_documents(corpus, words := corpus.vocabulary())
        >>> rows = rows_of(documents)
        >>> net = small_gpt(len(words), rows["tokens"].shape[1])
        >>> trained = train(net, rows, METHODS["spt"], ReversalTraining(), seed=0)
    """
    _check(config, len(rows["tokens"]), mesh)
    begin, advance = _programs(net, method, config, special, mesh)
    key, data = jax.random.key(seed), {name: jnp.asarray(leaf) for name, leaf in rows.items()}
    state = begin(net.init(jax.random.fold_in(key, 0)) if start is None else start)
    saved = state, {"losses": np.zeros(config.steps, np.float32), "orders": np.zeros(3, np.int32)}
    about = _about(net, method, config, seed, rows, (start, frozen))
    found = None if checkpoint_dir is None else load_run(checkpoint_dir, saved, about)
    done, (state, history) = found or (0, saved)
    history = {name: np.array(leaf) for name, leaf in history.items()}
    while done < config.steps:
        batches = range(done, min(done + config.every, config.steps))
        state, losses, orders = advance(state, frozen, key, data, *_chosen(seed, batches, len(rows["tokens"]), config))
        history["losses"][batches.start : batches.stop] = losses
        history["orders"] += np.asarray(orders)
        done = batches.stop
        if watch is not None:
            watch(done, state.params)
        if checkpoint_dir is not None:
            save_run(checkpoint_dir, done, (state, history), about)
    return Trained(state.params, history["losses"], history["orders"])


def _chosen(
    seed: int, steps: range, rows: int, config: ReversalTraining
) -> tuple[Int[np.ndarray, "steps batch"], Int[np.ndarray, " steps"]]:
    """The rows of each step, and its epoch."""
    each = rows // config.batch_size
    epochs = np.arange(steps.start, steps.stop) // each
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(rows) for epoch in np.unique(epochs)}
    batches = [orders[step // each][step % each * config.batch_size :][: config.batch_size] for step in steps]
    return np.stack(batches).astype(np.int32), epochs.astype(np.int32)


@functools.lru_cache(maxsize=32)
def _programs(
    net: Net, method: Method, config: ReversalTraining, special: Special, mesh: Mesh | None
) -> tuple[Callable[[PyTree], _State], Callable[..., tuple[_State, Array, Array]]]:
    """Compiled: `begin(params)` and `advance(state, frozen, key, data, rows, epochs)`."""
    optimizer = _optimizer(config)

    def step(frozen: PyTree, key: Array, data: Mapping[str, Array], state: _State, chosen: tuple[Array, Array]) -> Any:
        rows, epoch = chosen
        batch = {name: leaf[rows] for name, leaf in data.items()}
        if mesh is not None:
            place = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
            batch = jax.lax.with_sharding_constraint(batch, place)
        batch, orders = prepare(method, jax.random.fold_in(jax.random.fold_in(key, 1), epoch), batch, special)
        apply = net.apply if frozen is None else functools.partial(net.apply, frozen=frozen)
        loss, gradient = _loss_and_gradient(apply, config, state.params, batch)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        return _State(optax.apply_updates(state.params, updates), moments), (loss, orders)

    def advance(
        state: _State, frozen: PyTree, key: Array, data: Any, rows: Array, epochs: Array
    ) -> tuple[_State, Array, Array]:
        state, (losses, orders) = jax.lax.scan(functools.partial(step, frozen, key, data), state, (rows, epochs))
        return state, losses, orders.sum(axis=0)

    def begin(params: PyTree) -> _State:
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), params)  # no weak types: they compile anew
        return _State(params, optimizer.init(params))

    return jax.jit(begin), jax.jit(advance)


def _optimizer(config: ReversalTraining) -> optax.GradientTransformation:
    warmup = min(config.warmup_steps, config.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.adamw(rate, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed)


def _loss_and_gradient(
    apply: Callable[..., Array], config: ReversalTraining, params: PyTree, batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], PyTree]:
    """The mean loss over tokens by weight, and its gradient, in one piece or in several."""
    total = jax.value_and_grad(functools.partial(_total, apply, config.bfloat16))
    needed = ("tokens", "doc_ids", "positions", "labels", "weights", "causal", "seen")
    batch = {name: batch[name] for name in needed if name in batch}
    scale = 1.0 / jnp.maximum(batch["weights"].sum(), 1.0)
    if config.accumulate == 1:
        sums = total(params, batch)
    else:
        pieces = {name: leaf.reshape(config.accumulate, -1, *leaf.shape[1:]) for name, leaf in batch.items()}
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        add = functools.partial(jax.tree.map, jnp.add)
        sums, _ = jax.lax.scan(lambda sums, piece: (add(sums, total(params, piece)), None), zero, pieces)
    loss, gradient = jax.tree.map(lambda leaf: leaf * scale, sums)
    return loss, gradient


def _total(apply: Callable[..., Array], half: bool, params: PyTree, batch: Mapping[str, Array]) -> Float[Array, ""]:
    """The sum of the losses of all tokens by weight."""
    if half:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    shown = visible(batch["doc_ids"], causal=batch.get("causal", True), seen=batch.get("seen"))
    logits = apply(params, batch["tokens"], positions=batch["positions"], visible=shown).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return (losses * batch["weights"]).sum()


def _about(net: Net, method: Method, config: ReversalTraining, seed: int, rows: Rows, start: PyTree) -> dict[str, Any]:
    """What makes two runs the same one, as JSON."""
    leaves = {"data": rows, "start": jax.tree.leaves(start)}
    sums = {
        name: zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)))
        for name, tree in leaves.items()
    }
    return {"net": repr(net.config), "method": repr(method), "training": repr(config), "seed": seed, **sums}


def _check(config: ReversalTraining, rows: int, mesh: Mesh | None) -> None:
    if not 0 < config.batch_size <= rows:
        message = f"The batch size is {config.batch_size}, but there are {rows} rows; "
        raise ValueError(message + f"choose one in 1..{rows}.")
    pieces = config.accumulate * (1 if mesh is None else mesh.size)
    if min(config.accumulate, config.steps, config.every) < 1 or config.batch_size % pieces:
        message = f"A batch of {config.batch_size} rows cannot be cut into {config.accumulate} pieces for "
        message += f"{pieces // max(config.accumulate, 1)} devices, or {config.steps} steps of {config.every} a call "
        raise ValueError(message + "are none; give numbers from 1 on that divide the batch.")
