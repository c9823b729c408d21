"""Dataclasses of settings: to and from JSON, strictly; and what their path fields are."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from openvision3.contents import why_not

T = TypeVar("T")


PathName = Annotated[str, "path"]
"""A string that a user types as a path, glob or address: the command line expands `~` in it. A path that a program writes is a plain str."""


def read_rules(only: tuple[str, ...]) -> dict[str, str]:
    """name=value, ... -> {name: value}. Raises ValueError for a rule that looks otherwise."""
    for rule in only:
        if "=" not in rule:
            raise ValueError(f"only {rule!r} must look like name=value, such as source=clipart")
    return dict(rule.split("=", 1) for rule in only)


def nearest(word: str, legal: typing.Iterable[str]) -> str:
    """The legal name most like `word`, for error messages; empty when there is none."""
    found = difflib.get_close_matches(word, list(legal), 1, cutoff=0.3)
    return found[0] if found else ""


def to_dict(config: Any) -> dict:
    """A config -> plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested fields by their names on the command line: {"model": {"loss": {"tau": 1}}} -> {"model.loss.tau": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def from_dict(kind: type[T], values: dict, where: str = "") -> T:
    """Plain values -> a config, strictly.

    Raises:
        ValueError: an unknown field (with the nearest name), or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{where}.{name}" if where else name
        if name not in names:
            raise ValueError(f"unknown field {place}; nearest is {nearest(name, names) or 'none'}")
        made[name] = _value(hints[name], value, place)
    return kind(**made)


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{place} must hold fields, not {value!r}")
        return from_dict(typing.cast(type, kind), value, place)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(k for k in inside if k is not type(None)), value, place)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{place} must be a list, not {value!r}")
        if inside[-1] is not Ellipsis and len(value) != len(inside):
            raise ValueError(f"{place} must be a list of {len(inside)}, not {value!r}")
        return tuple(_value(inside[0], v, place) for v in value)
    if origin is Literal:
        if value not in inside:
            raise ValueError(f"{place} {value!r} is unknown; legal are {', '.join(map(str, inside))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{place} must be {kind.__name__}, not {value!r}")
    return value


def save_config(config: Any, path: str | Path) -> None:
    Path(path).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_config(kind: type[T], path: str | Path) -> T:
    """Raises FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such config: {path}")
    try:
        values = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {why_not(path, 'JSON', error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold fields, not {values!r}")
    return from_dict(kind, values)
