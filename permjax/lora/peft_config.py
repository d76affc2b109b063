"""The `adapter_config.json` of PEFT: the scale of every module, what must be refused, and what is written."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from permjax.lora.keys import AdapterError

_DEFAULTS = {"r": 8, "lora_alpha": 8}

_REFUSED = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "a bias was trained with the factors",
    "modules_to_save": "whole modules were trained with the factors",
    "trainable_token_indices": "tokens were trained with the factors",
    "target_parameters": "updates of single parameters, such as stacked experts, are no products of two matrices",
    "layer_replication": "layers of the base are used several times",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "aLoRA is active only behind its tokens",
    "monteclora_config": "MonteCLoRA draws its factors",
    "kasa_config": "KaSA changes the base model",
    "arrow_config": "Arrow routes between adapters",
    "use_bdlora": "BD-LoRA has factors of blocks",
    "megatron_config": "the factors may be parts of a parallel layer",
    "ensure_weight_tying": "tied factors would come apart",
}

_READ_OR_WITHOUT_EFFECT = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors show the modules
    *("fan_in_fan_out", "bias"),  # the factors are not transposed; a trained bias shows in the tensors
    *("lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}

_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

_COPIED = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "revision", "task_type")


def check_config(config: Mapping[str, Any], file: Any, force: bool) -> None:
    """Refuse a configuration under which an update is not `scale * B A` on the plain base model.

    Args:
        config: of PEFT.
        file: where it stands, for messages.
        force: ignore keys and initialisations that are not known. What is known to change the update is refused all
            the same.

    Raises:
        AdapterError: names the key.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{file}: peft_type is {kind!r}; only adapters of type 'LORA' can be merged.")
    for key, why in _REFUSED.items():
        if not _is_off(config.get(key)):
            value = _short(config[key])
            raise AdapterError(f"{file}: {key} is {value}: {why}, which no update `scale * B A` can express.")
    _check_init(config.get("init_lora_weights"), file, force)
    unknown = sorted(k for k in config.keys() - _REFUSED.keys() - _READ_OR_WITHOUT_EFFECT if not _is_off(config[k]))
    if unknown and not force:
        message = (
            f"{file}: the key {unknown[0]!r} with the value {_short(config[unknown[0]])} is not known, so the update "
            "may not be `scale * B A`; remove it, or use force to ignore it, if it has no effect on the update."
        )
        raise AdapterError(message)


def scale_of(config: Mapping[str, Any], name: str, rank: int, file: Any) -> float:
    """The scale of a module by PEFT's rule: alpha / r, or alpha / sqrt(r) with `use_rslora`.

    Raises:
        AdapterError: the configuration gives another rank than that of the tensors, or no numbers.
    """
    expected = _number(config, "r", "rank_pattern", name, file)
    if expected != rank:
        message = (
            f"{file}: module {name!r} has rank {rank} in the tensors but {expected} by r and rank_pattern; the "
            "configuration belongs to another file."
        )
        raise AdapterError(message)
    alpha = _number(config, "lora_alpha", "alpha_pattern", name, file)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def written_config(
    base: Mapping[str, Any], ranks: Mapping[str, int], adapters: Sequence[tuple[Collection[str], Mapping[str, Any]]]
) -> dict[str, Any]:
    """The configuration of an adapter whose scales are 1.

    Args:
        base: a configuration whose entries about the base model are kept.
        ranks: of all modules.
        adapters: module names and configuration of each adapter that was merged.
    """
    common, patterns = _ranks(ranks)
    return {
        "peft_type": "LORA",
        **{key: base[key] for key in _COPIED if key in base},
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": targets(ranks.keys(), adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_dora": False,
    }


def targets(saved: Collection[str], adapters: Sequence[tuple[Collection[str], Mapping[str, Any]]]) -> list[str] | str:
    """Target modules that PEFT matches with the saved modules and no others.

    A suffix is used where an adapter that was trained with it shows all modules that it catches, a whole path
    otherwise, and a regular expression if a whole path is the suffix of another module.
    """
    short = {
        target
        for names, config in adapters
        for target in _plain_targets(config)
        if (caught := {name for name in names if _catches(target, name)}) and caught <= set(saved)
    }
    full = {name for name in saved if not any(_catches(target, name) for target in short)}
    others = {name for names, _ in adapters for name in names} - set(saved)
    if any(_catches(target, name) for target in full for name in others):
        return "|".join(re.escape(name) for name in sorted(saved))
    return sorted(short | full)


def _plain_targets(config: Mapping[str, Any]) -> list[str]:
    """The suffixes that alone decided which modules have an adapter."""
    found = config.get("target_modules")
    narrowed = any(config.get(key) not in (None, []) for key in ("layers_to_transform", "exclude_modules"))
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) and not narrowed else []


def _catches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ranks(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most common rank, and all ranks if there are several, in an order in which every name finds itself first."""
    counts = Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], rank))
    order = sorted(ranks, key=lambda name: (-len(name), name.count("."), name))
    return common, {name: ranks[name] for name in order} if len(counts) > 1 else {}


def _check_init(value: Any, file: Any, force: bool) -> None:
    if isinstance(value, str) and value.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        message = (
            f"{file}: init_lora_weights is {value!r}, which also changed the base model, so the factors are no update "
            "of it; save the adapter with path_initial_model_for_weight_conversion, or set init_lora_weights to true "
            "if your base model is the changed one."
        )
        raise AdapterError(message)
    if value not in _HARMLESS_INITS and not force:
        message = (
            f"{file}: init_lora_weights is {_short(value)}, which is not known and may have changed the base model; "
            "use force to ignore it, if it did not."
        )
        raise AdapterError(message)


def _number(config: Mapping[str, Any], key: str, pattern_key: str, name: str, file: Any) -> Any:
    """An entry for a module: that of the first pattern that matches the end of its path, as in PEFT."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{file}: {pattern_key} is {_short(patterns)} where an object of numbers is needed.")
    hit = next((p for p in patterns if _matches(p, name, file, pattern_key)), None)
    value = config.get(key, _DEFAULTS[key]) if hit is None else patterns[hit]
    whole = key == "r"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not abs(value) < 1e30:
        where = key if hit is None else f"{pattern_key}[{hit!r}]"
        raise AdapterError(f"{file}: {where} is {_short(value)} where a {'whole ' if whole else ''}number is needed.")
    return value


def _matches(pattern: str, name: str, file: Any, key: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise AdapterError(f"{file}: {key} has {pattern!r}, which is no regular expression ({error}).") from error


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
