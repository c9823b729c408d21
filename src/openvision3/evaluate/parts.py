"""Work that is written in parts beside its settings, so that it goes on after an interruption and never mixes with other work."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openvision3.files import write_whole


def open_parts(file: Path, settings: dict[str, Any], what: str) -> None:
    """Write the settings into `file`, in the folder of the parts, or check those that are there. Raises ValueError as `check_same`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        check_same(json.loads(file.read_text(encoding="utf-8")), settings, file.parent, what)
    else:
        write_whole(file, json.dumps(settings, indent=1) + "\n")


def check_same(recorded: dict[str, Any], settings: dict[str, Any], place: Path, what: str) -> None:
    """Raises ValueError: `place` holds `what` (such as samples of another drawing) by other settings than these; names one of them."""
    settings = json.loads(json.dumps(settings))
    apart = [name for name in {**recorded, **settings} if recorded.get(name) != settings.get(name)]
    if apart:
        name = apart[0]
        raise ValueError(
            f"{place} holds {what} ({name} {recorded.get(name, 'not recorded')}, not {settings.get(name)}); name another folder with --out, or remove it"
        )


@contextlib.contextmanager
def keeping_parts(what: str) -> Iterator[None]:
    """Where space runs out, the error says that `what` (such as the samples drawn so far) is kept."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(error.errno, f"{error.strerror}; {what} are kept, and the same command goes on from them", error.filename) from error
