"""Which editor `permjax edit` takes: as in its paper for models of its sizes, else relative to the model's own."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from permjax.config import from_dict, to_dict
from permjax.edit.alphaedit import AlphaEdit
from permjax.edit.base import Editor
from permjax.edit.finetune import FtL
from permjax.edit.memit import Memit
from permjax.edit.places import mlp_place
from permjax.edit.presets import PRESETS, preset, scale_free
from permjax.edit.rome import Rome
from permjax.experiments.architectures import FilesError
from permjax.experiments.edit_options import EditOptions
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig

FALLBACKS = ("rome", "c_rome", "memit")
"""What is tried after one of these is refused by a guard: those behind it."""

_GPT2 = {(1024, 24): "gpt2-medium", (1280, 36): "gpt2-large", (1600, 48): "gpt2-xl"}
_LLAMA = {(4096, 11008, 32): "llama2-7b", (4096, 14336, 32): "llama3-8b"}


def editors_of(options: EditOptions, config: Any) -> dict[str, Editor]:
    """The editor that was asked for and, under a guard, those after it, in the order in which they are tried.

    Args:
        options: see `EditOptions`; its settings are for the first editor only, its layer for all.
        config: a `GPT2Config` or `LlamaConfig`.

    Raises:
        ValueError: the model has no such layer or cannot be edited, or a setting is none of the editor's.
    """
    chained = options.guard and options.fallback and options.method in FALLBACKS
    names = FALLBACKS[FALLBACKS.index(options.method) :] if chained else (options.method,)
    found: dict[str, Any] = {name: editor_of(name, config, layer=options.layer, ridge=options.ridge) for name in names}
    return found | {options.method: _with_settings(found[options.method], options)}


def published(config: Any) -> str | None:
    """The model of a paper that has these sizes, if any."""
    match config:
        case GPT2Config():
            return _GPT2.get((config.n_embd, config.n_layer))
        case LlamaConfig():
            return _LLAMA.get((config.hidden_size, config.intermediate_size, config.num_hidden_layers))
    return None


def layers_of(editors: Mapping[str, Editor]) -> tuple[int, ...]:
    """All layers that some editors write to, ascending."""
    return tuple(sorted({layer for editor in editors.values() for layer in _layers(editor)}))


def _layers(editor: Any) -> tuple[int, ...]:
    return editor.layers if isinstance(editor, Memit | AlphaEdit) else (editor.layer,)


def editor_of(name: str, config: Any, *, layer: int | None, ridge: float) -> Any:
    """One editor with the settings of its paper, or relative ones.

    Args:
        name: of the editor.
        config: a `GPT2Config` or `LlamaConfig`.
        layer: where it writes, or the last of its layers; that of the settings for None.
        ridge: of those that have one.

    Raises:
        ValueError: the model has no such layer or cannot be edited, or there is no such editor.
    """
    model = published(config)
    editor: Any = preset(name, model) if model and model in PRESETS.get(name, ()) else scale_free(name, config)
    if layer is not None:
        mlp_place(config, layer)  # refuses a layer that is not there
        editor = _moved(editor, layer)
    return replace(editor, ridge=ridge) if isinstance(editor, Rome | Memit) else editor


def _moved(editor: Any, layer: int) -> Any:
    """The same editor at another layer, or with it as the last of as many, as far as there are."""
    if isinstance(editor, Rome | FtL):
        return replace(editor, layer=layer)
    return replace(editor, layers=tuple(range(max(0, layer + 1 - len(editor.layers)), layer + 1)))


def _with_settings(editor: Any, options: EditOptions) -> Any:
    values = to_dict(editor)
    for text in options.settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals and value):
            raise FilesError(f"--set {text} is no setting; write key=value, such as value.clamp=2.")
        *sections, last = key.split(".")
        table = values
        for section in sections:
            table = table.get(section)
            if not isinstance(table, dict):
                message = f"--set {text}: {options.method} has no settings under {section!r}; "
                raise FilesError(f"{message}known are {', '.join(to_dict(editor))}.")
        table[last] = _value(value)
    return from_dict(type(editor), values, where=f"--set for {options.method}")


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
