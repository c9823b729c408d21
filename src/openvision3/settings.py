"""Dataclasses of settings: to and from JSON, strictly; which of their fields are paths; and names that nobody knows."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from openvision3.contents import why_not

T = TypeVar("T")


PathName = Annotated[str, "path"]
"""A string that a user types as a path, glob or address: the command line expands `~` in it. A path that a program writes is a plain str."""


def read_rules(only: tuple[str, ...]) -> dict[str, str]:
    """name=value or name!=value, ... -> {name or name!: value}, see `fits`. Raises ValueError for a rule that looks otherwise."""
    for rule in only:
        if not re.fullmatch(r"[^=]*[^=!]!?=.*", rule, re.DOTALL):
            raise ValueError(f"only {rule!r} must look like name=value or name!=value, such as source=clipart")
    return dict(rule.split("=", 1) for rule in only)


def fits(values: dict[str, Any], rules: dict[str, str]) -> bool:
    """Whether the values have all those that the rules name, and none of those that a rule with ! names."""
    return all((str(values.get(name.removesuffix("!"))) == value) != name.endswith("!") for name, value in rules.items())


def check_templates(templates: Iterable[str]) -> None:
    """Raises ValueError for a text of zero-shot classification without {} in the place of the class."""
    if wrong := [text for text in templates if "{}" not in text]:
        raise ValueError(f"template {wrong[0]!r} has no {{}} in the place of the class, as in 'a photo of {{}}'")


def unknown(what: str, name: str, choices: Iterable[str], choose: str | None = None) -> ValueError:
    """The error for a name that is none of `choices`: names the most similar one, and all of them, or instead of them says `choose`."""
    choices = [*choices]
    keys = {key: choice for choice in reversed(choices) for key in (choice.rpartition(".")[2].lstrip("-"), choice.lstrip("-"))}
    near = difflib.get_close_matches(name.lstrip("-"), keys, 1, cutoff=0.5)
    hints = [f"Did you mean {keys[near[0]]!r}?" if near else "", f"Choose one of {', '.join(choices)}" if choose is None else choose]
    return ValueError(" ".join([f"unknown {what} {name!r}.", *filter(None, hints)]))


def to_dict(config: Any) -> dict:
    """A config -> plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested fields by their names on the command line: {"model": {"loss": {"tau": 1}}} -> {"model.loss.tau": 1}."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields


def from_dict(kind: type[T], values: dict, where: str = "") -> T:
    """Plain values -> a config, strictly.

    Raises:
        ValueError: an unknown field (with the nearest name), or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    names = {field.name: f"{where}{field.name}" for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if strange := next((name for name in values if name not in names), None):
        raise unknown("field", f"{where}{strange}", names.values(), choose="")
    return kind(**{name: _value(hints[name], value, names[name]) for name, value in values.items()})


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), check_fields(value, place), f"{place}.")
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(k for k in inside if k is not type(None)), value, place)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{place} must be a list, not {value!r}")
        if inside[-1] is not Ellipsis and len(value) != len(inside):
            raise ValueError(f"{place} must be a list of {len(inside)}, not {value!r}")
        return tuple(_value(inside[0], item, place) for item in value)
    if origin is Literal:
        if value not in inside:
            raise ValueError(f"{place} cannot be {value!r}. Choose one of {', '.join(map(str, inside))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{place} must be {kind.__name__}, not {value!r}")
    return value


def check_fields(value: Any, place: str | Path) -> dict:
    """The value, if it is a dict. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} must hold fields, not {value!r}")
    return value


def check_choices(config: Any) -> None:
    """Raises ValueError for the first field whose value is none of its Literal's."""
    for name, kind in typing.get_type_hints(type(config)).items():
        if typing.get_origin(kind) is Literal:
            _value(kind, getattr(config, name), name)


def check_numbers(config: Any, least: int, *names: str) -> None:
    """Raises ValueError for the first of these fields that is no number, infinite, or below `least`, which is 0 or 1."""
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} {getattr(config, name)} must be {f'at least {least}' if least else 'a number that is not negative'}")


def save_config(config: Any, path: str | Path) -> None:
    write_json(to_dict(config), path)


def write_json(values: dict, path: str | Path) -> None:
    Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Raises FileNotFoundError; ValueError where the file is not JSON, or does not hold fields."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such config: {path}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {why_not(path, 'JSON', error)}") from error
    return check_fields(values, path)


def load_config(kind: type[T], path: str | Path) -> T:
    """Raises FileNotFoundError, ValueError."""
    return from_dict(kind, read_json(path))
