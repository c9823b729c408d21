"""Images by the names that a file of questions or conversations calls them: in folders, zip files and tars.

images = NamedImages(("coco/val2014", "more.zip"))
image = images.open("COCO_val2014_000000310196.jpg")
"""

from __future__ import annotations

import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from openvision3.contents import why_not
from openvision3.data.images import ImageError, open_image

BELOW = ("", "images/", "test/", "images/test/", "val2014/", "SEED-Bench-image/")
"""folders below a place that are tried, too: how the benchmarks lay out their images"""
ENDINGS = ("", ".jpg", ".png", ".jpeg")
"""of files whose names are given without one"""


LONGEST = 240
"""bytes of a part of a name; file systems take 255, endings included"""
LARGEST = 256 << 20
"""most bytes of a member that are unpacked"""
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
"""what reading a damaged archive raises"""


def places_of(path: Path) -> list[Path]:
    """Where the images of a file of questions or conversations are unless it is said: in the archive of its name, and in its folder."""
    return [path] if path.is_dir() else [*filter(Path.is_file, [path.with_suffix(".zip")]), path.parent]


class NamedImages:
    """Images of several places: folders, or archives (.zip, .tar) whose members have the names.

    A name is looked for as it is in each place in turn, then below the folders that benchmarks use, then without its first folder (COCO's own zip has
    train2017/1.jpg for coco/train2017/1.jpg). A name without folders also stands for the one member of an archive whose last part it is.

    Raises:
        FileNotFoundError: no such place. ValueError: a file that is no archive.
    """

    def __init__(self, places: Sequence[str | Path]):
        self.places = tuple(map(Path, places))
        self._archives: dict[Path, _Archive] = {}
        for place in self.places:
            if place.is_file():
                self._archives[place] = _Archive(place)
            elif not place.is_dir():
                raise FileNotFoundError(f"no such folder or archive of images: {place}")

    def find(self, name: str) -> tuple[Path, str] | None:
        """(folder or archive, path in it) of an image; None where it is missing, or where its name leads out of a folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or any(len(part.encode("utf-8", "surrogatepass")) > LONGEST for part in path.parts):
            return None
        for candidate in _candidates(str(path)):  # a//b is a/b, so that what is left without its first folder does not begin with /
            for place in self.places:
                if (archive := self._archives.get(place)) is None:
                    if (place / candidate).is_file():
                        return place, candidate
                elif member := archive.member(candidate, is_plain=len(path.parts) == 1):
                    return place, member
        return None

    def read(self, name: str) -> bytes | Path:
        """Its file, or its bytes from an archive, not decoded. Raises ImageError: reason `missing` or `unreadable`."""
        if (where := self.find(name)) is None:
            raise ImageError("missing", f"no image {name} in {', '.join(map(str, self.places))}")
        place, path = where
        return self._archives[place].read(path) if place in self._archives else place / path

    def open(self, name: str) -> Image.Image:
        """Upright RGB. Raises ImageError: it is missing or cannot be decoded."""
        return open_image(self.read(name))


def _candidates(name: str) -> Iterator[str]:
    shorter = name.partition("/")[2]
    for path in (*(below + name for below in BELOW), *((shorter,) if shorter else ())):
        for ending in ENDINGS if not PurePosixPath(name).suffix else ENDINGS[:1]:
            yield path + ending


class _Archive:
    """One zip file or tar; each process opens its own, since forked ones share a position in the file."""

    def __init__(self, path: Path):
        self.path, self._process, self._lock = path, os.getpid(), threading.Lock()
        self._file, self._members, self._last_parts = self._open()

    def _open(self) -> tuple[zipfile.ZipFile | tarfile.TarFile, dict[str, str], dict[str, str]]:
        """The file, {name: member}, and {last part of a name: member} where no other has it."""
        try:
            file: zipfile.ZipFile | tarfile.TarFile = zipfile.ZipFile(self.path) if zipfile.is_zipfile(self.path) else tarfile.open(self.path)
            names = file.namelist() if isinstance(file, zipfile.ZipFile) else file.getnames()
        except DAMAGED as error:
            raise ValueError(f"{self.path} is no folder, .zip or .tar of images: {why_not(self.path, 'a tar', error)}") from error
        times = Counter(PurePosixPath(name).name for name in names)
        last_parts = {last: name for name in names if times[last := PurePosixPath(name).name] == 1}
        return file, {name.removeprefix("./"): name for name in names}, last_parts

    def member(self, name: str, is_plain: bool) -> str | None:
        """`is_plain`: the last part of a member's name is enough."""
        return self._members.get(name) or (self._last_parts.get(name) if is_plain else None)

    def read(self, member: str) -> bytes:
        """Raises ImageError: it cannot be unpacked."""
        with self._lock:
            if self._process != os.getpid():
                self._file, self._members, self._last_parts = self._open()
                self._process = os.getpid()
            try:
                file = self._file.open(member) if isinstance(self._file, zipfile.ZipFile) else self._file.extractfile(member)
                data = file.read(LARGEST + 1) if file else b""
            except (*DAMAGED, KeyError, RuntimeError, NotImplementedError) as error:  # KeyError: a link to nothing; RuntimeError: it is encrypted
                raise ImageError("unreadable", f"{member} in {self.path} cannot be unpacked: {error}") from error
        if len(data) > LARGEST:
            raise ImageError("too large", f"{member} in {self.path} holds more than {LARGEST >> 20} MiB")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
