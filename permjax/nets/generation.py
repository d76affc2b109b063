"""Continuing prompts with a language model: greedy or from the likeliest tokens, with cached keys and values.

The cache is a hook: keys and values of the prompts are recorded, and later ones are put behind them. So a model needs
nothing for generation but its `apply` with `positions`, `visible` and `hook`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from permjax.nets.base import Net
from permjax.nets.language import CACHED, Weights
from permjax.permutation import is_traced

_Cache = dict[str, Array]


def generate(
    net: Net,
    params: Weights,
    tokens: Int[Array | np.ndarray, "batch t"],
    lengths: Int[Array | np.ndarray, " batch"],
    *,
    steps: int,
) -> Int[Array, "batch steps"]:
    """The likeliest next token, again and again. Compiled once per shape, model and number of steps.

    Args:
        net: a language model.
        params: its weights.
        tokens: prompts, padded on the right with any token.
        lengths: the number of tokens of each prompt, at least 1.
        steps: how many tokens to generate.

    Raises:
        ValueError: a length is not one of 1 to t, or the text becomes longer than the model has positions.

    Example:
        >>> generate(net, params, tokens, lengths, steps=5).shape
        (2, 5)
    """
    _check(net, tokens, lengths, steps)
    return _continued(net.apply, 1, steps, params, jnp.asarray(tokens), jnp.asarray(lengths), jax.random.key(0))


def sample(
    net: Net,
    params: Weights,
    tokens: Int[Array | np.ndarray, "batch t"],
    lengths: Int[Array | np.ndarray, " batch"],
    key: Array,
    *,
    steps: int,
    top: int = 5,
) -> Int[Array, "batch steps"]:
    """Tokens drawn from the likeliest ones by their probabilities; else as `generate`.

    Args:
        net: a language model.
        params: its weights.
        tokens: prompts, padded on the right with any token.
        lengths: the number of tokens of each prompt, at least 1.
        key: a random key.
        steps: how many tokens to generate.
        top: how many tokens are likely enough.
    """
    _check(net, tokens, lengths, steps)
    return _continued(net.apply, top, steps, params, jnp.asarray(tokens), jnp.asarray(lengths), key)


def _check(net: Net, tokens: Array | np.ndarray, lengths: Array | np.ndarray, steps: int) -> None:
    if is_traced(tokens, lengths):
        return
    shortest, longest = int(np.min(lengths)), int(np.max(lengths))
    if shortest < 1 or longest > tokens.shape[1]:
        message = f"The prompts have {shortest} to {longest} tokens in rows of {tokens.shape[1]}; "
        raise ValueError(message + "every prompt needs a token, and none can be longer than its row.")
    if longest + steps - 1 > net.config.positions:
        message = f"Prompts of {longest} tokens and {steps} steps need {longest + steps - 1} positions, but the model "
        raise ValueError(message + f"has {net.config.positions}; ask for fewer steps or shorten the prompts.")


@partial(jax.jit, static_argnames=("apply", "top", "steps"))
def _continued(
    apply: Callable[..., Array], top: int, steps: int, params: Weights, tokens: Array, lengths: Array, key: Array
) -> Int[Array, "batch steps"]:
    keys = jax.random.split(key, steps)
    cache, logits = _read(apply, params, tokens, steps - 1)
    first = _choose(keys[0], jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0], top)

    def step(state: tuple[_Cache, Array], at: tuple[Array, Array]) -> tuple[tuple[_Cache, Array], Array]:
        number, key = at
        cache, logits = _read_one(apply, params, state, lengths, tokens.shape[1], number)
        chosen = _choose(key, logits, top)
        return (cache, chosen), chosen

    _, rest = jax.lax.scan(step, (cache, first), (jnp.arange(steps - 1), keys[1:]))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _read(apply: Callable[..., Array], params: Weights, tokens: Array, room: int) -> tuple[_Cache, Array]:
    """The logits of the prompts, and their keys and values with room for so many more."""
    cache: _Cache = {}

    def keep(name: str, value: Array) -> Array:
        if name.endswith(CACHED):
            cache[name] = jnp.pad(value, [(0, 0), (0, room), *[(0, 0)] * (value.ndim - 2)])
        return value

    logits = apply(params, tokens, hook=keep)
    return cache, logits


def _read_one(
    apply: Callable[..., Array], params: Weights, state: tuple[_Cache, Array], lengths: Array, width: int, number: Array
) -> tuple[_Cache, Array]:
    """The logits after one more token, which goes to slot `width + number` of every row whatever its length."""
    cache, token = state
    grown: _Cache = {}

    def extend(name: str, value: Array) -> Array:
        if name.endswith(CACHED):
            grown[name] = value = jax.lax.dynamic_update_slice_in_dim(cache[name], value, width + number, axis=1)
        return value

    (slots,) = {values.shape[1] for values in cache.values()}
    slot = jnp.arange(slots)[None, :]
    visible = (slot < lengths[:, None]) | ((slot >= width) & (slot <= width + number))
    places = (lengths + number)[:, None]
    logits = apply(params, token[:, None], positions=places, visible=visible[:, None, :], hook=extend)
    return grown, logits[:, 0]


def _choose(key: Array, logits: Array, top: int) -> Int[Array, " batch"]:
    """A token of each row, drawn from the likeliest `top`."""
    if top == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    likely, tokens = jax.lax.top_k(logits, top)
    place = jax.random.categorical(key, likely)
    return jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
