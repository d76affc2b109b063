"""Hyper-parameters of the papers by model, and settings without a scale for models that no paper has.

Layers count from 0. What a paper says of the prompts is in `PREFIXES`: how many prefixes of how many tokens stand
before the prompt in the rows after the first.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from permjax.edit.alphaedit import AlphaEdit
from permjax.edit.base import Editor
from permjax.edit.finetune import FtL
from permjax.edit.memit import Memit
from permjax.edit.places import layer_count
from permjax.edit.rome import CRome, Rome
from permjax.edit.values import ValueSettings
from permjax.tree import nearest

PREFIXES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "rome": ((5, 10), (10, 10)),
    "c_rome": ((5, 10), (10, 10)),
    "memit": ((10, 5),),
    "alphaedit": ((10, 5),),
    "ft_l": (),
}
"""Editor -> pairs (length, count)."""

_LLAMA_2 = ValueSettings(steps=25, weight_decay=1e-3)
_LLAMA_3 = ValueSettings(steps=25, learning_rate=0.1, clamp=0.75)
_XL, _LLAMA = (13, 14, 15, 16, 17), (4, 5, 6, 7, 8)

PRESETS: Mapping[str, Mapping[str, Editor]] = {
    "rome": {
        "gpt2-medium": Rome(layer=8, value=ValueSettings(clamp=3.0)),
        "gpt2-large": Rome(layer=12),
        "gpt2-xl": Rome(layer=17),
        "llama2-7b": Rome(layer=5, value=_LLAMA_2),
    },
    "c_rome": {
        "gpt2-medium": CRome(layer=8, value=ValueSettings(clamp=3.0)),
        "gpt2-large": CRome(layer=12),
        "gpt2-xl": CRome(layer=17),
        "llama2-7b": CRome(layer=5, value=_LLAMA_2),
    },
    "memit": {
        "gpt2-xl": Memit(layers=_XL),
        "llama2-7b": Memit(layers=_LLAMA, weight=15_000.0, value=_LLAMA_2),
        "llama3-8b": Memit(layers=_LLAMA, weight=15_000.0, value=_LLAMA_3),
    },
    "alphaedit": {
        "gpt2-xl": AlphaEdit(layers=_XL),
        "llama3-8b": AlphaEdit(layers=_LLAMA, value=_LLAMA_3),
    },
    "ft_l": {
        "gpt2-medium": FtL(layer=0, limit=2e-3),
        "gpt2-large": FtL(layer=0, limit=1e-3),
        "gpt2-xl": FtL(layer=0),
    },
}
"""Editor -> model -> hyper-parameters of the papers and their reference code.

MEMIT for Llama 2 is that of a later collection of editors: the paper has no Llama.
"""

_RELATIVE = ValueSettings(weight_decay=1e-3, relative=True)


def preset(editor: str, model: str) -> Editor:
    """The hyper-parameters of a paper.

    Raises:
        ValueError: there are none for that editor and model; names those that there are.

    Example:
        >>> preset("rome", "gpt2-xl").layer
        17
    """
    models = _known(editor, PRESETS, "editor")
    return _known(model, models, f"model with settings for {editor!r}")


def scale_free(editor: str, config: Any) -> Editor:
    """Hyper-parameters relative to the model's own sizes, for a model of which no paper tells.

    The layer is the one after a third of the blocks, as in GPT-2 of all sizes; editors of several layers take up to
    four before it.

    Args:
        editor: one of `PRESETS`.
        config: a `GPT2Config` or `LlamaConfig`.

    Raises:
        ValueError: there is no such editor, or the model cannot be edited.
    """
    last = layer_count(config) // 3
    layers = tuple(range(max(0, last - 4), last + 1))
    spread = replace(_RELATIVE, clamp=0.75)
    settings: Mapping[str, Editor] = {
        "rome": Rome(last, value=_RELATIVE),
        "c_rome": CRome(last, value=_RELATIVE),
        "memit": Memit(layers, weight=0.1, relative=True, value=spread),
        "alphaedit": AlphaEdit(layers, rule="relative", ridge=0.1, relative=True, value=spread),
        "ft_l": FtL(last, learning_rate=0.05, limit=0.2, relative=True),
    }
    return _known(editor, settings, "editor")


def _known(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        message = f"{name!r} is no {what}{nearest(name, table)}; known are {', '.join(table)}."
        raise ValueError(message)
    return table[name]
