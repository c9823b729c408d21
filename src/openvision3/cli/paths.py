"""Paths on the command line: `~` is the home folder, and outputs stay out of the data that are read."""

from __future__ import annotations

import dataclasses
import os
import re
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
    """A value, or each of several, with `~` expanded where its hint says that it is a path; so are the paths in name=~/path,~/path. Raises ValueError."""
    if isinstance(value, tuple):
        return tuple(expand_value(hint, item) for item in value)
    if not isinstance(value, str) or not _is_path(hint):
        return value
    name, equals, path = value.partition("=") if re.match(r"[\w -]+=", value) else ("", "", value)
    return name + equals + (",".join(map(expand_home, path.split(","))) if equals else expand_home(path))


def _is_path(hint: Any) -> bool:
    """Whether a type hint is `PathName`, or holds it at any depth."""
    return "path" in getattr(hint, "__metadata__", ()) or any(map(_is_path, get_args(hint)))


def expand_home(path: str) -> str:
    """`~/x` and `~user/x` with the path of the home folder, as a shell writes it.

    Raises:
        ValueError: there is neither such a user nor a folder of that name; the command would create a folder called `~user`.
    """
    expanded = os.path.expanduser(path)
    first = path.split("/")[0]
    if expanded == path and first.startswith("~") and "/" in path and not os.path.lexists(first) and not set("*?[{") & set(first):
        raise ValueError(f"{path}: the home folder {first} is unknown; write the whole path, or ./{first} for a folder of this name")
    return expanded


def check_apart(out: str, data: Sequence[str], option: str = "--out") -> None:
    """Refuse an output inside a folder whose images are read: the next run would read it as data.

    Raises:
        ValueError: names the folder; nothing has been written.
    """
    from openvision3.data.names import expand
    from openvision3.data.shards.index import is_remote

    place = Path(os.path.realpath(out))
    for name in data:
        for folder in map(Path, expand(name) if name != "openmoji" and not is_remote(name) else []):
            is_read = folder.is_dir() and not any(folder.glob("*.tar"))  # where a folder holds shards, only they are read
            if is_read and place.is_relative_to(folder.resolve()):
                raise ValueError(f"{out} lies within {folder}, and would be read as data; choose another folder with {option}")
