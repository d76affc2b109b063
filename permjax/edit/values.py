"""The first half of an edit: the value that makes the model give the new answer, found by gradient descent.

The second half, from key and value to a change of the weight, is algebra; see `rome`, `memit` and `alphaedit`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from permjax.edit.places import MlpPlace, layer_count, mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.nets.base import Net
from permjax.nets.language import CACHED, Weights, record, widen

At = Literal["value", "block"]

_OBSERVED = 16  # edits that go through the model together where no gradient is asked for


@dataclass(frozen=True)
class ValueSettings:
    """How a value is searched; the defaults are those of ROME for GPT-2 XL.

    Attributes:
        steps: forward passes, one more than steps of Adam.
        learning_rate: of Adam.
        weight_decay: weight of the length of the change.
        clamp: the largest length of the change, relative to the value it starts from.
        kl: weight of the divergence from the model's own prediction after the subject's essence.
        stop: a loss at which the search ends.
        relative: measure learning rate and length in units of the value that the search starts from, so that one
            setting fits models of any scale. The papers take absolute steps and `weight_decay |delta| / |v0|^2`.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl: float = 0.0625
    stop: float = 0.05
    relative: bool = False

    def __post_init__(self) -> None:
        """Refuse a search of no step."""
        if self.steps < 1:
            raise ValueError(f"`steps` is {self.steps}, but a search needs at least 1.")


class Value(NamedTuple):
    """What was found for each edit, beside what the model had; row 0 is the bare prompt, the others are prefixed.

    Attributes:
        delta: what is to be added to the value at the subject's last token.
        start: the value there of the bare prompt, v0.
        keys: inputs of the MLP matrix at the subject's last token, by row.
        outputs: outputs of the MLP matrix there.
        losses: before each step; NaN after the last one.
    """

    delta: Float[Array | np.ndarray, "edits d"]
    start: Float[Array | np.ndarray, "edits d"]
    keys: Float[Array | np.ndarray, "edits rows m"]
    outputs: Float[Array | np.ndarray, "edits rows d"]
    losses: Float[Array | np.ndarray, "edits steps"]

    def one(self, index: int) -> "Value":
        """The value of one edit, its axis kept."""
        return jax.tree.map(lambda x: x[index : index + 1], self)


class Observation(NamedTuple):
    """What the model has at the subject's last token, by edit and row, at several places.

    Attributes:
        keys: inputs of the MLP matrix, one array for each place.
        block: the residual stream after the last place.
    """

    keys: tuple[Float[Array | np.ndarray, "edits rows m"], ...]
    block: Float[Array | np.ndarray, "edits rows d"]


def solve_values(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    place: MlpPlace,
    settings: ValueSettings,
    *,
    at: At = "value",
    chunk: int = 1,
) -> Value:
    """Search for each edit a change of one activation after which the model predicts the target.

    `min_delta mean_rows(-mean_y log P(y | x)) + kl KL(P_new || P_old) + decay |delta| / |v0|^2`, where delta is added
    at the subject's last token of every row and of the sentence about its essence, at whose subject the divergence is
    taken. After each step delta is projected onto `|delta| <= clamp |v0|`.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits of one shape.
        place: the MLP matrix whose keys are wanted, and where delta is added.
        settings: of the search.
        at: add delta to the output of the matrix (ROME) or of the whole block (MEMIT).
        chunk: how many edits are searched side by side; more than one pays on an accelerator only.

    Returns:
        A `Value`; every array has a first axis of edits.

    Source:
        Meng et al., Locating and Editing Factual Associations in GPT (2022), section 3.1; the reference code adds decay
        and projection.
    """
    check_edits(edits)
    numbers = {name: number for name, number in vars(settings).items() if name != "steps"}
    last = mlp_place(net.config, layer_count(net.config) - 1).block
    task = _Task(net.apply, place, at, last, settings.steps, *_room(edits))
    return _chunked(partial(_solve, task, numbers), params, edits, chunk)


def _room(edits: Sequence[PreparedEdit]) -> tuple[int, int]:
    """Positions from a subject to the end of its answer, and tokens of an answer; both at most, and rounded up.

    So edits that come one by one share few programs.
    """
    every = stacked(edits)
    answers = (every.targets >= 0).sum(axis=-1)
    ends = every.targets.shape[-1] - (every.targets[..., ::-1] >= 0).argmax(axis=-1)
    return _power((ends - every.subject).max(), 4), _power(answers.max(), 2)


def _power(count: Any, least: int) -> int:
    """The least power of two that holds so many."""
    return max(least, 1 << (int(count) - 1).bit_length())


def observe(net: Net, params: Weights, edits: Sequence[PreparedEdit], places: Sequence[MlpPlace]) -> Observation:
    """The keys of all places, and the residual stream after the last one, of the rows of all edits."""
    return _chunked(partial(_observe, net.apply, tuple(places)), params, edits, min(len(edits), _OBSERVED))


def _chunked(function: Callable[..., Any], params: Weights, edits: Sequence[PreparedEdit], chunk: int) -> Any:
    """`function(params, stack of chunk edits)` over all edits; the last chunk is filled up, so that shapes stay."""
    check_edits(edits)
    found = []
    for start in range(0, len(edits), chunk):
        group = [edits[min(i, len(edits) - 1)] for i in range(start, start + chunk)]
        found.append(jax.tree.map(np.asarray, function(params, stacked(group))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(edits)], *found)


def check_edits(edits: Sequence[PreparedEdit]) -> None:
    """Check that there are edits, all of one shape."""
    if not edits:
        raise ValueError("No edit was given; give at least one.")
    shapes = sorted({edit.tokens.shape for edit in edits})
    if len(shapes) > 1:
        message = f"The edits have rows of tokens of shapes {shapes[0]} and {shapes[1]}; "
        raise ValueError(message + "prepare all with the same prefixes and the same `pad_to`.")


def stacked(edits: Sequence[PreparedEdit]) -> PreparedEdit:
    """Prepared edits of one shape as one, with a first axis of edits."""
    return jax.tree.map(lambda *parts: np.stack(parts), *edits)


@partial(jax.jit, static_argnums=(0, 1))
def _observe(apply: Callable, places: tuple[MlpPlace, ...], params: Weights, edits: PreparedEdit) -> Observation:
    names = tuple(place.key for place in places)

    def one(tokens: Array, subject: Array) -> Observation:
        _, seen = record(apply, params, tokens, (*names, places[-1].block))
        keys = tuple(_at_subject(seen[name], subject) for name in names)
        return Observation(keys, _at_subject(seen[places[-1].block], subject))

    return jax.vmap(one)(jnp.asarray(edits.tokens), jnp.asarray(edits.subject))


class _Task(NamedTuple):
    """What of a search has to be known when it is compiled.

    Attributes:
        apply: of the network.
        place: the MLP matrix.
        at: where delta is added.
        last: the residual stream after the last block.
        steps: forward passes.
        reach: positions that are computed, from the subject on.
        answers: room for the tokens of a target.
    """

    apply: Callable
    place: MlpPlace
    at: At
    last: str
    steps: int
    reach: int
    answers: int


@partial(jax.jit, static_argnums=0)
def _solve(task: _Task, numbers: dict[str, Any], params: Weights, edits: PreparedEdit) -> Value:
    """The searches for a stack of edits; `numbers` are the other settings, which need no new compilation."""
    return jax.vmap(partial(_search, task, numbers, params))(edits)


class _Search(NamedTuple):
    """The state of a search; `done` freezes it."""

    delta: Float[Array, " d"]
    adam: Any
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    done: Array


def _search(task: _Task, numbers: dict[str, Any], params: Weights, edit: PreparedEdit) -> Value:
    """The search for one edit as a loop of fixed shape, which computes only what depends on delta."""
    place, name = task.place, task.place.value if task.at == "value" else task.place.block
    tokens = jnp.concatenate([edit.tokens, edit.kl_tokens[None]])
    rows = jnp.asarray(edit.subject)
    subject = jnp.append(rows, edit.kl_subject)
    _, seen = record(task.apply, params, tokens)
    start = widen(seen[name][0, edit.subject[0]])
    length = jnp.linalg.norm(start)
    unit = jnp.where(numbers["relative"], length / np.sqrt(start.size), 1.0)
    whole = jnp.where(numbers["relative"], length, length**2)
    adam = optax.adam(numbers["learning_rate"])
    asked, targets = _answers(edit, task.answers)
    logits = _resumed(task, params, tokens, subject, asked, seen)
    zero = jnp.zeros_like(start)
    before = jax.nn.log_softmax(logits(zero)[-1, 0])

    def loss(delta: Array) -> Array:
        found = logits(delta)
        after = jax.nn.log_softmax(found[-1, 0])
        divergence = jnp.sum(jnp.exp(after) * (after - before))
        decay = optax.safe_norm(delta, 0.0) / whole
        nll = target_nll(found[:-1], targets).mean()
        return nll + numbers["kl"] * divergence + numbers["weight_decay"] * decay

    def step(state: _Search) -> _Search:
        value, slope = jax.value_and_grad(loss)(state.delta)
        done = (value < numbers["stop"]) | (state.step + 1 >= task.steps)
        updates, moments = adam.update(slope * unit, state.adam)
        delta = _clamped(state.delta + unit * jnp.asarray(updates), numbers["clamp"] * length)
        losses = state.losses.at[state.step].set(value)
        return _Search(jnp.where(done, state.delta, delta), moments, state.step + 1, losses, done)

    empty = jnp.full(task.steps, jnp.nan, start.dtype)
    found = jax.lax.while_loop(
        lambda state: ~state.done, step, _Search(zero, adam.init(zero), jnp.int32(0), empty, jnp.bool_(False))
    )
    keys, outputs = (widen(_at_subject(seen[x][:-1], rows)) for x in (place.key, place.value))
    return Value(found.delta, start, keys, outputs, found.losses)


def _answers(edit: PreparedEdit, most: int) -> tuple[Int[Array, "every k"], Int[Array, "rows k"]]:
    """Where predictions are asked for, counted from the subject, with the targets; in the last row the subject itself.

    Rows with fewer tokens in their target have any other positions behind it, with target -1.
    """
    places = jnp.argsort(jnp.asarray(edit.targets) < 0, axis=-1, stable=True)[:, :most]
    targets = jnp.take_along_axis(jnp.asarray(edit.targets), places, axis=-1)
    behind = jnp.maximum(places - jnp.asarray(edit.subject)[:, None], 0)
    return jnp.concatenate([behind, jnp.zeros_like(behind[:1])]), targets


def _resumed(
    task: _Task,
    params: Weights,
    tokens: Int[Array, "rows t"],
    subject: Int[Array, " rows"],
    asked: Int[Array, "rows k"],
    seen: dict[str, Array],
) -> Callable[[Array], Float[Array, "rows k vocabulary"]]:
    """The logits at the positions asked for, of delta; all that delta cannot change is taken from `seen`.

    Only positions from the subject on are computed, up to `task.reach`: those before are in the cached keys and values.
    The stream after the edited block is `seen` plus delta, so the blocks before it are dropped in compilation.
    """
    ahead = jnp.arange(task.reach)
    # places behind the end are the last one again, which none before them sees
    places = jnp.minimum(subject[:, None] + ahead[None], tokens.shape[1] - 1)
    stream = jnp.take_along_axis(seen[task.place.block], places[..., None], axis=1)
    past = jnp.arange(tokens.shape[1])[None, None] < subject[:, None, None]
    shape = (len(tokens), task.reach)
    visible = jnp.concatenate(
        [
            jnp.broadcast_to(past, (*shape, tokens.shape[1])),
            jnp.broadcast_to(ahead[None, None, :] <= ahead[None, :, None], (*shape, task.reach)),
        ],
        axis=-1,
    )

    def logits(delta: Array) -> Array:
        changed = stream.at[:, 0].add(delta.astype(stream.dtype)[None])

        def hook(name: str, x: Array) -> Array:
            if name.endswith(CACHED):
                return jnp.concatenate([seen[name], x], axis=1)
            x = changed if name == task.place.block else x
            return jnp.take_along_axis(x, asked[..., None], axis=1) if name == task.last else x

        rest = jnp.take_along_axis(tokens, places, axis=1)
        return widen(task.apply(params, rest, positions=places, visible=visible, hook=hook))

    return logits


def _clamped(x: Float[Array, " d"], most: Float[Array, ""]) -> Float[Array, " d"]:
    length = jnp.linalg.norm(x)
    return jnp.where(length > most, x * (most / jnp.where(length > 0, length, 1)), x)


def _at_subject(x: Float[Array, "rows t width"], subject: Int[Array, " rows"]) -> Float[Array, "rows width"]:
    return x[jnp.arange(len(subject)), subject]


def target_nll(logits: Float[Array, "rows t vocab"], targets: Int[Array, "rows t"]) -> Float[Array, " rows"]:
    """The mean of `-log P` over the tokens of each row's target; positions of target -1 do not count."""
    asked = targets >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(asked, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(asked, chosen, 0.0), axis=-1) / asked.sum(axis=-1)
