"""Frozen dataclasses to JSON and back, strictly: what is missing, unknown or of another type is an error with its key.

Covers what a manifest needs: dataclasses, str, int, float, bool, Literal, X | None, tuples, dicts with str keys, and
unions of dataclasses that a Literal field called `kind` tells apart.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")

_SCALARS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class SchemaError(ValueError):
    """Data does not fit; `key` says where (empty: the whole), the message says how."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}" if key else problem)
        self.key = key


def to_json(value: Any) -> Any:
    """A value of the covered types as what `json.dumps` takes; every field is written, defaults too."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(cls: type[T], data: Any) -> T:
    """The dataclass that `data`, as `json.loads` gives it, describes.

    Raises SchemaError for data that does not fit, and for what the dataclass itself refuses with a ValueError.
    """
    value: T = _parse(cls, data, "")
    return value


def _parse(kind: Any, data: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, data, key)
    if origin is Literal:
        if data not in arguments or isinstance(data, bool):
            raise SchemaError(key, f"is {data!r}, not one of {', '.join(map(repr, arguments))}")
        return data
    if origin in (types.UnionType, typing.Union):
        return _parse_union(arguments, data, key)
    if origin is tuple:
        return _parse_tuple(arguments, data, key)
    if origin is dict:
        _expect(data, dict, "an object", key)
        return {name: _parse(arguments[1], item, _join(key, name)) for name, item in data.items()}
    if kind is float and type(data) in (int, float):
        return _parse_float(data, key)
    if type(data) is not kind:  # not isinstance: true is no number
        raise SchemaError(key, f"is {data!r}, not {_SCALARS[kind]}")
    return data


def _parse_float(data: float, key: str) -> float:
    """JSON has numbers that no float holds, such as 1e999."""
    try:
        value = float(data)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise SchemaError(key, "is too large a number")
    return value


def _parse_dataclass(cls: Any, data: Any, key: str) -> Any:
    _expect(data, dict, "an object", key)
    kinds = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in data:
        if name not in names:
            raise SchemaError(_join(key, name), "is not a known key")
    for name in names:
        if name not in data:
            raise SchemaError(_join(key, name), "is missing")
    values = {name: _parse(kinds[name], data[name], _join(key, name)) for name in names}
    try:
        return cls(**values)
    except (ValueError, ArithmeticError) as error:
        raise SchemaError(key, f"does not hold together: {error}" if key else str(error)) from None


def _parse_union(members: tuple[Any, ...], data: Any, key: str) -> Any:
    if data is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _parse(members[0], data, key)
    _expect(data, dict, "an object", key)
    by_kind = {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}
    if "kind" not in data:
        raise SchemaError(_join(key, "kind"), "is missing")
    name = data["kind"]
    if not isinstance(name, str) or name not in by_kind:
        raise SchemaError(_join(key, "kind"), f"is {name!r}, not one of {', '.join(map(repr, by_kind))}")
    return _parse(by_kind[name], data, key)


def _parse_tuple(items: tuple[Any, ...], data: Any, key: str) -> tuple[Any, ...]:
    _expect(data, list, "a list", key)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(data)
    elif len(data) != len(items):
        raise SchemaError(key, f"has {len(data)} entries, not {len(items)}")
    return tuple(
        _parse(kind, item, f"{key}[{index}]") for index, (kind, item) in enumerate(zip(items, data, strict=True))
    )


def _expect(data: Any, kind: type, words: str, key: str) -> None:
    if not isinstance(data, kind):
        raise SchemaError(key, f"is {data!r}, not {words}")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
