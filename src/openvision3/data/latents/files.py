"""The files of a cache of VAE latents: their names, what is in them, and how they are read and checked.

A cache is a folder. `part-000000.safetensors` holds the usable ones among samples 0 to 1,023 of the source, and so on; beside
it `part-000000.json` says that it is complete. `settings.json` is what all parts are made with, `keys.safetensors` finds a sample
by its key, and `cache.json`, written last, makes the folder a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openvision3.data.images import Box
from openvision3.data.sources import Source
from openvision3.data.tensor_file import TensorFile
from openvision3.draws import draw_seed

FORMAT = "openvision3 latents 2"
OLD_FORMAT = "openvision3 latents 1"
"""Knows a sample by its name for people (`Source.key`), not by its sample key; still read."""

SETTINGS, KEYS, CACHE = "settings.json", "keys.safetensors", "cache.json"

AGAIN = "run the same openvision3 data latents again, which writes anew what is damaged"

TENSORS = ("latents", "boxes", "checksums", "key_hashes", "keys", "key_ends", "words", "word_ends")
"""Of a part."""

PART = 1024
"""Samples of the source that one part stands for: 32 MB of four 8 KB crops each."""


@dataclass(frozen=True)
class LatentSettings:
    """What the latents of a cache depend on. `data` and `vae` are names, written down for people and never compared."""

    vae: str
    vae_sha256: str
    scale: float
    shift: float
    channels: int
    stride: int
    size: int
    crops: int
    crop_area: tuple[float, float]
    seed: int
    precision: str
    samples: int
    part_samples: int
    data: tuple[str, ...]

    def __post_init__(self):
        for name in ("crops", "samples", "part_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.size < 16 or self.size % max(16, self.stride):
            raise ValueError(f"size {self.size} must be a positive multiple of {max(16, self.stride)}")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area {self.crop_area} must be two shares with 0 < first <= second <= 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be a whole number from 0 to 2^63 - 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one crop's latents."""
        return self.channels, self.size // self.stride, self.size // self.stride

    @property
    def parts(self) -> int:
        return -(-self.samples // self.part_samples)

    def range(self, part: int) -> range:
        """The samples of the source that `part` stands for."""
        return range(part * self.part_samples, min((part + 1) * self.part_samples, self.samples))

    def differences(self, other: LatentSettings) -> list[str]:
        """`name: this, not that` for whatever makes two caches unlike."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name} {mine[name]}, not {theirs[name]}" for name in mine if name not in ("data", "vae") and mine[name] != theirs[name]]

    @classmethod
    def read(cls, path: Path) -> LatentSettings:
        """Raises OSError; ValueError where the file is none of ours."""
        values = read_json(path)
        if values.get("format") not in (FORMAT, OLD_FORMAT):
            raise ValueError(f"{path} is of format {values.get('format')!r}; this version reads {FORMAT!r}")
        try:
            found = {name: values[name] for name in cls.__dataclass_fields__}
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}") from error
        return cls(**found | {"crop_area": tuple(found["crop_area"]), "data": tuple(found["data"])})


def draw_crop(source: Source, index: int, key: str, size: int, seed: int, crop: int) -> tuple[Image.Image, Box]:
    """Crop number `crop` of the sample with this key, the same whenever it is drawn. Raises ImageError."""
    return source.crop(index, size, torch.Generator().manual_seed(draw_seed(seed, "crop", key, crop)))


class Part:
    """A part whose header has been read; within `with part.open()` bytes are read from it at offsets.

    Raises:
        OSError; ValueError: no whole part, or one of another cache.
    """

    def __init__(self, folder: Path, number: int, settings: LatentSettings):
        self.path = folder / part_name(number)
        try:
            file = TensorFile(self.path)
            notes = json.loads(file.metadata["openvision3"])
            vae, part = notes["vae_sha256"], notes["part"]
            self.starts = {name: file.places[name].start for name in TENSORS}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged: {error}; {AGAIN}") from error
        if vae != settings.vae_sha256 or part != number:
            raise ValueError(f"{self.path} is part {part} of a cache of VAE {str(vae)[:12]}..., not of this one")
        latents = file.places["latents"]
        if latents.shape[1:] != (settings.crops, *settings.shape) or latents.dtype != "BF16":
            raise ValueError(f"{self.path} holds latents of another shape: {latents.dtype} {list(latents.shape)}")
        self.count = latents.shape[0]

    @contextlib.contextmanager
    def open(self) -> Iterator[PartReader]:
        with open(self.path, "rb", buffering=0) as file:
            yield PartReader(self, file.fileno())


class PartReader:
    """Reads bytes of an open part at offsets, so that processes do not share a position."""

    def __init__(self, part: Part, descriptor: int):
        self.part, self.descriptor, self.count = part, descriptor, part.count

    def read(self, name: str, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, self.part.starts[name] + offset)
        if len(data) != length:
            raise ValueError(f"{self.part.path} ends before it should")
        return data

    def string(self, name: str, row: int) -> bytes:
        first = struct.unpack("<q", self.read(f"{name}_ends", 8 * (row - 1), 8))[0] if row else 0
        last = struct.unpack("<q", self.read(f"{name}_ends", 8 * row, 8))[0]
        return self.read(f"{name}s", first, last - first)

    def key(self, row: int) -> str:
        return self.string("key", row).decode("utf-8", "surrogateescape")


def part_name(part: int) -> str:
    return f"part-{part:06d}.safetensors"


def mark_name(part: int) -> str:
    return f"part-{part:06d}.json"


def read_mark(folder: Path, part: int) -> dict[str, Any] | None:
    """What says that a part is complete, where there is one."""
    path = folder / mark_name(part)
    return read_json(path) if path.is_file() else None


def check_size(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {AGAIN.replace('damaged', 'missing')}") from error
    if size != entry["bytes"]:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, and had {entry['bytes']:,} when it was written; {AGAIN}")


def as_long(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the file is there, with as many bytes as were written."""
    return path.is_file() and path.stat().st_size == entry["bytes"]


def unchanged(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the file is there, byte for byte as it was written."""
    if not as_long(path, entry):
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]


def to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object")
    return value


def checksum(key: bytes, box: bytes, latents: bytes) -> int:
    """Over all three: latents that lie under another key or beside another box are found out too."""
    return zlib.crc32(latents, zlib.crc32(box, zlib.crc32(key)))
