"""Module names of kohya's files (`lora_unet_down_blocks_0_proj`) and of the others (`unet.down_blocks.0.proj`)."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from permjax.lora.adapter_files import AdapterFiles
from permjax.lora.keys import AdapterError

COMPONENT = re.compile(r"(unet|transformer(?:_\d+)?|text_encoder(?:_\d+)?)\.")

_PREFIXES = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_ALL = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_")


def common_names(adapters: Sequence[AdapterFiles]) -> list[AdapterFiles]:
    """Give the modules of kohya-style adapters the dotted names that the other adapters have for them.

    kohya's names write dots as underscores, so they cannot be taken apart without the names of another adapter of the
    same base model. Names without a counterpart stay as they are.

    Args:
        adapters: of one base model, in any styles.

    Returns:
        The adapters in their order; those of other styles are the same objects.

    Raises:
        AdapterError: a name stands for two modules, or two names for one.
    """
    dotted = dict.fromkeys(name for one in adapters for name in one if not is_kohya(name))
    places: dict[str, list[str]] = {}
    for name in dotted:
        for spelling in kohya_names(name):
            places.setdefault(spelling, []).append(name)
    return [_renamed(one, places) for one in adapters]


def is_kohya(name: str) -> bool:
    """Whether a name is one of kohya's, in which the dots are lost."""
    return "." not in name and name.startswith("lora_")


def kohya_names(name: str) -> tuple[str, ...]:
    """All names that a module may have in kohya's files; without a component it may belong to any."""
    found = COMPONENT.match(name)
    inner = name[found.end() :] if found else name
    prefixes = _PREFIXES.get(found[1], ()) if found else _ALL
    return tuple(prefix + inner.replace(".", "_") for prefix in prefixes)


def kohya_spellings(names: Iterable[str], adapters: Sequence[AdapterFiles]) -> dict[str, str]:
    """The names in kohya's files for modules to be written: those of the adapters, or made from the dotted ones.

    Raises:
        AdapterError: two modules would have one name.
    """
    known = {name: one.file_name(name) for one in reversed(adapters) if one.style == "kohya" for name in one}
    names = list(names)
    two = any(name.startswith("text_encoder_2.") for name in names)
    found = {name: known.get(name) or _spelling(name, two) for name in names}
    spelling, count = Counter(found.values()).most_common(1)[0]
    if count > 1:
        clash = [name for name in names if found[name] == spelling]
        raise AdapterError(f"kohya's files have one name {spelling!r} for the modules {clash}; write another style.")
    return found


def _spelling(name: str, two: bool) -> str:
    """The usual name; `two` says whether there are two text encoders."""
    if is_kohya(name):
        return name
    found = kohya_names(name)
    if not found:
        raise AdapterError(f"module {name!r} has no name in kohya's files; write another style.")
    return found[1] if two and name.startswith("text_encoder.") else found[0]


def _renamed(adapter: AdapterFiles, places: dict[str, list[str]]) -> AdapterFiles:
    chosen = {name: places[name] for name in adapter if is_kohya(name) and name in places}
    if not chosen:
        return adapter
    for name, found in chosen.items():
        if len(found) > 1:
            raise AdapterError(f"{adapter.path}: module {name!r} may stand for any of {found}; rename it in the file.")
    new = {name: found[0] for name, found in chosen.items()}
    target, count = Counter(new.get(name, name) for name in adapter).most_common(1)[0]
    if count > 1:
        clash = [name for name in adapter if new.get(name, name) == target]
        raise AdapterError(f"{adapter.path}: the modules {clash} all stand for {target!r}; rename them in the file.")
    return adapter.renamed(new)
