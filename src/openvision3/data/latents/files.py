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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvision3.data.images import Box
from openvision3.data.latents.settings import LatentSettings, read_json
from openvision3.data.sources import Source
from openvision3.data.tensor_file import TensorFile
from openvision3.draws import draw_seed

SETTINGS, KEYS, CACHE = "settings.json", "keys.safetensors", "cache.json"

AGAIN = "run the same openvision3 data latents again, which writes anew what is damaged"

TENSORS = ("latents", "boxes", "checksums", "key_hashes", "keys", "key_ends", "words", "word_ends")
"""Of a part."""


def draw_crop(source: Source, index: int, key: str, size: int, seed: int, crop: int) -> tuple[Tensor, Box]:
    """Crop number `crop` of the sample with this key as uint8 (3, size, size), the same whenever it is drawn. Raises ImageError."""
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


def checksum(key: bytes, box: bytes, latents: bytes) -> int:
    """Over all three: latents that lie under another key or beside another box are found out too."""
    return zlib.crc32(latents, zlib.crc32(box, zlib.crc32(key)))
