"""Settings: a frozen dataclass filled from YAML or flags, strictly.

    >>> @dataclass(frozen=True)
    ... class Tune: rank: int = 8; learning_rate: float = 1e-3
    >>> from_mapping(Tune, {"rank": "16", "learning_rate": "2e-5"}, where="step tune")
    Tune(rank=16, learning_rate=2e-05)

An unknown key raises and names the nearest; a value of the wrong type raises and says what was
expected. (YAML 1.1 reads 2e-5 as text, so numbers are accepted as text.)
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from herdbook.errors import ConfigError, nearest

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, where: str) -> T:
    """An instance of dataclass `cls`. where: what the user knows the mapping as."""
    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in known:
            raise ConfigError(
                f"key {key!r}", rule=f"is no setting of {where}", next=nearest(str(key), known)
            )
        values[key] = convert(value, hints[key], where=f"{where}: {key}")
    return cls(**values)


def convert(value: Any, kind: Any, *, where: str) -> Any:
    """`value` as `kind` (int, float, bool, str, Path, Literal, tuple[X, ...], X | None)."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return convert(value, arguments[0], where=where)
    if origin is Literal:
        if value in arguments:
            return value
        raise _wrong(value, "one of " + ", ".join(map(str, arguments)), where)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none")):
            if type(None) in arguments:
                return None
            raise _wrong(value, "a value", where)
        kinds = [one for one in arguments if one is not type(None)]
        for number, one in enumerate(kinds):
            try:
                return convert(value, one, where=where)
            except ConfigError:
                if number == len(kinds) - 1:
                    raise
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) and value else value or ()
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise _wrong(value, "a list", where)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(item, arguments[0], where=where) for item in items)
        if len(items) != len(arguments):
            raise _wrong(value, f"{len(arguments)} values", where)
        return tuple(
            convert(item, one, where=where) for item, one in zip(items, arguments, strict=True)
        )
    if kind is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("true", "yes", "on", "1"):
            return True
        if text in ("false", "no", "off", "0"):
            return False
        raise _wrong(value, "true or false", where)
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise _wrong(value, "a whole number", where)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise _wrong(value, "a whole number", where) from None
    if kind is float:
        if isinstance(value, bool):
            raise _wrong(value, "a number", where)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _wrong(value, "a number", where) from None
    if kind is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise _wrong(value, "text", where)
    if kind is Path:
        return Path(str(value)).expanduser()
    assert kind is Any, f"settings of type {kind} are not supported"
    return value


def _wrong(value: Any, expected: str, where: str) -> ConfigError:
    return ConfigError(f"{where} is {value!r}", rule=f"but must be {expected}")


def to_mapping(instance: Any) -> dict[str, Any]:
    """Plain data of a dataclass: the stored, printed and hashed form."""
    plain: dict[str, Any] = {}
    for one in dataclasses.fields(instance):
        value = getattr(instance, one.name)
        if isinstance(value, tuple):
            value = list(value)
        plain[one.name] = str(value) if isinstance(value, Path) else value
    return plain


def parse_flags(tokens: Sequence[str]) -> dict[str, str | bool]:
    """«--name Luna --tune.rank=16 --plan» → {"name": "Luna", "tune.rank": "16", "plan": True}.

    A flag without a value is True, not the text: a forgotten value must not become a name.
    """
    flags: dict[str, str | bool] = {}
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if not token.startswith("--") or len(token) < 3:
            raise ConfigError(
                f"{token!r}", rule="is not a setting", next="write settings as --key value"
            )
        key, equals, after = token[2:].partition("=")
        value: str | bool = after
        position += 1
        if not equals:
            if position < len(tokens) and not _is_flag(tokens[position]):
                value = tokens[position]
                position += 1
            else:
                value = True
        key = key.replace("-", "_")
        if key in flags:
            raise ConfigError(f"--{key}", rule="is given twice", next="give it once")
        flags[key] = value
    return flags


SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
DURATIONS = {"S": 1, "M": 60, "H": 3600, "D": 86400}


def size(text: str, *, where: str) -> int:
    """«4GB», «512 MiB» → bytes."""
    return int(_with_unit(text, SIZES, "a size such as 4GB or 512MiB", where))


def duration(text: str, *, where: str) -> float:
    """«10m», «1.5h», «30s» → seconds."""
    return _with_unit(text, DURATIONS, "a time such as 30s, 10m or 1h", where)


def _with_unit(text: str, units: Mapping[str, int], expected: str, where: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    unit = units.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise _wrong(text, expected, where)
    return float(found[1]) * unit


def _is_flag(token: str) -> bool:
    """«--rank» is one; «-0.5», «-» and «Acme -- Sons» are values."""
    return token.startswith("--") and len(token) > 2 and not token[2].isspace()
