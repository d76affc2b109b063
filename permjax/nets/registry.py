"""From a configuration to a network, by model type."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from permjax.config import ConfigError, from_dict
from permjax.nets import gpt, llama, mlp, resnet, vgg, vit
from permjax.nets.base import Architecture, Net
from permjax.tree import nearest

__all__ = ["ARCHITECTURES", "ConfigError", "Net", "build", "config_from_dict", "config_to_dict"]

ARCHITECTURES: Mapping[str, Architecture] = {
    module.ARCHITECTURE.config.model_type: module.ARCHITECTURE for module in (mlp, vgg, resnet, vit, gpt, llama)
}


@functools.cache
def build(config: Any) -> Net:
    """The network of a configuration; equal configurations give the very same functions, so jit caches hold.

    Example:
        >>> net = build(config_from_dict({"model_type": "mlp", "hidden": [32, 16]}))
        >>> net.apply(net.init(jax.random.key(0)), *net.example_inputs(2)).shape
        (2, 10)
    """
    return ARCHITECTURES[config.model_type].build(config)


def config_from_dict(values: Mapping[str, Any]) -> Any:
    """The configuration that a dictionary describes, Hugging Face's `config.json` of a known type included.

    Args:
        values: `model_type` and the fields of that type's configuration. Keys of Hugging Face configurations that
            do not touch the mathematics are skipped.

    Raises:
        ConfigError: an unknown model type or key (the nearest valid one is named), a wrong type, or a key whose
            value asks for mathematics that the network here does not have.
    """
    architecture, where = _architecture(values)
    values = architecture.translate({key: value for key, value in values.items() if key != "model_type"})
    for key, allowed in architecture.fixed.items():
        if key in values and values[key] not in allowed:
            right = " or ".join(repr(value) for value in allowed)
            raise ConfigError(f"{where}: {key!r} is {values[key]!r}, but only {right} is supported.")
    foreign = architecture.ignored | architecture.fixed.keys()
    own = {key: value for key, value in values.items() if key not in foreign}
    return from_dict(architecture.config, own, where=where)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The dictionary that `config_from_dict` reads back, with lists for tuples as JSON and TOML have them."""
    values = dataclasses.asdict(config)
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"model_type": config.model_type, **lists}


def _architecture(values: Mapping[str, Any]) -> tuple[Architecture, str]:
    if "model_type" not in values:
        raise ConfigError(f"The model configuration names no 'model_type'; known are {', '.join(ARCHITECTURES)}.")
    name = values["model_type"]
    if name not in ARCHITECTURES:
        known = f"{nearest(str(name), ARCHITECTURES)}; known are {', '.join(ARCHITECTURES)}."
        raise ConfigError(f"The model type {name!r} is unknown{known}")
    return ARCHITECTURES[name], f"The {name} configuration"
