"""What every network of the zoo is: a configuration and four plain functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

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
