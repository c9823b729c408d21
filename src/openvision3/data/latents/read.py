"""Read a latent cache instead of images in every epoch; `openvision3 data latents` writes it (`write`)."""

from __future__ import annotations

import contextlib
import hashlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openvision3.data.captions import Captions
from openvision3.data.images import Box, ImageError
from openvision3.data.latents.files import AGAIN, CACHE, KEYS, SETTINGS, Part, PartReader, checksum, draw_crop, find_damage, part_name
from openvision3.data.latents.settings import OLD_FORMAT, LatentSettings, read_json
from openvision3.data.problems import Problems
from openvision3.data.sources import Source
from openvision3.data.tensor_file import TensorFile
from openvision3.draws import draw_seed


class CachedView(NamedTuple):
    """A training view: its latents, and for rows whose pixels are compared the image (3, size, size) as uint8."""

    latents: Tensor
    image: Tensor | None


class LatentCache:
    """A complete cache. No file is kept open, so that it can be used after a fork and sent to processes.

    Every entry that is read is compared with its checksum; `verify` reads everything.
    """

    def __init__(self, folder: Path, settings: LatentSettings, values: dict[str, Any]):
        self.folder, self.settings, self.values = folder, settings, values
        self.sha256 = hashlib.sha256((folder / CACHE).read_bytes()).hexdigest()
        self._starts = np.cumsum([0, *(part["samples"] for part in values["parts"])])
        self._parts: dict[int, Part] = {}
        self._index = TensorFile(folder / KEYS).map()

    @classmethod
    def open(
        cls, folder: str | Path, *, vae_sha256: str | None = None, scale: float | None = None, shift: float | None = None, size: int | None = None
    ) -> LatentCache:
        """Open a cache of this VAE (and this scaling of its latents) at this size.

        Raises:
            ValueError: no complete cache, one of another VAE or size, or a part that is missing or of another length.
        """
        folder = Path(folder)
        if not (folder / CACHE).is_file():
            if (folder / SETTINGS).is_file():
                raise ValueError(f"{folder} is a cache that is not complete; run the same openvision3 data latents command again, it continues")
            raise ValueError(f"{folder} holds no {CACHE}; write a cache of latents with openvision3 data latents DATA --out {folder}")
        settings, values = LatentSettings.read(folder / CACHE), read_json(folder / CACHE)
        if vae_sha256 is not None and vae_sha256 != settings.vae_sha256:
            raise ValueError(
                f"{folder} holds latents of the VAE {settings.vae} with sha256 {settings.vae_sha256[:12]}..., but this one has {vae_sha256[:12]}...; "
                "train with the same VAE (--model.vae.name; of a generator --tokens), or write a cache of this one"
            )
        for name, value in (("scale", scale), ("shift", shift)):
            if value is not None and value != getattr(settings, name):
                raise ValueError(
                    f"{folder} holds latents with {name} {getattr(settings, name):g}, but the VAE has {value:g} here; "
                    f"set --model.vae.{name} alike, or write a cache of this VAE"
                )
        if size is not None and size != settings.size:
            raise ValueError(f"{folder} holds latents of images of {settings.size} px, not {size}; set --size {settings.size}, or write a cache of this size")
        for entry in (values["keys"], *values["parts"]):
            if damage := find_damage(folder, entry):
                raise ValueError(damage)
        return cls(folder, settings, values)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def verify(self) -> Iterator[str]:
        """Hash every file and yield its name. Raises ValueError at the first one that has changed."""
        for entry in (self.values["keys"], *self.values["parts"]):
            if damage := find_damage(self.folder, entry, hashed=True):
                raise ValueError(damage)
            yield entry["file"]

    def key_of(self, source: Source, index: int) -> str:
        """The key of a sample in this cache: its sample key, or its name in a cache of an older version. Raises ImageError."""
        return source.key(index) if self.values["format"] == OLD_FORMAT else source.sample_key(index)

    def find(self, key: str) -> tuple[int, int] | None:
        """(part, row) of a sample, None if the cache lacks it."""
        key_hash, hashes = draw_seed(key), self._index["hashes"]
        place = int(np.searchsorted(hashes, key_hash))
        if place == len(hashes) or int(hashes[place]) != key_hash:
            return None
        return int(self._index["parts"][place]), int(self._index["rows"][place])

    def read(self, key: str, crop: int) -> tuple[Tensor, Box]:
        """The latents (C, h, w) of a crop, in bf16, and its box.

        Raises:
            ImageError: reason `not in the cache`, `unreadable latents` or `damaged latents`.
        """
        place = self.find(key)
        if place is None:
            data = ", ".join(self.settings.data)
            old = f", by an older version, which identifies samples by their names: name {data} again, or write the cache anew"
            detail = f"{self.folder} has no latents of it; it was made from {data}{old if self.values['format'] == OLD_FORMAT else ''}"
            raise ImageError("not in the cache", detail)
        number, row = place
        settings = self.settings
        entry = row * settings.crops + crop
        length = 2 * math.prod(settings.shape)
        with self._open(number) as part:
            latents = part.read("latents", entry * length, length)
            box = part.read("boxes", entry * 16, 16)
            (check,) = struct.unpack("<q", part.read("checksums", entry * 8, 8))
        if checksum(key.encode("utf-8", "surrogateescape"), box, latents) != check:
            raise ImageError("damaged latents", f"{self.folder / part_name(number)} does not fit its checksum at row {row}, crop {crop}; {AGAIN}")
        return torch.frombuffer(bytearray(latents), dtype=torch.bfloat16).view(settings.shape), struct.unpack("<4i", box)  # type: ignore[return-value]

    def view(self, source: Source, index: int, *, key: str, seed: int, epoch: int, pixels: bool) -> CachedView:
        """What a run with `seed` sees of a sample in `epoch`: its crops in turn, in an order of the sample's own. `key` is `key_of` it.

        With `pixels` the image is drawn from the source once more, and shows what the latents show.

        Raises:
            ImageError: as `read` and `Source.crop`, and reason `another image` if the image gives another box.
        """
        settings = self.settings
        order = torch.randperm(settings.crops, generator=torch.Generator().manual_seed(draw_seed(seed, "crops", key)))
        crop = int(order[epoch % settings.crops])
        latents, box = self.read(key, crop)
        if not pixels:
            return CachedView(latents, None)
        image, drawn = draw_crop(source, index, key, settings.size, settings.seed, crop)
        if tuple(drawn) != box:
            raise ImageError("another image", f"its crop {crop} is {drawn} now and was {box} when {self.folder} was written: the data have changed")
        return CachedView(latents, image)

    def sample(self, index: int) -> tuple[str, dict[str, Any]]:
        """(key, name and captions) of entry `index`, in the order of the source. Raises ImageError."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[number])
        with self._open(number) as part:
            return part.string("key", row).decode("utf-8", "surrogateescape"), part.words(row)

    @contextlib.contextmanager
    def _open(self, number: int) -> Iterator[PartReader]:
        """Open a part. Raises ImageError for what goes wrong while it is read."""
        try:
            if number not in self._parts:
                self._parts[number] = Part(self.folder, number, self.settings)
            with self._parts[number].open() as part:
                yield part
        except (OSError, ValueError) as error:
            raise ImageError("unreadable latents", f"{self.folder / part_name(number)}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "settings": self.settings, "values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class CachedSource(Source):
    """The samples of a cache without its images: keys, captions and families only, and no classes."""

    def __init__(self, cache: LatentCache):
        self.cache = cache
        self.problems = Problems()

    def __len__(self) -> int:
        return len(self.cache)

    def key(self, index: int) -> str:
        key, words = self.cache.sample(index)
        return words.get("name", key)

    def sample_key(self, index: int) -> str:
        return self.cache.sample(index)[0]

    def identity(self) -> str:
        return self.cache.sha256

    def family(self, index: int) -> str:
        key, words = self.cache.sample(index)
        return words.get("family", words.get("name", key))

    def captions(self, index: int) -> Captions:
        words = self.cache.sample(index)[1]
        return Captions(words["captions"], words.get("alike", 1))

    def value(self, index: int, name: str = "") -> str | None:
        """Raises ValueError: a cache has no fields."""
        data = " ".join(self.cache.settings.data)
        raise ValueError(f"the latent cache {self.cache.folder} holds no class labels; name the data that it was made from with --data ({data})")

    def image(self, index: int, size: int) -> Image.Image:
        raise ImageError("no image", f"{self.cache.folder} holds latents and captions only")

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Tensor, Box]:
        raise ImageError("no image", f"{self.cache.folder} holds latents and captions only")
