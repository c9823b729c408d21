"""Files that are whole or absent, whenever the process is killed: written under another name, flushed to the disk, renamed."""

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
    """Write bytes, text as UTF-8, or what a function writes into the open file. An older file of this name stays until the new one is complete.

    Characters of file names that UTF-8 cannot hold are written as \\udcff. With `first_wins` a file that another process wrote meanwhile stays, if the
    disk supports links.

    Raises:
        OSError: names `path`; nothing is left behind.
    """
    path = Path(path)
    making = path.with_name(f".{_shortened(path.name)}.{_writer()}.making")  # two processes may write the same name on a shared disk
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
        elsewhere = error.filename not in (None, str(making)) and not error.filename2 and error.errno != errno.ENOSPC  # the file that `content` reads
        raise OSError(error.errno, error.strerror or str(error), error.filename if elsewhere else str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the first error says it already
            making.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Raises ValueError if no files can be written into a folder, or into its nearest existing parent. `option` is the option that names the folder.

    It tries, and leaves nothing behind: permissions do not tell, because root has all of them, even on /proc and on a read-only disk.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with {option}")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {os.readlink(folder)}, which does not exist; name another folder with {option}")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=there, prefix=".openvision3-").cleanup()
    except OSError as error:
        raise ValueError(f"nothing can be written into {folder} ({there}: {error.strerror}); name another folder with {option}") from error


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def half_written(path: Path) -> list[Path]:
    """The unfinished files of `write_whole` for this name, of running processes and of killed ones."""
    return list(path.parent.glob(f".{glob.escape(_shortened(path.name))}.*.making"))


def left_behind(making: Path) -> bool:
    """Whether nobody writes this unfinished file any more: its process on this machine has ended, or it is a day old."""
    host, _, process = making.name.removesuffix(".making").rpartition(".")[2].rpartition("-")
    with contextlib.suppress(OSError):
        if time.time() - making.stat().st_mtime > 86_400:
            return True
    return host == _host() and process.isdecimal() and not _alive(int(process))


def _shortened(name: str) -> str:
    """The name, or its hash if it is long: the name of an unfinished file is longer, and disks limit names."""
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
    """Link the file to its name unless that name is taken by now. False if the disk supports no links."""
    try:
        os.link(making, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
