"""Images by the names that a file of questions or conversations calls them: in folders, zip archives and tars.

images = NamedImages(("coco/val2014", "more.zip"))
image = images.open("COCO_val2014_000000310196.jpg")
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from openvision3.contents import why_not
from openvision3.data.images import ImageError, open_image

BELOW = ("", "images", "test", "images/test", "val2014", "SEED-Bench-image")
"""sub-folders of a place that are tried, too: how the benchmarks lay out their images"""
ENDINGS = ("", ".jpg", ".png", ".jpeg")
"""of files whose names are given without one"""


class NamedImages:
    """Images of several places, which are tried in turn: folders, or archives (.zip, .tar) whose members have the names.

    Raises:
        ValueError: a place that does not exist, or that is no archive.
    """

    def __init__(self, places: Sequence[str | Path]):
        self.places = [Path(place) for place in places]
        self._archives: dict[Path, zipfile.ZipFile | tarfile.TarFile] = {}
        self._members: dict[Path, dict[str, str]] = {}
        for place in self.places:
            if not place.exists():
                raise ValueError(f"no such folder or archive of images: {place}")
            if not place.is_dir():
                self._open_archive(place)

    def _open_archive(self, path: Path) -> None:
        try:
            archive: zipfile.ZipFile | tarfile.TarFile = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path)
            names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else archive.getnames()
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{path} is no folder, .zip or .tar of images: {why_not(path, 'a tar', error)}") from error
        members = {PurePosixPath(name).name: name for name in reversed(names)}
        self._archives[path], self._members[path] = archive, members | {name.removeprefix("./"): name for name in names}

    def find(self, name: str) -> tuple[Path, str] | None:
        """(folder or archive, path or member in it) of an image; None where it is missing."""
        for place in self.places:
            for candidate in (name + ending for ending in (ENDINGS if not PurePosixPath(name).suffix else ENDINGS[:1])):
                if place in self._members:
                    if member := self._members[place].get(candidate) or self._members[place].get(PurePosixPath(candidate).name):
                        return place, member
                elif (folder := next((folder for folder in BELOW if (place / folder / candidate).is_file()), None)) is not None:
                    return place, str(Path(folder) / candidate)
        return None

    def open(self, name: str) -> Image.Image:
        """Upright RGB. Raises ImageError: it is missing or cannot be decoded."""
        where = self.find(name)
        if where is None:
            raise ImageError("missing", f"no image {name} in {', '.join(map(str, self.places))}")
        place, member = where
        if (archive := self._archives.get(place)) is None:
            return open_image(place / member)
        try:
            if isinstance(archive, zipfile.ZipFile):
                return open_image(archive.read(member))
            file = archive.extractfile(member)
            return open_image(file.read() if file else b"")
        except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
            raise ImageError("unreadable", f"{member} of {place}: {error}") from error
