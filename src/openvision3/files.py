"""Files that are whole or not there at all, under any kill: written beside their name, on the disk, then given it."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: str | Path, content: bytes | str | Callable[[BinaryIO], Any], *, first_wins: bool = False) -> None:
    """Write bytes, text as UTF-8, or what a function writes into the file it is given; an older file of this name stands until then.

    What a file's name may hold and text may not is written as \\udcff.
    With `first_wins` a file of this name that is there by now stays, where the disk can say so in one step.

    Raises:
        OSError: with the name of `path`; nothing is left behind.
    """
    path = Path(path)
    making = path.with_name(f".{_shortened(path.name)}.{_writer()}.making")  # on a shared disk two may write the same name
    try:
        with open(making, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if not (first_wins and _link(making, path)):
            os.replace(making, path)
    except OSError as error:
        elsewhere = error.filename not in (None, str(making)) and not error.filename2 and error.errno != errno.ENOSPC  # what `content` read from
        raise OSError(error.errno, error.strerror or str(error), error.filename if elsewhere else str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # of a full or unwritable disk, which is told of already
            making.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Raises ValueError where no files can be written into a folder, or into its first parent that is there; leaves nothing behind.

    It is tried: permissions do not tell, for root has all of them, on /proc and on a disk that is read only, too. `option` names the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with {option}")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {os.readlink(folder)}, which is not there; name another folder with {option}")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=there, prefix=".openvision3-").cleanup()
    except OSError as error:
        raise ValueError(f"nothing can be written into {folder} ({there}: {error.strerror}); name another folder with {option}") from error


def sha256_of(path: str | Path) -> str:
    """Of the bytes of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def half_written(path: Path) -> list[Path]:
    """What `write_whole` is writing under this name, or was when its process was killed."""
    return list(path.parent.glob(f".{glob.escape(_shortened(path.name))}.*.making"))


def left_behind(making: Path) -> bool:
    """Whether a half-written file is one that nobody writes any more: of a process of this machine that has ended, or a day old."""
    host, _, process = making.name.removesuffix(".making").rpartition(".")[2].rpartition("-")
    with contextlib.suppress(OSError):
        if time.time() - making.stat().st_mtime > 86_400:
            return True
    return host == _host() and process.isdecimal() and not _alive(int(process))


def _shortened(name: str) -> str:
    """A name that is as long as a disk allows leaves no room for the rest of a half-written file's: a hash stands for it."""
    raw = os.fsencode(name)
    return name if len(raw) <= 128 else hashlib.sha256(raw).hexdigest()


def _writer() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return socket.gethostname().replace(".", "-")[:64]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _link(making: Path, path: Path) -> bool:
    """Give the file its name if nobody else has one of that name by now; False where the disk knows no links."""
    try:
        os.link(making, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
