"""The files of a latent cache: their names, what they hold, and how they are read and checked.

A cache is a folder. `part-000000.safetensors` holds the usable samples among samples 0 to 1,023 of the source, and so on; beside
it, `part-000000.json` marks the part as complete. `settings.json` holds what all parts share, `keys.safetensors` finds a sample
by its key, and `cache.json`, written last, completes the cache.
"""

from __future__ import annotations

import contextlib
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
from openvision3.files import sha256_of

SETTINGS, KEYS, CACHE = "settings.json", "keys.safetensors", "cache.json"

AGAIN = "run the same openvision3 data latents command again: it rewrites missing and damaged files"

TENSORS = ("latents", "boxes", "checksums", "key_hashes", "keys", "key_ends", "words", "word_ends")
"""Of a part."""


def draw_crop(source: Source, index: int, key: str, size: int, seed: int, crop: int) -> tuple[Tensor, Box]:
    """Crop number `crop` of the sample with this key as uint8 (3, size, size), the same whenever it is drawn. Raises ImageError."""
    return source.crop(index, size, torch.Generator().manual_seed(draw_seed(seed, "crop", key, crop)))


class Part:
    """A part whose header has been read; `open` opens the file to read bytes from it.

    Raises:
        OSError; ValueError: the part is damaged, or of another cache.
    """

    def __init__(self, folder: Path, number: int, settings: LatentSettings):
        self.path = folder / part_name(number)
        try:
            file = TensorFile(self.path)
            header = json.loads(file.metadata["openvision3"])
            vae, part = header["vae_sha256"], header["part"]
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
    """Reads bytes of an open part at offsets. Raises OSError; ValueError: the file has become shorter."""

    def __init__(self, part: Part, descriptor: int):
        self.part, self.descriptor = part, descriptor

    def read(self, name: str, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, self.part.starts[name] + offset)
        if len(data) != length:
            raise ValueError(f"{self.part.path} ends before it should")
        return data

    def string(self, name: str, row: int) -> bytes:
        """String number `row` of the tensor `{name}s`, whose ends are in `{name}_ends`."""
        start = struct.unpack("<q", self.read(f"{name}_ends", 8 * (row - 1), 8))[0] if row else 0
        (end,) = struct.unpack("<q", self.read(f"{name}_ends", 8 * row, 8))
        return self.read(f"{name}s", start, end - start)

    def words(self, row: int) -> dict[str, Any]:
        """Name, captions and family of a sample."""
        return json.loads(self.string("word", row))


def part_name(part: int) -> str:
    return f"part-{part:06d}.safetensors"


def mark_name(part: int) -> str:
    return f"part-{part:06d}.json"


def read_mark(folder: Path, part: int) -> dict[str, Any] | None:
    """The file that marks a part as complete; None if there is none, or a damaged one: the part is then written again."""
    try:
        mark = read_json(folder / mark_name(part))
    except (FileNotFoundError, ValueError):
        return None
    return mark if {"file", "bytes", "sha256", "samples", "skipped"} <= mark.keys() else None


def find_damage(folder: Path, entry: dict[str, Any], *, hashed: bool = False) -> str:
    """What is wrong with the file that `entry` (file, bytes, sha256) describes; "" if nothing is. Its bytes are read if `hashed`."""
    path = folder / entry["file"]
    if not path.is_file():
        return f"{path} is missing; {AGAIN}"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path} is damaged: it has {size:,} bytes, and had {entry['bytes']:,} when it was written; {AGAIN}"
    if hashed and sha256_of(path) != entry["sha256"]:
        return f"{path} is damaged: its sha256 is not that in {CACHE}; {AGAIN}"
    return ""


def to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def checksum(key: bytes, box: bytes, latents: bytes) -> int:
    """Of all three, so that latents under another key or beside another box are noticed too."""
    return zlib.crc32(latents, zlib.crc32(box, zlib.crc32(key)))
