"""One training loop: several seeds at once, an epoch per call, exact resume."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from permjax.data.dataset import Dataset
from permjax.io.runs import load_run, save_run
from permjax.nets.base import Net

Augment = Callable[[Array, Array], Array]
Progress = Callable[[int, dict[str, np.ndarray]], None]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; nothing in here depends on a seed.

    Attributes:
        epochs: passes over the training data.
        batch_size: examples per step; a last batch that is not full is dropped (another one each epoch).
        optimizer: `adam`, `adamw` or `sgd`.
        learning_rate: the peak of the schedule.
        schedule: after the warm-up `constant`, or `cosine` or `linear` down to zero at the last step.
        warmup_steps: steps of linear rise from zero.
        weight_decay: decoupled for `adamw`, added to the gradient otherwise; only on leaves of two or more axes.
        momentum: of `sgd`.
    """

    epochs: int = 20
    batch_size: int = 100
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.9


class TrainResult(NamedTuple):
    """Trained models.

    Attributes:
        params: the models with a first axis over seeds on every leaf; `permjax.tree.unstack` takes them apart.
        history: per metric an array [epochs, seeds]: `loss` and `accuracy` over the batches of an epoch as they were
            met, and `test_loss` and `test_accuracy` after it where there is test data.
    """

    params: PyTree
    history: dict[str, np.ndarray]


# losses


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats: -mean_i log softmax(logits_i)[labels_i]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def lm_loss(logits: Float[Array, "batch tokens vocabulary"], tokens: Int[Array, "batch tokens"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of every token given the ones before it; the first token is not predicted."""
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


def accuracy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, ""]:
    """The share of labels that have the largest logit."""
    return (jnp.argmax(logits, axis=-1) == labels).mean()


@functools.partial(jax.jit, static_argnames=("apply", "batch_size"))
def evaluate(
    apply: Callable[..., Array],
    params: PyTree,
    x: Shaped[Array, "n ..."],
    y: Int[Array, "n ..."],
    batch_size: int = 1000,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy (nats) and accuracy over a whole data set, in batches.

    Args:
        apply: `apply(params, x) -> logits`; hashable, compiled once per function and shape.
        params: the parameters of one model (`jax.vmap` for several).
        x: inputs.
        y: labels, one per row of the logits: [n] for classes, [n, tokens] for language models.
        batch_size: examples per call of `apply`; the last batch may be smaller.
    """

    def score(x: Array, y: Array) -> Array:
        logits = apply(params, x)
        return jnp.stack([cross_entropy(logits, y), accuracy(logits, y)])

    size = min(batch_size, len(x))
    full = len(x) // size * size
    batches = tuple(a[:full].reshape(-1, size, *a.shape[1:]) for a in (x, y))
    total = size * jax.lax.map(lambda batch: score(*batch), batches).sum(axis=0)
    if full < len(x):
        total += (len(x) - full) * score(x[full:], y[full:])
    loss, right = total / len(x)
    return loss, right


# the loop


class _State(NamedTuple):
    """What a step changes; every leaf has a first axis over seeds between calls."""

    params: PyTree
    optimizer: PyTree


class _Programs(NamedTuple):
    """Compiled: `init(keys)`, `advance` (see `_advance`) and `score` (see `_score`)."""

    init: Callable[..., _State]
    advance: Callable[..., tuple[_State, Array]]
    score: Callable[..., Array]


class _Pieces(NamedTuple):
    """How many models and steps one compiled call does."""

    models: int
    steps: int


def train(
    net: Net,
    data: Dataset | Sequence[Any],
    config: TrainConfig,
    seeds: Sequence[int],
    *,
    checkpoint_dir: str | Path | None = None,
    progress: Progress | None = None,
    augment: Augment | None = None,
) -> TrainResult:
    """Train one model per seed, all at once; a seed decides the initial weights and the order of the data.

    Args:
        net: what to train.
        data: a `Dataset`, or arrays `(x, y)` or `(x, y, x_test, y_test)`. A language model takes tokens
            [n, t] and as labels the tokens that follow, [n, t].
        config: optimizer, schedule, epochs.
        seeds: one number per model.
        checkpoint_dir: where to keep the state after each epoch. A run that finds its own state there goes on from
            it and ends with the bits of an uninterrupted one.
        progress: called as `progress(epoch, metrics)` after each epoch, with one value per seed.
        augment: `augment(key, x) -> x`, applied to each training batch.

    Raises:
        ValueError: there is no seed, a batch is larger than the data, or `checkpoint_dir` holds another run.

    Example:
        >>> net = build(MLPConfig(hidden=(64, 64)))
        >>> result = train(net, digits(), TrainConfig(epochs=10), seeds=[0, 1])
        >>> a, b = unstack(result.params)
    """
    arrays = tuple(jnp.asarray(array) for array in _arrays(data))
    _check(config, arrays, seeds)
    programs = _programs(net, config, augment, len(arrays[0]) // config.batch_size)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    history = _empty_history(config.epochs, len(seeds), has_test=len(arrays) == 4)
    about = {} if checkpoint_dir is None else _about(net, config, seeds, arrays)
    like = jax.eval_shape(programs.init, keys), history
    saved = None if checkpoint_dir is None else load_run(checkpoint_dir, like, about)
    start, (state, history) = saved or (0, (programs.init(keys), history))
    history = {name: np.array(rows) for name, rows in history.items()}
    run_epoch = _epoch_function(net, programs, config, arrays, seeds)
    for epoch in range(start, config.epochs):
        state, metrics = run_epoch(state, keys, epoch)
        for name, values in metrics.items():
            history[name][epoch] = values
        if checkpoint_dir is not None:
            save_run(checkpoint_dir, epoch + 1, (state, history), about)
        if progress is not None:
            progress(epoch, {name: rows[epoch] for name, rows in history.items()})
    return TrainResult(state.params, history)


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optax optimizer of a configuration, its schedule included."""
    rate = _schedule(config, config.epochs * steps_per_epoch)
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=_decayed)
    decay = optax.add_decayed_weights(config.weight_decay, _decayed)
    rule = optax.adam(rate) if config.optimizer == "adam" else optax.sgd(rate, momentum=config.momentum)
    return optax.chain(decay, rule)


def _decayed(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    rate, rest = config.learning_rate, max(steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
    }[config.schedule]
    if config.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


@functools.lru_cache(maxsize=16)
def _programs(net: Net, config: TrainConfig, augment: Augment | None, steps: int) -> _Programs:
    """The compiled functions; kept, so that training the same net again does not compile again."""
    optimizer = make_optimizer(config, steps)

    def init(key: Array) -> _State:
        params = net.init(jax.random.fold_in(key, 0))
        return _State(params, optimizer.init(params))

    advance = functools.partial(_advance, _step_function(net, optimizer, augment))
    score = functools.partial(_score, net.apply)
    return _Programs(
        jax.jit(jax.vmap(init)),
        jax.jit(advance, donate_argnums=0),
        jax.jit(score, static_argnames="count"),
    )


def _epoch_function(
    net: Net, programs: _Programs, config: TrainConfig, arrays: tuple[Array, ...], seeds: Sequence[int]
) -> Callable[[_State, Array, int], tuple[_State, dict[str, np.ndarray]]]:
    """One epoch of every seed with the test metrics after it, in as few compiled calls as is quick."""
    x, y, *test = arrays
    models, steps = len(seeds), len(x) // config.batch_size
    pieces = _pieces(net, arrays, models, steps)
    firsts = range(0, models, pieces.models)

    def epoch(state: _State, keys: Array, number: int) -> tuple[_State, dict[str, np.ndarray]]:
        order = np.stack([_shuffled(seed, number, len(x), config.batch_size) for seed in seeds])
        sums = np.zeros((2, models), np.float32)
        for first, begin in itertools.product(firsts, range(0, steps, pieces.steps)):
            some = slice(first, first + pieces.models)
            rows = order[some, begin : begin + pieces.steps]
            state, total = programs.advance(state, keys[some], first, number * steps + begin, rows, x, y)
            sums[:, some] += np.asarray(total)
        metrics = _named("", sums / steps)
        if test:
            tested = [programs.score(state.params, first, *test, count=pieces.models) for first in firsts]
            metrics |= _named("test_", np.concatenate(tested, axis=1))
        return state, metrics

    return epoch


def _pieces(net: Net, arrays: tuple[Array, ...], models: int, steps: int) -> _Pieces:
    """Everything in one call, but single steps of single models for convolutions on a CPU.

    There XLA is many times slower on gradients of convolutions inside a loop, and on convolutions with a batch of
    kernels, than on plain ones.
    """
    if jax.default_backend() == "cpu":
        params = jax.eval_shape(net.init, jax.random.key(0))
        if "conv_general_dilated" in str(jax.make_jaxpr(net.apply)(params, arrays[0][:1])):
            return _Pieces(1, 1)
    return _Pieces(models, steps)


def _shuffled(seed: int, epoch: int, examples: int, batch_size: int) -> Int[np.ndarray, "steps batch"]:
    """The rows of each batch of an epoch in random order."""
    steps = examples // batch_size
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _step_function(
    net: Net, optimizer: optax.GradientTransformation, augment: Augment | None
) -> Callable[..., tuple[_State, Array]]:
    def objective(params: PyTree, x: Array, y: Array) -> tuple[Array, tuple[Array, PyTree]]:
        logits, params = net.apply_train(params, x)
        loss = cross_entropy(logits, y)
        return loss, (jnp.stack([loss, accuracy(logits, y)]), params)

    def step(x: Array, y: Array, key: Array, state: _State, batch: tuple[Array, Array]) -> tuple[_State, Array]:
        rows, number = batch
        inputs = x[rows] if augment is None else augment(jax.random.fold_in(key, number), x[rows])
        gradient, (scores, params) = jax.grad(objective, has_aux=True)(state.params, inputs, y[rows])
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        return _State(optax.apply_updates(params, updates), moments), scores

    return step


def _advance(
    step: Callable[..., tuple[_State, Array]],
    state: _State,
    keys: Shaped[Array, " models"],
    first: Int[Array, ""],
    number: Int[Array, ""],
    rows: Int[Array, "models steps batch"],
    x: Array,
    y: Array,
) -> tuple[_State, Float[Array, "2 models"]]:
    """Steps from `number` on of the models from `first` on; also the sums of loss and accuracy over the steps."""
    count, steps = rows.shape[:2]
    numbers = number + jnp.arange(steps)

    def one(state: _State, key: Array, rows: Array) -> tuple[_State, Array]:
        run = functools.partial(step, x, y, jax.random.fold_in(key, 1))
        if steps == 1:  # a loop of one step would still be compiled as a loop
            return run(state, (rows[0], numbers[0]))
        state, scores = jax.lax.scan(run, state, (rows, numbers))
        return state, scores.sum(axis=0)

    some, scores = jax.vmap(one, out_axes=(0, 1))(_take(state, first, count), keys, rows)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
    return jax.tree.map(put, state, some), scores


def _score(
    apply: Callable[..., Array], params: PyTree, first: Int[Array, ""], x: Array, y: Array, *, count: int
) -> Float[Array, "2 models"]:
    return jnp.stack(jax.vmap(lambda params: evaluate(apply, params, x, y))(_take(params, first, count)))


def _named(prefix: str, scores: Float[np.ndarray, "2 models"]) -> dict[str, np.ndarray]:
    return {f"{prefix}loss": scores[0], f"{prefix}accuracy": scores[1]}


def _take(tree: PyTree, first: Int[Array, ""], count: int) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), tree)


# what goes in


def _empty_history(epochs: int, seeds: int, *, has_test: bool) -> dict[str, np.ndarray]:
    names = ("loss", "accuracy", "test_loss", "test_accuracy")[: 4 if has_test else 2]
    return {name: np.full((epochs, seeds), np.nan, np.float32) for name in names}


def _arrays(data: Dataset | Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(data, Dataset):
        return data.x_train, data.y_train, data.x_test, data.y_test
    return tuple(data)


def _check(config: TrainConfig, arrays: tuple[Array, ...], seeds: Sequence[int]) -> None:
    if not seeds or min(seeds) < 0:
        raise ValueError(f"The seeds are {list(seeds)}; give one per model, from 0 on, such as [0, 1].")
    if len(arrays) not in (2, 4):
        raise ValueError(f"Training takes (x, y) or (x, y, x_test, y_test), not {len(arrays)} arrays.")
    for x, y, what in zip(arrays[::2], arrays[1::2], ("training", "test"), strict=False):
        if len(x) != len(y):
            raise ValueError(f"There are {len(x)} {what} inputs but {len(y)} {what} labels; give one label each.")
    if not 0 < config.batch_size <= len(arrays[0]):
        message = f"The batch size is {config.batch_size}, but there are {len(arrays[0])} training examples; "
        raise ValueError(message + f"choose one in 1..{len(arrays[0])}.")


def _about(net: Net, config: TrainConfig, seeds: Sequence[int], arrays: Sequence[Array]) -> dict[str, Any]:
    """What makes two runs the same one, as JSON."""
    sums = [f"{array.shape} {zlib.crc32(np.asarray(array).tobytes()):08x}" for array in arrays]
    return {"net": repr(net.config), "training": repr(config), "seeds": list(seeds), "data": sums}
