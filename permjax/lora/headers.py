"""What the headers of single-file adapters say: sizes for kohya's scripts, configurations for diffusers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from permjax.lora.adapter_files import METADATA, AdapterFiles, config_for, configs_of
from permjax.lora.kohya import COMPONENT
from permjax.lora.peft_config import written_config

_KOHYA_BASE = ("modelspec.architecture", "ss_base_model_version", "ss_v2")  # what is said about the base model


def header(ranks: Mapping[str, int], like: Sequence[AdapterFiles], style: str) -> dict[str, str]:
    """The text for the header of an adapter whose scales are 1.

    kohya's scripts read the ranks of all modules from the tensors alpha; diffusers needs configurations where the ranks
    differ, and keeps them where the adapters had some.
    """
    if style == "peft":
        return {}
    if style == "kohya":
        return _kohya_header(ranks, like)
    known = [configs_of(one) for one in like]
    if not any(known) and len(set(ranks.values())) == 1:
        return {}
    return {METADATA: json.dumps(_configs(ranks, list(zip(like, known, strict=True))))}


def _kohya_header(ranks: Mapping[str, int], like: Sequence[AdapterFiles]) -> dict[str, str]:
    first = next((one.metadata for one in like if one.style == "kohya"), {})
    size = str(max(ranks.values())) if len(set(ranks.values())) == 1 else "Dynamic"
    sizes = {"ss_network_module": "networks.lora", "ss_network_dim": size, "ss_network_alpha": size}
    return {key: first[key] for key in _KOHYA_BASE if key in first} | sizes


def _configs(ranks: Mapping[str, int], known: Sequence[tuple[AdapterFiles, dict[str, Any]]]) -> dict[str, Any]:
    """The configurations of all components, `unet.r` and so on."""
    written: dict[str, Any] = {}
    places = {name: _place(name, [configs for _, configs in known]) for name in ranks}
    for component in dict.fromkeys(component for component, _ in places.values()):
        inner = {path: ranks[name] for name, (part, path) in places.items() if part == component}
        before = [_component(component, one, configs) for one, configs in known]
        base = next((config for _, config in before if config), {})
        config = written_config(base, inner, before)
        written |= {f"{component}.{key}" if component else key: value for key, value in config.items()}
    return written


def _place(name: str, known: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The component of a module and its path within it: as in the adapters, or by the usual names of components."""
    for configs in known:
        component, config, inner = config_for(configs, name)
        if config is not None:
            return component, inner
    found = COMPONENT.match(name)
    return (found[1], name[found.end() :]) if found else ("", name)


def _component(component: str, one: AdapterFiles, configs: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The paths within a component of the modules of an adapter, and its configuration."""
    prefix = f"{component}." if component else ""
    inner = [name.removeprefix(prefix) for name in one if name.startswith(prefix)]
    own = {key.removeprefix(prefix): value for key, value in configs.items() if key.startswith(prefix)}
    return inner, own if component else {key: value for key, value in own.items() if "." not in key}
