"""Constrained fine-tuning of one MLP matrix, the baseline of the editing papers (Zhu et al., 2020)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from permjax.edit.base import Cache, EditResult, Statistics
from permjax.edit.covariance import Covariance
from permjax.edit.delta import Dense
from permjax.edit.places import mlp_place
from permjax.edit.prepare import PreparedEdit
from permjax.edit.values import Value, check_edits, target_nll
from permjax.nets.base import Net
from permjax.nets.language import Weights, widen

Scored: TypeAlias = Literal["last", "shifted"]


class FineTuneInfo(NamedTuple):
    """What is known before the weight is changed.

    Attributes:
        losses: before each step; NaN after the last one.
        norm: `|dW|`.
        energy: `sqrt(tr(dW C dW^T) / tr(W C W^T))`; see `Statistics.energy`.
    """

    losses: Float[np.ndarray, " steps"]
    norm: float
    energy: float


@dataclass(frozen=True)
class FtL:
    """Hyper-parameters of `ft_l`; the limit fits GPT-2 XL."""

    layer: int
    learning_rate: float = 5e-4
    steps: int = 25
    stop: float = 1e-2
    limit: float | None = 5e-4
    scored: Scored = "last"
    relative: bool = False

    def solve(self, net: Net, params: Weights, edits: Sequence[PreparedEdit], *, chunk: int = 1) -> None:
        """Return None: there are no values to be searched."""
        del net, params, edits, chunk

    def __call__(
        self,
        net: Net,
        params: Weights,
        edits: Sequence[PreparedEdit],
        *,
        covariances: Mapping[int, Covariance] | Statistics | None = None,
        cache: Cache | None = None,
        values: Value | None = None,
    ) -> EditResult:
        """Return the delta of `ft_l`; it remembers nothing, so a cache passes through."""
        del values
        return ft_l(net, params, edits, covariances=covariances, **vars(self))._replace(cache=cache)


def ft_l(
    net: Net,
    params: Weights,
    edits: Sequence[PreparedEdit],
    *,
    layer: int,
    learning_rate: float = 5e-4,
    steps: int = 25,
    stop: float = 1e-2,
    limit: float | None = 5e-4,
    scored: Scored = "last",
    relative: bool = False,
    covariances: Mapping[int, Covariance] | Statistics | None = None,
) -> EditResult:
    """Fine-tune one MLP matrix on all facts together, by Adam, with every element kept near where it was.

    Args:
        net: a GPT-2 or Llama network.
        params: its weights.
        edits: prepared edits; only their bare prompts are trained on.
        layer: of the MLP.
        learning_rate: of Adam.
        steps: at most so many steps.
        stop: a loss below which there is no further step.
        limit: how far an element may move; None for as far as it likes.
        scored: `"last"` asks for all tokens of the target at the last position of the prompt, as published;
            `"shifted"` for each after the one before it (FT-M).
        relative: measure `learning_rate` and `limit` in units of the root mean square of the matrix.
        covariances: only for the energy in the result; see `rome`.

    Returns:
        An `EditResult` with a dense delta and a `FineTuneInfo`.

    Raises:
        ValueError: no such layer, or covariances of other parameters.

    Source:
        Zhu et al., Modifying Memories in Transformer Models (2020), as Meng et al. (2022) run it.
    """
    limit = np.inf if limit is None else limit
    numbers = {"learning_rate": learning_rate, "stop": stop, "limit": limit, "relative": relative}
    check_edits(edits)
    place = mlp_place(net.config, layer)
    statistics = Statistics.of(net, params, covariances)
    tokens, targets = np.stack([e.tokens[0] for e in edits]), np.stack([e.targets[0] for e in edits])
    weight, losses = _fit(net.apply, place.weight, steps, scored, numbers, params, tokens, targets)
    change = Dense(np.asarray(weight) - np.asarray(params[place.weight], np.float32))
    info = FineTuneInfo(np.asarray(losses), float(np.linalg.norm(change.value)), statistics.energy(layer, change))
    return EditResult({place.weight: change}, info)


class _Fit(NamedTuple):
    weight: Float[Array, "rows columns"]
    adam: Any
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    done: Array


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _fit(
    apply: Callable,
    name: str,
    steps: int,
    scored: Scored,
    numbers: dict[str, Any],
    params: Weights,
    tokens: Array,
    targets: Array,
) -> tuple[Array, Array]:
    """The matrix after the last step, and the losses."""
    start = widen(params[name])
    unit = jnp.where(numbers["relative"], jnp.sqrt(jnp.square(start).mean()), 1.0)
    limit = numbers["limit"] * unit
    adam = optax.adam(numbers["learning_rate"])
    nll = last_nll if scored == "last" else target_nll

    def loss(weight: Array) -> Array:
        return nll(widen(apply({**params, name: weight.astype(params[name].dtype)}, tokens)), targets).mean()

    def step(state: _Fit) -> _Fit:
        value, slope = jax.value_and_grad(loss)(state.weight)
        enough = value < numbers["stop"]
        updates, moments = adam.update(slope, state.adam)
        weight = jnp.clip(state.weight + unit * jnp.asarray(updates), start - limit, start + limit)
        losses = state.losses.at[state.step].set(value)
        done = enough | (state.step + 1 >= steps)
        return _Fit(jnp.where(enough, state.weight, weight), moments, state.step + 1, losses, done)

    empty = jnp.full(steps, jnp.nan, start.dtype)
    state = _Fit(start, adam.init(start), jnp.int32(0), empty, jnp.bool_(False))
    found = jax.lax.while_loop(lambda state: ~state.done, step, state)
    return found.weight, found.losses


def last_nll(logits: Float[Array, "rows t vocab"], targets: Int[Array, "rows t"]) -> Float[Array, " rows"]:
    """The mean of `-log P` over the tokens of each row's target, all at the position that predicts the first."""
    first = jnp.argmax(targets >= 0, axis=-1)
    here = jnp.take_along_axis(logits, first[:, None, None], axis=1)
    return target_nll(jnp.broadcast_to(here, (*targets.shape, logits.shape[-1])), targets)
