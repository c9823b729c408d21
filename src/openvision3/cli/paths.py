"""Paths as a person types them: `~` is the home folder wherever the command line takes a path."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints


def expand_fields(owner: Any) -> None:
    """Expand `~` in every field of a dataclass, and of those within it, whose hint says that it is a path.

    Raises:
        ValueError: a home folder that cannot be known.
    """
    hints = get_type_hints(type(owner), include_extras=True)
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if dataclasses.is_dataclass(value):
            expand_fields(value)
        elif (expanded := expand_value(hints[field.name], value)) != value:
            setattr(owner, field.name, expanded)


def expand_value(hint: Any, value: Any) -> Any:
    """A value, or each of several, with `~` expanded where its hint says that it is a path. Raises ValueError."""
    if isinstance(value, tuple):
        return tuple(expand_value(hint, each) for each in value)
    kinds = _kinds(hint)
    if not isinstance(value, str) or not kinds:
        return value
    name, equals, path = value.partition("=") if "name=path" in kinds else ("", "", value)
    return name + equals + expand_home(path)


def expand_home(path: str) -> str:
    """`~/x` and `~user/x` with the home folder's path, as a shell gives it.

    Raises:
        ValueError: no such user, and no folder of that name either: a command would make one called `~user`.
    """
    expanded = os.path.expanduser(path)
    first = path.split("/")[0]
    if expanded == path and first.startswith("~") and "/" in path and not os.path.lexists(first) and not set("*?[{") & set(first):
        raise ValueError(f"{path}: the home folder {first} is unknown; write the whole path, or ./{first} for a folder of this name")
    return expanded


def _kinds(hint: Any) -> set[str]:
    """The words in `Annotated[...]`, at any depth of a type hint."""
    words = {each for each in getattr(hint, "__metadata__", ()) if isinstance(each, str)}
    return words.union(*(_kinds(each) for each in get_args(hint)))


def check_apart(out: str, data: Sequence[str], option: str = "--out") -> None:
    """Refuse a place for outputs that lies within a folder whose pictures are read: they would be read as data the next time.

    Raises:
        ValueError: with the folder in question; nothing has been written.
    """
    from openvision3.data.shards.index import is_remote
    from openvision3.data.sources import expand

    place = Path(os.path.realpath(out))
    for name in data:
        for folder in map(Path, expand(name) if name != "openmoji" and not is_remote(name) else []):
            read = folder.is_dir() and not any(folder.glob("*.tar"))  # of a folder with shards, they alone
            if read and place.is_relative_to(folder.resolve()):
                raise ValueError(f"{out} lies within {folder}, which is read: what is written there would be read as data; name a folder outside with {option}")
