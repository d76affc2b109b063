"""What every network of the zoo is: a configuration and four plain functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from permjax.nets.layers import MOMENTUM

Params = Any


class Net(NamedTuple):
    """A network as plain functions of its parameters.

    Attributes:
        config: the frozen dataclass from which the network was built.
        init: `init(key) -> params`.
        apply: `apply(params, x) -> outputs` in evaluation mode; returns logits and nothing else.
        apply_train: `apply_train(params, x) -> (outputs, params)`. With BatchNorm the outputs use the statistics
            of the batch and the returned parameters carry new running statistics; else they are unchanged.
        example_inputs: `example_inputs(batch) -> (x,)` of the right shape and dtype: noise in [0, 1), or tokens; always
            the same.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    apply_train: Callable[..., tuple[jax.Array, Params]]
    example_inputs: Callable[[int], tuple[jax.Array, ...]]


class Architecture(NamedTuple):
    """How the registry reads and builds one model type.

    Attributes:
        config: the configuration class.
        build: `build(config) -> Net`.
        ignored: foreign keys that change nothing in the mathematics and are skipped.
        fixed: foreign keys that do, with the values for which this implementation is right.
        translate: brings foreign spellings of a configuration to the field names.
    """

    config: type
    build: Callable[[Any], Net]
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = {}
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict


def stateless(config: Any, init: Callable, apply: Callable, example_inputs: Callable) -> Net:
    """A network whose training mode is its evaluation mode."""

    def apply_train(params: Params, x: jax.Array) -> tuple[jax.Array, Params]:
        return apply(params, x), params

    return Net(config, jax.jit(init), apply, apply_train, example_inputs)


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
