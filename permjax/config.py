"""Configurations: TOML tables to nested frozen dataclasses and back; nothing unknown, nothing of the wrong type.

A class may name itself in a `ClassVar[str]`, such as `experiment = "rebasin"`. The name is a key of its table: it is
checked on reading, written with the fields, and chooses the class where a field may be one of several.
"""

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin

import tomli_w

from permjax.tree import nearest

Config = typing.TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot be taken at its word."""


# files


def load_config(path: str | Path | None, overrides: Sequence[str], cls_by_kind: Mapping[str, type]) -> Any:
    """The configuration in a TOML file, whose key `experiment` says of which kind it is.

    Args:
        path: the file; None for the defaults of the experiment that an override names.
        overrides: `section.key=value` strings, applied in order; values are TOML, and bare words are text.
        cls_by_kind: the configuration class of each kind of experiment, which has the kind as its class variable
            `experiment`.

    Raises:
        ConfigError: no valid TOML, an unknown kind or key (the nearest valid one is named), a wrong type, or a value
            that the class refuses; names the file or the override, and the full key.
        OSError: the file cannot be read.

    Example:
        >>> load_config("configs/rebasin_digits.toml", ["train.epochs=3"], {"rebasin": RebasinConfig})
    """
    where = "The configuration" if path is None else str(path)
    values = {} if path is None else read_toml(Path(path))
    changes = [_parse(override) for override in overrides]
    for change in changes:
        if change.keys == ("experiment",):
            change.apply(values)
    cls = _chosen(cls_by_kind, "experiment", values.get("experiment"), where)
    config = from_dict(cls, values, where=where)
    for change in changes:
        change.apply(values)
        config = from_dict(cls, values, where=change.where)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The tables in a file.

    Raises:
        ConfigError: it is not valid TOML; names the file.
        OSError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The tables of a configuration as TOML and JSON have them: lists for tuples, text for paths; None is left out."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    named = _names_of(type(config)) | fields
    return {key: _plain(value) for key, value in named.items() if value is not None}


def to_toml(config: Any) -> str:
    """The whole configuration as TOML, defaults included; `load_config` reads it back."""
    return tomli_w.dumps(to_dict(config))


def config_hash(config: Any) -> str:
    """Eight hexadecimal digits: the start of the SHA-256 of the configuration as JSON with sorted keys."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


class _Change(NamedTuple):
    """One parsed `section.key=value`."""

    where: str
    keys: tuple[str, ...]
    value: Any

    def apply(self, values: dict[str, Any]) -> None:
        *sections, last = self.keys
        for section in sections:
            values = values.setdefault(section, {})
            if not isinstance(values, dict):
                raise ConfigError(f"{self.where}: {section!r} is a value and has no keys.")
        values[last] = self.value


def _parse(override: str) -> _Change:
    key, equals, text = override.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not (equals and all(keys)):
        raise ConfigError(f"--set {override} is no setting; write section.key=value, such as train.epochs=3.")
    return _Change(f"--set {override}", keys, _parse_value(text.strip()))


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _chosen(classes: Mapping[str, type], key: str, name: Any, where: str) -> type:
    """The class that a table names under `key`."""
    known = ", ".join(classes)
    if name is None:
        raise ConfigError(f"{where} does not set {key!r}, which says what it is; known are {known}.")
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(f"{where}: {key!r} is {name!r}{nearest(str(name), classes)}; known are {known}.")
    return classes[name]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# dataclasses


def from_dict(cls: type[Config], values: Mapping[str, Any], *, where: str) -> Config:
    """An instance of a configuration dataclass from a dictionary.

    Lists become tuples and whole numbers floats where the class says so. A table that leaves keys out takes them from
    the default of its field, if that is an instance of the same class.

    Args:
        cls: a dataclass of plain types, literals, unions, tuples, dicts and further dataclasses.
        values: field names to values as JSON and TOML give them.
        where: names the dictionary in errors.

    Raises:
        ConfigError: an unknown key (the nearest valid name is given), a wrong type, or a value the class refuses.
    """
    return _Reader(where, tuple(_keys(cls))).table(cls, values, "")


class _Reader(NamedTuple):
    """Reads tables; `known` are all valid keys from the root on."""

    where: str
    known: tuple[str, ...]

    def table(self, cls: Any, values: Mapping[str, Any], section: str) -> Any:
        """The instance of `cls` of a table; `section` is empty or ends in a dot."""
        hints, names, defaults = _hints(cls), _names_of(cls), _defaults(cls)
        converted = {}
        for key, value in values.items():
            if key not in hints and names.get(key) != value:
                raise ConfigError(self._refusal(section, key, value, hints, names))
            if key in hints:
                whole = _filled(value, hints[key], defaults.get(key))
                converted[key] = self._field(whole, hints[key], section + key)
        try:
            return cls(**converted)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.where}: {error}") from None

    def _field(self, value: Any, hint: Any, key: str) -> Any:
        try:
            return self._value(value, hint, key)
        except TypeError:
            message = f"{self.where}: {key!r} must be {_describe(hint)}, not {value!r} ({type(value).__name__})."
            raise ConfigError(message) from None

    def _value(self, value: Any, hint: Any, key: str) -> Any:
        """`value` as the type `hint`; raises TypeError where it is none."""
        origin, args = get_origin(hint), get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.table(hint, _checked(value, isinstance(value, Mapping)), f"{key}.")
        if origin is Literal:
            return _checked(value, value in args)
        if _is_union(hint):
            return self._one_of(value, args, key)
        if origin is tuple:
            return tuple(self._value(item, part, key) for item, part in _parts(value, args))
        if hint is float:
            return float(_checked(value, isinstance(value, int | float) and not isinstance(value, bool)))
        return _checked(value, type(value) is (origin or hint))

    def _one_of(self, value: Any, hints: Sequence[Any], key: str) -> Any:
        tables = [hint for hint in hints if dataclasses.is_dataclass(hint)]
        if isinstance(value, Mapping) and len(tables) > 1:
            named = next(iter(_names_of(tables[0])))
            classes: dict[str, Any] = {getattr(table, named): table for table in tables}
            chosen = _chosen(classes, f"{key}.{named}", value.get(named), self.where)
            return self.table(chosen, value, f"{key}.")
        for hint in hints:
            try:
                return self._value(value, hint, key)
            except TypeError:
                continue
        raise TypeError

    def _refusal(self, section: str, key: str, value: Any, hints: Mapping, names: Mapping) -> str:
        if key in names:
            return f"{self.where}: {section + key!r} must be {names[key]!r}, not {value!r}."
        known = f"known{f' in [{section[:-1]}]' if section else ''} are {', '.join([*names, *hints])}."
        return f"{self.where} has the unknown key {section + key!r}{nearest(section + key, self.known)}; {known}"


def _defaults(cls: Any) -> dict[str, Any]:
    """The values that fields have by themselves."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _filled(value: Any, hint: Any, default: Any) -> Any:
    """A table with what it leaves out taken from the default, also in the tables in it."""
    if not (isinstance(value, Mapping) and dataclasses.is_dataclass(hint) and type(default) is hint):
        return value
    hints = _hints(hint)
    given = {key: _filled(item, hints.get(key), getattr(default, key, None)) for key, item in value.items()}
    return to_dict(default) | given


def _checked(value: Any, right: bool) -> Any:
    if not right:
        raise TypeError
    return value


def _parts(value: Any, hints: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """The items of a list with their types, for `tuple[T, ...]` and for tuples of fixed length."""
    _checked(value, isinstance(value, list | tuple))
    if hints[1:] == (...,):
        return [(item, hints[0]) for item in value]
    _checked(value, len(value) == len(hints))
    return list(zip(value, hints, strict=True))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return f"a list, each item {_describe(get_args(hint)[0])}"
    if any(map(dataclasses.is_dataclass, get_args(hint) if _is_union(hint) else (hint,))):
        return "a table"
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _names_of(cls: Any) -> dict[str, str]:
    """The class variables by which a table names its class: those that are text."""
    hints = typing.get_type_hints(cls)
    return {key: getattr(cls, key) for key, hint in hints.items() if hint == ClassVar[str]}


def _keys(hint: Any, section: str = "") -> Iterator[str]:
    """Every valid key below a type."""
    for kind in get_args(hint) if _is_union(hint) else (hint,):
        if dataclasses.is_dataclass(kind):
            yield from (section + key for key in _names_of(kind))
            for key, inner in _hints(kind).items():
                yield section + key
                yield from _keys(inner, f"{section}{key}.")
