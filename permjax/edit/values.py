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

from permjax.edit.places import MlpPlace
from permjax.edit.prepare import PreparedEdit
from permjax.nets.base import Net
from permjax.nets.language import Weights, record, widen

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
    numbers = {name: number for name, number in vars(settings).items() if name != "steps"}
    search = partial(_solve, net.apply, place, at, settings.steps, numbers)
    return _chunked(search, params, edits, chunk)


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


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solve(
    apply: Callable, place: MlpPlace, at: At, steps: int, numbers: dict[str, Any], params: Weights, edits: PreparedEdit
) -> Value:
    """The searches for a stack of edits; `numbers` are the other settings, which need no new compilation."""
    return jax.vmap(partial(_search, apply, place, at, steps, numbers, params))(edits)


class _Search(NamedTuple):
    """The state of a search; `done` freezes it."""

    delta: Float[Array, " d"]
    adam: Any
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    done: Array


def _search(
    apply: Callable, place: MlpPlace, at: At, steps: int, numbers: dict[str, Any], params: Weights, edit: PreparedEdit
) -> Value:
    """The search for one edit as a loop of fixed shape."""
    name = place.value if at == "value" else place.block
    targets, rows = jnp.asarray(edit.targets), jnp.asarray(edit.subject)
    tokens = jnp.concatenate([edit.tokens, edit.kl_tokens[None]])
    subject = jnp.append(rows, edit.kl_subject)
    logits, seen = record(apply, params, tokens, (place.key, place.value, name))
    before = jax.nn.log_softmax(widen(logits[-1, edit.kl_subject]))
    start = widen(seen[name][0, edit.subject[0]])
    length = jnp.linalg.norm(start)
    unit = jnp.where(numbers["relative"], length / np.sqrt(start.size), 1.0)
    whole = jnp.where(numbers["relative"], length, length**2)
    adam = optax.adam(numbers["learning_rate"])

    def loss(delta: Array) -> Array:
        logits = widen(apply(params, tokens, hook=_adding(name, subject, delta)))
        after = jax.nn.log_softmax(logits[-1, edit.kl_subject])
        divergence = jnp.sum(jnp.exp(after) * (after - before))
        decay = optax.safe_norm(delta, 0.0) / whole
        nll = target_nll(logits[:-1], targets).mean()
        return nll + numbers["kl"] * divergence + numbers["weight_decay"] * decay

    def step(state: _Search) -> _Search:
        value, slope = jax.value_and_grad(loss)(state.delta)
        done = (value < numbers["stop"]) | (state.step + 1 >= steps)
        updates, moments = adam.update(slope * unit, state.adam)
        delta = _clamped(state.delta + unit * jnp.asarray(updates), numbers["clamp"] * length)
        losses = state.losses.at[state.step].set(value)
        return _Search(jnp.where(done, state.delta, delta), moments, state.step + 1, losses, done)

    empty = jnp.full(steps, jnp.nan, start.dtype)
    zero = jnp.zeros_like(start)
    found = jax.lax.while_loop(
        lambda state: ~state.done, step, _Search(zero, adam.init(zero), jnp.int32(0), empty, jnp.bool_(False))
    )
    keys, outputs = (widen(_at_subject(seen[x][:-1], rows)) for x in (place.key, place.value))
    return Value(found.delta, start, keys, outputs, found.losses)


def _adding(name: str, subject: Array, delta: Array) -> Callable[[str, Array], Array]:
    """A hook that adds delta to one activation, at the subject of each row."""

    def hook(at: str, x: Array) -> Array:
        if at != name:
            return x
        return x.at[jnp.arange(len(subject)), subject].add(delta.astype(x.dtype)[None])

    return hook


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
