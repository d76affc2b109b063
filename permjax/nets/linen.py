"""Flax linen modules as networks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from permjax.nets.base import Net, Params, stateless
from permjax.nets.layers import MOMENTUM


def from_linen(config: Any, module: nn.Module, input_shape: tuple[int, ...], *, running: bool = False) -> Net:
    """A Flax linen module as a network; its variables are the parameters.

    Args:
        config: the configuration to keep.
        module: called as `module(x)`, or as `module(x, train=...)` where it is `running`.
        input_shape: the shape of one input.
        running: whether the module has running statistics (collection `batch_stats`).
    """

    def example_inputs(batch: int) -> tuple[jax.Array]:
        images = np.random.default_rng(0).random((batch, *input_shape), np.float32)
        return (jnp.asarray(images),)

    def init(key: jax.Array) -> Params:
        return module.init(key, *example_inputs(1))

    def apply(params: Params, x: jax.Array) -> jax.Array:
        return module.apply(params, x)  # pyright: ignore[reportReturnType]

    def apply_train(params: Params, x: jax.Array) -> tuple[jax.Array, Params]:
        outputs, updates = module.apply(params, x, train=True, mutable=["batch_stats"])
        return outputs, {**params, **updates}

    if running:
        return Net(config, jax.jit(init), apply, apply_train, example_inputs)
    return stateless(config, init, apply, example_inputs)


def batch_statistics(net: Net, params: Params, x: jax.Array) -> Params:
    """The parameters with BatchNorm's running statistics replaced by those of one batch alone.

    A training step makes `m old + (1 - m) batch` of them, so it is run from zero and divided by `1 - m`. Normalising
    with statistics of the batch, it does not depend on the old ones. Networks without statistics come back unchanged.
    """
    if "batch_stats" not in params:
        return params
    zero = {**params, "batch_stats": jax.tree.map(jnp.zeros_like, params["batch_stats"])}
    _, stepped = net.apply_train(zero, x)
    fresh = jax.tree.map(lambda a: a / (1 - MOMENTUM), stepped["batch_stats"])
    return {**params, "batch_stats": fresh}
