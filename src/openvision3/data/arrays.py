"""Images in one array of an `.npz`, as guided diffusion (ADM) writes its samples and reference sets: `arr_0`, uint8 (N, H, W, 3)."""

from __future__ import annotations

import json
import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from openvision3.data.captions import Captions
from openvision3.data.identity import digest
from openvision3.data.images import MAX_PIXELS, ImageError
from openvision3.data.sources import EncodedSource

IMAGES = "arr_0"
RECORD = "drawing"
"""the array in which our own files hold, as JSON, how their images were drawn"""


class ArraySource(EncodedSource):
    """The images of such a file, read one by one: the file may be larger than the memory.

    Raises:
        FileNotFoundError, ValueError: no such file, or one without images.
    """

    def __init__(self, path: str | Path, crop: str = "square"):
        super().__init__(crop=crop)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file of images: {path}")
        self.path, self.labels = Path(path), [Path(path).name]
        try:
            self._file = zipfile.ZipFile(path).open(f"{IMAGES}.npy")
            shape, transposed, kind = read_header(self._file)
            if kind != np.uint8 or transposed or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"it holds {kind} of shape {shape}")
            if shape[1] * shape[2] > MAX_PIXELS:
                raise ValueError(f"its images have {shape[1]:,} x {shape[2]:,} pixels; at most {MAX_PIXELS:,} are decoded")
            self._start, there = self._file.tell(), self._file.seek(0, 2)
            if there < self._start + math.prod(shape):
                raise ValueError(f"it ends before image {(there - self._start) // math.prod(shape[1:]) + 1} of {shape[0]}")
        except (ValueError, KeyError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:  # RuntimeError: it is encrypted
            expected = f"which is {IMAGES} of uint8 (N, H, W, 3) in an .npz"
            raise ValueError(f"{path} is not a file of images, {expected}: {' '.join(str(error).split())}") from error
        self.count, self.height, self.width = shape[:3]

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return f"{self.labels[0]}/{index}"

    def identity(self) -> str:
        return digest("array", self.count, self.height, self.width, self.probed_keys())

    def captions(self, index: int) -> Captions:
        return Captions()

    def data(self, index: int) -> bytes:
        """The image as a PPM file."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        length = self.height * self.width * 3
        try:
            self._file.seek(self._start + index * length)
            pixels = self._file.read(length)
        except (EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ImageError("undecodable", f"{self.key(index)}: {error}") from error
        return b"P6 %d %d 255\n" % (self.width, self.height) + pixels

    def record(self) -> dict[str, Any]:
        """How our own drawing of these images is recorded; empty for images drawn by others. Raises ValueError for a damaged record."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                record = json.loads(arrays[RECORD].tobytes()) if RECORD in arrays.files else {}
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise self._damaged_record(" ".join(str(error).split())) from error
        if not isinstance(record, dict):
            raise self._damaged_record("it is no JSON object")
        return record

    def _damaged_record(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: the array {RECORD!r}, which says how its images were drawn, cannot be read: {why}; draw them again, or remove it")


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, dtype) of the array of an `.npz` that this member holds; it then stands at the values."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def holds_arrays(path: str | Path, *names: str) -> bool:
    """Whether the file holds arrays of all these names. False for a file that is no `.npz`."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in names} <= set(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False
