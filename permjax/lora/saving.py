"""Writing adapters: every scale is folded into the factors, so that all readers agree on the update."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from permjax import tree
from permjax.files import staging
from permjax.io.lazy import DTYPES, LazyArray, StrPath
from permjax.lora.adapter_files import AdapterFiles
from permjax.lora.headers import header
from permjax.lora.keys import PREFIX, AdapterError, ModuleInfo, one_line
from permjax.lora.kohya import is_kohya, kohya_spellings
from permjax.lora.peft_config import written_config
from permjax.lora.pool import module_names, padded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STYLES = ("peft", "kohya", "diffusers")

_SUFFIXES = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}
_EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B")


def save_adapter(
    path: StrPath,
    modules: Mapping[str, Any],
    *,
    like: Sequence[AdapterFiles],
    style: str | None = None,
    dtype: Any = None,
    uniform: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter whose updates are `b @ a`: alpha is the rank, so that the scale is 1 for every reader.

    The same content gives the same bytes. All files are complete before any is renamed to its place, the configuration
    last; an error leaves what was there.

    Args:
        path: a folder for style "peft", a `.safetensors` file for the others.
        modules: module -> `Factors` or `Merged`; a `[rank, in]`, b `[out, rank]`.
        like: the adapters that it was made from, which give the shapes of kernels, the dtype, and what is said about
            the base model. If there are none the factors have the shapes of the file, for a kernel
            `[rank, in, height, width]` and `[out, rank, 1, 1]`.
        style: "peft", "kohya" or "diffusers"; that of the first adapter by default.
        dtype: of the factors; the widest of `like` by default.
        uniform: fill all modules up with zeros to the largest rank, which every reader understands. Otherwise each
            keeps its own rank, with `rank_pattern` and `alpha_pattern`, or one alpha for each module.
        metadata: more text for the header.

    Raises:
        AdapterError: a module does not fit `like`, has values that are not finite or too large for the dtype, or has no
            name in the style; or the disk refuses.

    Example:
        >>> merged = merge_loras([one.factors() for one in adapters], method)  # doctest: +SKIP
        >>> save_adapter("merged", merged, like=adapters)  # doctest: +SKIP
    """
    path, style = Path(path), style or (like[0].style if like else "peft")
    check_place(path, style)
    wide, ranks, keys = _dtype(dtype, like), _ranks(modules, uniform), _keys(modules, like, style)
    tensors: dict[str, Any] = {}
    for name, one in modules.items():
        info = _info(name, one, like)
        a, b = _cast(name, one.a, wide), _cast(name, one.b, wide)
        tensors |= zip(_factor_keys(name, keys[name], info, style), _shaped(a, b, info, ranks[name]), strict=True)
        if style == "kohya":
            tensors[f"{keys[name]}.alpha"] = np.asarray(ranks[name], np.float32)
    text = {"format": "pt", **header(ranks, like, style), **(metadata or {})}
    if style == "peft":
        first = next((one.config for one in like if one.config), {})
        config = written_config(first, ranks, [(one, one.config) for one in like])
        _write(path, {WEIGHTS: tensors | _frozen(modules, like)}, text, {CONFIG: json.dumps(config, indent=2) + "\n"})
    else:
        _write(path.parent, {path.name: tensors}, text, {})


def check_place(path: Path, style: str) -> None:
    """Check that there is such a style, and that the path is a place for an adapter of it.

    Raises:
        AdapterError: names the style or the path.
    """
    if style not in STYLES:
        raise AdapterError(f"{style!r} is no style of adapter files{tree.nearest(style, STYLES)}; use one of {STYLES}.")
    single = path.suffix == ".safetensors" and not path.is_dir()
    if (style == "peft") == single or (style == "peft" and path.is_file()):
        wanted = "PEFT adapters are folders; give one" if style == "peft" else "give a name that ends in .safetensors"
        raise AdapterError(f"{path} is no place for an adapter of style {style}: {wanted}, or another style.")


def _dtype(dtype: Any, like: Sequence[AdapterFiles]) -> np.dtype:
    found = [info.dtype for one in like for info in one.values()]
    asked = reduce(jnp.promote_types, found or [jnp.float32]) if dtype is None else dtype
    with suppress(TypeError):
        wide = np.dtype(asked)
        if jnp.issubdtype(wide, jnp.floating) and wide in DTYPES.values():
            return wide
    raise AdapterError(f"factors cannot be written as {asked}; use bfloat16, float16 or float32.")


def _ranks(modules: Mapping[str, Any], uniform: bool) -> dict[str, int]:
    if not modules:
        raise AdapterError("there are no modules to write; give at least one.")
    ranks = {name: max(1, np.shape(one.a)[0]) for name, one in modules.items()}
    return dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks


def _keys(modules: Mapping[str, Any], like: Sequence[AdapterFiles], style: str) -> dict[str, str]:
    """What stands before the suffixes in the keys of every module."""
    if style == "kohya":
        return kohya_spellings(modules, like)
    lost = next((name for name in modules if is_kohya(name)), None)
    if lost is not None:
        message = (
            f"module {lost!r} has a name of kohya's style, and no other adapter tells where its dots are; write style "
            "'kohya'."
        )
        raise AdapterError(message)
    prefix = PREFIX if style == "peft" else next((one.prefix for one in like if one.style == style), "")
    return {name: prefix + name for name in modules}


def _info(name: str, one: Any, like: Sequence[AdapterFiles]) -> ModuleInfo:
    """What the module is in the first adapter that has it, if the factors fit."""
    a, b = np.shape(one.a), np.shape(one.b)
    info = next((files[name] for files in like if name in files), None)
    if info is None and like:
        hint = tree.nearest(name, module_names(like))
        raise AdapterError(f"no adapter of `like` has the module {name!r}{hint}; check the name.")
    info = info or ModuleInfo("linear" if len(a) == 2 else "conv", a[0], 1.0, a, b, np.dtype(np.float32))
    if (math.prod(a[1:]), b[0], math.prod(b[1:])) != (info.size_in, info.size_out, a[0]):
        message = (
            f"module {name!r} was to be written with a of shape {a} and b of shape {b}, where [rank, {info.size_in}] "
            f"and [{info.size_out}, rank] are needed."
        )
        raise AdapterError(message)
    return info


def _factor_keys(name: str, key: str, info: ModuleInfo, style: str) -> list[str]:
    if info.kind == "embedding" and style == "kohya":
        raise AdapterError(
            f"module {name!r} is an embedding, for which kohya's files have no keys; write another style."
        )
    return [key + suffix for suffix in (_EMBEDDING_SUFFIXES if info.kind == "embedding" else _SUFFIXES[style])]


def _shaped(a: np.ndarray, b: np.ndarray, info: ModuleInfo, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors with zeros up to the rank, in the shapes of the file."""
    a, b = padded(a.reshape(len(a), info.size_in), b.reshape(info.size_out, len(a)), rank)
    return a.reshape(rank, *info.a_shape[1:]), b.reshape(info.size_out, rank, *info.b_shape[2:])


def _cast(name: str, values: Any, dtype: np.dtype) -> np.ndarray:
    wide = np.asarray(values)
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    if not np.isfinite(narrow).all():
        finite = np.isfinite(wide).all()
        what = f"values too large for {dtype}; write a wider dtype" if finite else "values that are not finite"
        raise AdapterError(f"module {name!r} has {what}; nothing was written.")
    return narrow


def _frozen(modules: Mapping[str, Any], like: Sequence[AdapterFiles]) -> dict[str, LazyArray]:
    """The copies of embeddings of the base model, which must be the same in all adapters."""
    found: dict[str, LazyArray] = {}
    for one in like:
        for key, tensor in one.frozen.items():
            if key.removesuffix(".base_layer.weight") in modules:
                other = found.setdefault(PREFIX + key, tensor)
                if other is not tensor and not np.array_equal(_read(other), _read(tensor)):
                    message = f"{tensor.file} and {other.file} differ in {tensor.name!r}, a part of the base model; "
                    raise AdapterError(message + "merge adapters of one base model.")
    return found


def _read(tensor: LazyArray) -> np.ndarray:
    with one_line():
        return tensor.read()


def _write(
    folder: Path, weights: Mapping[str, Mapping[str, Any]], text: Mapping[str, str], others: Mapping[str, str]
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder) as stage:
            for name, tensors in weights.items():
                stage(name, partial(_write_tensors, tensors, text))
            for name, content in others.items():
                stage(name, partial(Path.write_text, data=content, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        message = (
            f"The adapter {folder} was not written ({error}); what was there is intact. Check the disk and the path."
        )
        raise AdapterError(" ".join(message.split())) from error


def _write_tensors(tensors: Mapping[str, Any], text: Mapping[str, str], path: Path) -> None:
    """Write a file with the entries of its header in order; safetensors leaves them in a random one."""
    save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, path, metadata=dict(text))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(size))
        found["__metadata__"] = dict(sorted(found["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
