"""Adapters in files, opened without reading their tensors."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from permjax import tree
from permjax.io.lazy import Checkpoint, LazyArray
from permjax.lora.keys import PREFIX, AdapterError, ModuleInfo, Parts, info_of, modules_of, one_line
from permjax.lora.peft_config import check_config, scale_of
from permjax.lora.pool import Factors

METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, eq=False, repr=False)
class AdapterFiles(Mapping[str, ModuleInfo]):
    """An adapter in files: module path -> `ModuleInfo`; made by `open_adapter`.

    Attributes:
        path: what was opened: the folder of a PEFT adapter, or a file.
        style: "peft", "kohya" or "diffusers".
        config: that of PEFT; empty for the other styles.
        metadata: the text in the header of the file.
        prefix: what stands before the module paths in the keys of the file.
        frozen: copies of embeddings of the base model, which PEFT puts beside their factors, by key without prefix.
    """

    path: Path
    style: str
    config: dict[str, Any]
    metadata: dict[str, str]
    prefix: str
    frozen: dict[str, LazyArray]
    _modules: dict[str, tuple[ModuleInfo, Parts]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ModuleInfo:
        return self._modules[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        return f"AdapterFiles({str(self.path)!r}, style={self.style!r}, modules={len(self)})"

    def read(self, name: str) -> Factors:
        """Read a module: `a [rank, in]` and `b [out, rank]` in float32, `sqrt(|scale|)` in each, its sign in b.

        Raises:
            AdapterError: there is no such module, or it has values that are not finite.
        """
        if name not in self:
            raise AdapterError(f"{self.path} has no module {name!r}{tree.nearest(name, self)}; check the name.")
        info, parts = self._modules[name]
        root = math.sqrt(abs(info.scale))
        a, b = (_finite(x) for x in parts[:2])
        signed = math.copysign(root, info.scale)
        rows, columns = a.reshape(info.rank, -1), b.reshape(-1, info.rank)
        return Factors(rows * np.float32(root), columns * np.float32(signed))

    def factors(self, names: Iterable[str] | None = None) -> dict[str, Factors]:
        """Read modules, all by default."""
        return {name: self.read(name) for name in (self if names is None else names)}

    def file_name(self, name: str) -> str:
        """The name of a module in the keys of the file, which differs from its own after `renamed`."""
        key = self._modules[name][1].a.name
        return key.rpartition(".lora_")[0].removeprefix(PREFIX)

    def renamed(self, names: Mapping[str, str]) -> "AdapterFiles":
        """The same adapter with other names for some modules."""
        return replace(self, _modules={names.get(name, name): found for name, found in self._modules.items()})


def read_peft(path: Path, checkpoint: Checkpoint, file: Path, force: bool) -> AdapterFiles:
    """The adapter of a PEFT folder with its configuration file."""
    config = read_json(file.read_text(encoding="utf-8", errors="replace"), file)
    check_config(config, file, force)
    return _read(path, checkpoint, "peft", config, lambda name, parts: _config_scale(config, name, parts, file))


def read_single(path: Path, checkpoint: Checkpoint, force: bool) -> AdapterFiles:
    """The adapter of one file: the scale is alpha / rank, and 1 without alpha, unless the header has configurations."""
    configs = _configs(checkpoint.metadata, path)
    style = "kohya" if any(key.endswith(".lora_down.weight") for key in checkpoint) else "diffusers"
    checked: set[str] = set()

    def scale(name: str, parts: Parts) -> float:
        component, config, inner = config_for(configs, name)
        if config is None:
            return _alpha_scale(name, parts)
        if component not in checked:
            check_config({"peft_type": "LORA"} | config, f"{path} ({METADATA})", force)
            checked.add(component)
        return _config_scale(config, inner, parts, f"{path} ({METADATA})")

    found = _read(path, checkpoint, style, {}, scale)
    if found.prefix and not configs and not any(parts.alpha for _, parts in found._modules.values()):
        message = f"{path} has keys of PEFT but no scale; put the adapter_config.json of the adapter beside it."
        raise AdapterError(message)
    return found


def configs_of(adapter: AdapterFiles) -> dict[str, Any]:
    """The configurations of diffusers in the header of an adapter's file, or nothing."""
    return _configs(adapter.metadata, adapter.path)


def config_for(configs: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any] | None, str]:
    """The component of a module, its configuration in the header of a file, and the path of the module within it."""
    component, _, inner = name.partition(".")
    prefix = f"{component}."
    own = {key.removeprefix(prefix): value for key, value in configs.items() if key.startswith(prefix)}
    if own:
        return component, own, inner
    plain = {key: value for key, value in configs.items() if "." not in key}
    return "", plain or None, name


def read_json(text: str, where: Any) -> dict[str, Any]:
    """The JSON object of a text.

    Raises:
        AdapterError: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is no readable JSON ({error}); copy the adapter again.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{where} holds a JSON {type(found).__name__} where an object is needed.")
    return found


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    text = metadata.get(METADATA)
    return {} if text is None else read_json(text, f"{path} ({METADATA})")


def _read(
    path: Path, checkpoint: Checkpoint, style: str, config: dict[str, Any], scale: Callable[[str, Parts], float]
) -> AdapterFiles:
    parts, frozen = modules_of(checkpoint)
    if not parts:
        raise AdapterError(f"{checkpoint.path} has no tensors of an adapter; give a file with LoRA factors.")
    prefix = PREFIX if all(key.startswith(PREFIX) for key in checkpoint) else ""
    modules = {name: (_described(name, one, scale), one) for name, one in parts.items()}
    return AdapterFiles(path, style, config, checkpoint.metadata, prefix, frozen, modules)


def _described(name: str, parts: Parts, scale: Callable[[str, Parts], float]) -> ModuleInfo:
    unscaled = info_of(name, parts, 1.0)  # first, so that wrong shapes are not reported as wrong ranks
    return replace(unscaled, scale=scale(name, parts))


def _config_scale(config: dict[str, Any], name: str, parts: Parts, where: Any) -> float:
    if parts.alpha is not None:
        message = f"{where}: module {name!r} has an alpha here and one in the tensor {parts.alpha.name!r}; remove one."
        raise AdapterError(message)
    return scale_of(config, name, parts.a.shape[0], where)


def _alpha_scale(name: str, parts: Parts) -> float:
    if parts.alpha is None:
        return 1.0
    value = np.asarray(parts.alpha).astype(np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        message = f"{parts.alpha.file}: the alpha of module {name!r} is {value.tolist()} where one number is needed."
        raise AdapterError(message)
    return value.item() / parts.a.shape[0]


def _finite(tensor: LazyArray) -> np.ndarray:
    with one_line(), np.errstate(over="ignore"):
        values = tensor.read().astype(np.float32)
    if not np.isfinite(values).all():
        message = (
            f"{tensor.file}: tensor {tensor.name!r} has values that are not finite in float32; train or save it again."
        )
        raise AdapterError(message)
    return values
