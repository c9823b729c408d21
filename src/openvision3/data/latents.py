"""The cache of VAE latents: K random crops of every picture, encoded once, read instead of pictures in every epoch.

A cache is a folder. `part-000000.safetensors` holds the usable ones among samples 0 to 1,023 of the source, and so on; beside
it `part-000000.json` says that it is complete. `settings.json` is what all parts are made with, `keys.safetensors` finds a sample
by its key, and `cache.json`, written last, makes the folder a cache. Any number of processes write parts side by side without
a word between them; whichever ends last writes the rest.

Crop c of sample `key` is drawn from the seed (seed, "crop", key, c), so that who has the pictures can draw the same view again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openvision3.data.batches import outlive_signals
from openvision3.data.images import Box, ImageError, to_tensor
from openvision3.data.order import Order, Shuffle, draw_seed
from openvision3.data.shards import Source

FORMAT = "openvision3 latents 1"

PART = 1024
"""Samples of the source that one part stands for: 32 MB of four 8 KB crops each."""

Problem = dict[str, str]


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
        values = _read_json(path)
        if values.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {values.get('format')!r}; this version reads {FORMAT!r}")
        try:
            found = {name: values[name] for name in cls.__dataclass_fields__}
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}") from error
        return cls(**found | {"crop_area": tuple(found["crop_area"]), "data": tuple(found["data"])})


def draw_crop(source: Source, index: int, size: int, seed: int, crop: int) -> tuple[Image.Image, Box]:
    """Crop number `crop` of a sample, the same whenever it is drawn. Raises ImageError."""
    return source.crop(index, size, torch.Generator().manual_seed(draw_seed(seed, "crop", source.key(index), crop)))


# -- writing -------------------------------------------------------------------------------------------------------


class _Views(NamedTuple):
    """All crops of one sample, or why there are none."""

    key: str
    words: bytes
    images: Tensor | None
    boxes: list[Box]
    problem: Problem | None


class _Samples(torch.utils.data.Dataset):
    """Source index -> _Views: what the processes of a loader do."""

    def __init__(self, source: Source, settings: LatentSettings):
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> _Views:
        key, settings = self.source.key(index), self.settings
        try:
            words = {"captions": self.source.captions(index)} | ({"family": self.source.family(index)} if self.source.family(index) != key else {})
            drawn = [draw_crop(self.source, index, settings.size, settings.seed, crop) for crop in range(settings.crops)]
        except ImageError as error:
            return _Views(key, b"", None, [], {"key": key, "reason": error.reason, "detail": str(error)})
        images = torch.stack([to_tensor(image) for image, _ in drawn])
        return _Views(key, json.dumps(words, ensure_ascii=False).encode(), images, [box for _, box in drawn], None)


class LatentWriter:
    """Writes parts of a cache into `folder`, each whole or not at all; a part is a function of the source and the settings alone.

    `encode` takes images (n, 3, size, size) to latents; `batch` is how many at once, `workers` how many processes decode.

    Raises:
        ValueError: the folder holds a cache with other settings, or something else. OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, source: Source, encode: Callable[[Tensor], Tensor], settings: LatentSettings, *, batch: int = 32, workers: int = 0):
        if batch < 1 or workers < 0:
            raise ValueError(f"batch {batch} must be at least 1, and workers {workers} not negative")
        if settings.samples != len(source):
            raise ValueError(f"the settings are of {settings.samples} samples, but the source has {len(source)}")
        self.folder, self.source, self.encode, self.batch, self.workers = Path(folder), source, encode, batch, workers
        self.settings = claim(self.folder, settings)

    def complete(self, part: int) -> bool:
        """Whether `part` is there, byte for byte as it was written.

        Raises:
            ValueError: it is, but of other samples than the source has there now.
        """
        found = _mark(self.folder, part)
        if found is None or not _same(self.folder / _name(part), found):
            return False
        with _Part(self.folder, part, self.settings).open() as there:
            written = {there.key(row) for row in range(there.count)} | {problem["key"] for problem in found["skipped"]}
        wanted = {self.source.key(index) for index in self.settings.range(part)}
        if written != wanted:
            raise ValueError(
                f"{self.folder / _name(part)} holds other samples than the data have there now, such as {min(written ^ wanted)}; "
                "put the old data back, or name another folder with --out"
            )
        return True

    def write(self, parts: Sequence[int]) -> Iterator[int]:
        """Write these parts in turn; gives the number of samples done each time there are some more.

        Raises:
            OSError: no room, or no permission; what is complete stays.
        """
        if not parts:
            return
        loader = torch.utils.data.DataLoader(
            _Samples(self.source, self.settings),
            batch_size=None,
            sampler=itertools.chain.from_iterable(map(self.settings.range, parts)),
            num_workers=self.workers,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),
        )
        samples = iter(loader)
        for part in parts:
            yield from self._write_part(part, samples)

    def _write_part(self, part: int, samples: Iterator[_Views]) -> Iterator[int]:
        settings = self.settings
        usable: list[_Views] = []
        problems: list[Problem] = []
        waiting: list[Tensor] = []
        encoded: list[Tensor] = []

        def encode(images: Tensor) -> None:
            encoded.append(self.encode(images).to("cpu", torch.bfloat16))

        for _ in settings.range(part):
            views = next(samples)
            yield 1
            if views.problem is not None:
                problems.append(views.problem)
                continue
            usable.append(views._replace(images=None))
            assert views.images is not None
            waiting.extend(views.images)
            while len(waiting) >= self.batch:
                encode(torch.stack(waiting[: self.batch]))
                del waiting[: self.batch]
        if waiting:
            encode(torch.stack(waiting))
        shape = (len(usable), settings.crops, *settings.shape)
        latents = torch.cat(encoded).reshape(shape) if encoded else torch.empty(shape, dtype=torch.bfloat16)
        finite = [bool(torch.isfinite(rows).all()) for rows in latents]
        for views, fine in zip(usable, finite, strict=True):
            if not fine:
                problems.append({"key": views.key, "reason": "latents not finite", "detail": f"the VAE gives no finite numbers in {settings.precision}"})
        data = _serialise(settings, part, [v for v, fine in zip(usable, finite, strict=True) if fine], latents[torch.tensor(finite, dtype=torch.bool)])
        _replace(self.folder / _name(part), data)
        mark = {"file": _name(part), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "samples": sum(finite), "skipped": problems}
        _replace(self.folder / _mark_name(part), _json(mark))

    def finish(self) -> dict[str, Any] | None:
        """Once all parts are complete: write what finds a sample, and last `cache.json`, which is returned; None as long as some are not.

        Everyone may call this; all write the same.
        """
        marks = [_mark(self.folder, part) for part in range(self.settings.parts)]
        whole = [mark for mark in marks if mark is not None]
        if len(whole) < len(marks):
            return None
        skipped = Counter(problem["reason"] for problem in (*self.source.problems, *(p for mark in whole for p in mark["skipped"])))
        if not any(mark["samples"] for mark in whole):
            raise ValueError(f"none of the {self.settings.samples} samples can be used: {', '.join(f'{n} {why}' for why, n in skipped.most_common())}")
        index, twice = self._index([mark["samples"] for mark in whole])
        _replace(self.folder / KEYS, index)
        found = {
            "format": FORMAT,
            **asdict(self.settings),
            "entries": sum(mark["samples"] for mark in whole),
            "skipped": dict(sorted(skipped.items())) | ({"key twice": twice} if twice else {}),
            "keys": {"file": KEYS, "bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
            "parts": [{name: mark[name] for name in ("file", "bytes", "sha256", "samples")} for mark in whole],
        }
        _replace(self.folder / CACHE, _json(found))
        for left in self.folder.glob(".part-*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        return found

    def _index(self, counts: list[int]) -> tuple[bytes, int]:
        """`keys.safetensors`, and how many samples share their key with another one and are therefore not in it."""
        from safetensors.torch import save

        hashes, parts, rows = [], [], []
        for number, count in enumerate(counts):
            with _Part(self.folder, number, self.settings).open() as part:
                hashes.append(np.frombuffer(part.read("key_hashes", 0, 8 * count), "<i8"))
            parts.append(np.full(count, number, "<i4"))
            rows.append(np.arange(count, dtype="<i4"))
        found = np.concatenate(hashes)
        order = np.argsort(found, kind="stable")
        found = found[order]
        alone = np.ones(len(found), bool)
        same = found[1:] == found[:-1]
        alone[1:] &= ~same
        alone[:-1] &= ~same
        order = order[alone]
        arrays = {"hashes": found[alone], "parts": np.concatenate(parts)[order], "rows": np.concatenate(rows)[order]}
        return save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}), int((~alone).sum())


def claim(folder: Path, settings: LatentSettings) -> LatentSettings:
    """Make `folder` one of these settings, or see that it is; returns those written down there.

    Raises:
        ValueError: it has other settings, or holds other things. OSError: it cannot be written.
    """
    path = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder with --out")
    if not path.exists():
        if folder.exists() and (other := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))):
            if not path.exists():  # and has not come just now, from another process
                raise ValueError(f"{folder} holds other things, such as {other[0]}; name a new folder with --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(path, _json({"format": FORMAT, **asdict(settings)}), first_wins=True)
    there = LatentSettings.read(path)
    if differences := settings.differences(there):
        raise ValueError(f"{folder} was begun with other settings, and cannot go on with {'; '.join(differences)}; name another folder with --out")
    return there


def _serialise(settings: LatentSettings, part: int, usable: list[_Views], latents: Tensor) -> bytes:
    from safetensors.torch import save

    keys, words = [views.key.encode("utf-8", "surrogateescape") for views in usable], [views.words for views in usable]
    boxes = torch.tensor([views.boxes for views in usable], dtype=torch.int32).reshape(len(usable), settings.crops, 4)
    checks = [
        [_check(key, boxes[row, crop].numpy().tobytes(), latents[row, crop].view(torch.int16).numpy().tobytes()) for crop in range(settings.crops)]
        for row, key in enumerate(keys)
    ]
    tensors = {
        "latents": latents.contiguous(),
        "boxes": boxes,
        "checksums": torch.tensor(checks, dtype=torch.int64).reshape(len(usable), settings.crops),
        "key_hashes": torch.tensor([draw_seed(views.key) for views in usable], dtype=torch.int64),
        **_strings("key", keys),
        **_strings("word", words),
    }
    # One entry: the order of several is not the same from one process to the next.
    return save(tensors, {"openvision3": json.dumps({"format": FORMAT, "part": part, **asdict(settings)})})


def _strings(name: str, values: list[bytes]) -> dict[str, Tensor]:
    ends = np.cumsum([len(value) for value in values], dtype=np.int64)
    return {f"{name}s": torch.from_numpy(np.frombuffer(b"".join(values), np.uint8).copy()), f"{name}_ends": torch.from_numpy(ends)}


def _check(key: bytes, box: bytes, latents: bytes) -> int:
    """Over all three: latents that lie under another key or beside another box are found out too."""
    return zlib.crc32(latents, zlib.crc32(box, zlib.crc32(key)))


# -- reading -------------------------------------------------------------------------------------------------------


class CachedView(NamedTuple):
    """A training view: its latents, and where it was asked for the picture itself."""

    latents: Tensor
    image: Tensor | None


class LatentCache:
    """A complete cache, read entry by entry; nothing is kept open, so that it may be used after a fork and be sent to processes.

    Every entry that is read is checked against its checksum; `verify` reads everything.
    """

    def __init__(self, folder: Path, settings: LatentSettings, values: dict[str, Any]):
        self.folder, self.settings, self.values = folder, settings, values
        self.sha256 = hashlib.sha256((folder / CACHE).read_bytes()).hexdigest()
        self._starts = np.cumsum([0, *(part["samples"] for part in values["parts"])])
        self._places: dict[int, _Part] = {}
        index = _Tensors(folder / KEYS)
        self._hashes, self._parts, self._rows = (index.map(name, dtype) for name, dtype in (("hashes", "<i8"), ("parts", "<i4"), ("rows", "<i4")))

    @classmethod
    def open(
        cls, folder: str | Path, *, vae_sha256: str | None = None, scale: float | None = None, shift: float | None = None, size: int | None = None
    ) -> LatentCache:
        """Open a cache made with this VAE (and this scaling of its latents) at this size.

        Raises:
            ValueError: no complete cache, one of another VAE or size, or a part that is missing or of another length.
        """
        folder = Path(folder)
        if not (folder / CACHE).is_file():
            begun = (folder / SETTINGS).is_file()
            raise ValueError(
                f"{folder} is a cache that is not complete; run the same openvision3 data latents again, it goes on where it was"
                if begun
                else f"{folder} holds no {CACHE}; write a cache of latents with openvision3 data latents DATA --out {folder}"
            )
        settings, values = LatentSettings.read(folder / CACHE), _read_json(folder / CACHE)
        if vae_sha256 is not None and vae_sha256 != settings.vae_sha256:
            raise ValueError(
                f"{folder} holds latents of the VAE {settings.vae} with sha256 {settings.vae_sha256[:12]}..., but this one has {vae_sha256[:12]}...; "
                "train with the same VAE (--model.vae.name), or write a cache of this one"
            )
        for name, asked in (("scale", scale), ("shift", shift)):
            if asked is not None and asked != getattr(settings, name):
                raise ValueError(f"{folder} holds latents with {name} {getattr(settings, name):g}, but the VAE has {asked:g} here; set --model.vae.shift alike")
        if size is not None and size != settings.size:
            raise ValueError(f"{folder} holds latents of pictures of {settings.size} px, not {size}; set --size {settings.size}, or write a cache of this size")
        for entry in (values["keys"], *values["parts"]):
            _check_size(folder, entry)
        return cls(folder, settings, values)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def verify(self) -> Iterator[str]:
        """Hash every file; gives the name of each that is as it was written. Raises ValueError at the first that is not."""
        for entry in (self.values["keys"], *self.values["parts"]):
            if not _same(self.folder / entry["file"], entry):
                raise ValueError(f"{self.folder / entry['file']} is damaged: its sha256 is not that in {CACHE}; {AGAIN}")
            yield entry["file"]

    def find(self, key: str) -> tuple[int, int] | None:
        """(part, row) of a sample, None where the cache lacks it."""
        wanted = draw_seed(key)
        place = int(np.searchsorted(self._hashes, wanted))
        if place == len(self._hashes) or int(self._hashes[place]) != wanted:
            return None
        return int(self._parts[place]), int(self._rows[place])

    def read(self, key: str, crop: int) -> tuple[Tensor, Box]:
        """The latents (C, h, w) of a crop, in bf16, and its box.

        Raises:
            ImageError: reason `not in the cache`, `unreadable latents` or `damaged latents`.
        """
        found = self.find(key)
        if found is None:
            raise ImageError("not in the cache", f"{self.folder} has no latents of it; it was made from {', '.join(self.settings.data)}")
        number, row = found
        settings = self.settings
        entry = row * settings.crops + crop
        length = 2 * int(np.prod(settings.shape))
        try:
            with self._part(number).open() as part:
                latents = part.read("latents", entry * length, length)
                box = part.read("boxes", entry * 16, 16)
                check = struct.unpack("<q", part.read("checksums", entry * 8, 8))[0]
        except (OSError, ValueError) as error:
            raise ImageError("unreadable latents", f"{self.folder / _name(number)}: {error}") from error
        if _check(key.encode("utf-8", "surrogateescape"), box, latents) != check:
            raise ImageError("damaged latents", f"{self.folder / _name(number)} does not fit its checksum at row {row}, crop {crop}; {AGAIN}")
        return torch.frombuffer(bytearray(latents), dtype=torch.bfloat16).view(settings.shape), struct.unpack("<4i", box)  # type: ignore[return-value]

    def view(self, source: Source, index: int, *, seed: int, epoch: int, pixels: bool) -> CachedView:
        """What a run with `seed` sees of a sample in `epoch`: its crops in turn, in an order of its own, so that each is seen.

        With `pixels` the picture is drawn from the source once more, and shows what the latents show.

        Raises:
            ImageError: as `read` and `Source.crop`, and reason `another picture` where the source's has another box.
        """
        key, settings = source.key(index), self.settings
        order = torch.randperm(settings.crops, generator=torch.Generator().manual_seed(draw_seed(seed, "crops", key)))
        crop = int(order[epoch % settings.crops])
        latents, box = self.read(key, crop)
        if not pixels:
            return CachedView(latents, None)
        image, drawn = draw_crop(source, index, settings.size, settings.seed, crop)
        if tuple(drawn) != box:
            raise ImageError("another picture", f"its crop {crop} is {drawn} now and was {box} when {self.folder} was written: the data have changed")
        return CachedView(latents, to_tensor(image))

    def sample(self, index: int) -> tuple[str, dict[str, Any]]:
        """(key, its words) of entry `index`, in the order of the source. Raises ImageError."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[number])
        try:
            with self._part(number).open() as part:
                return part.key(row), json.loads(part.string("word", row))
        except (OSError, ValueError) as error:
            raise ImageError("unreadable latents", f"{self.folder / _name(number)}: {error}") from error

    def _part(self, number: int) -> _Part:
        if number not in self._places:
            self._places[number] = _Part(self.folder, number, self.settings)
        return self._places[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "settings": self.settings, "values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class CachedSource:
    """The samples of a cache whose pictures are not at hand: keys, captions and families as they were, and no picture."""

    def __init__(self, cache: LatentCache):
        self.cache = cache
        self.problems: list[Problem] = []

    def __len__(self) -> int:
        return len(self.cache)

    def key(self, index: int) -> str:
        return self.cache.sample(index)[0]

    def family(self, index: int) -> str:
        key, words = self.cache.sample(index)
        return words.get("family", key)

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self.cache.sample(index)[1]["captions"])

    def picture(self, index: int, size: int, generator: torch.Generator | None = None) -> Image.Image:
        raise ImageError("no picture", f"{self.cache.folder} holds latents and captions only")

    def crop(self, index: int, size: int, generator: torch.Generator) -> tuple[Image.Image, Box]:
        raise ImageError("no picture", f"{self.cache.folder} holds latents and captions only")

    def view(self, index: int, size: int, generator: torch.Generator) -> Tensor:
        raise ImageError("no picture", f"{self.cache.folder} holds latents and captions only")

    def order(self, seed: int, epoch: int) -> Order:
        return Shuffle(len(self), seed, epoch)


# -- files ---------------------------------------------------------------------------------------------------------

SETTINGS, KEYS, CACHE = "settings.json", "keys.safetensors", "cache.json"

AGAIN = "run the same openvision3 data latents again, which writes anew what is damaged"


class _Tensors:
    """Where the tensors of a safetensors file lie. Raises OSError; ValueError where it is no such file, or a cut one."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                length = struct.unpack("<Q", file.read(8))[0]
                if length > size - 8:
                    raise ValueError("its header is cut off")
                self.head: dict[str, Any] = json.loads(file.read(length))
                self.start = 8 + length
                if self.start + max(entry["data_offsets"][1] for name, entry in self.head.items() if name != "__metadata__") != size:
                    raise ValueError("it is not as long as its header says")
            except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error or type(error).__name__}") from error

    def map(self, name: str, dtype: str) -> np.ndarray:
        start, end = self.head[name]["data_offsets"]
        count = (end - start) // np.dtype(dtype).itemsize
        return np.memmap(self.path, dtype, "r", self.start + start, (count,)) if count else np.empty(0, dtype)


class _Part:
    """A part whose header has been read; within `with` it is open, and what is wanted is read from it at offsets."""

    def __init__(self, folder: Path, number: int, settings: LatentSettings):
        found = _Tensors(folder / _name(number))
        self.path = found.path
        notes = json.loads(found.head.get("__metadata__", {}).get("openvision3", "{}"))
        if notes.get("vae_sha256") != settings.vae_sha256 or notes.get("part") != number:
            raise ValueError(f"{self.path} is part {notes.get('part')} of a cache of VAE {str(notes.get('vae_sha256'))[:12]}..., not of this one")
        self.count = int(found.head["latents"]["shape"][0])
        if tuple(found.head["latents"]["shape"]) != (self.count, settings.crops, *settings.shape) or found.head["latents"]["dtype"] != "BF16":
            raise ValueError(f"{self.path} holds latents of another shape: {found.head['latents']['dtype']} {found.head['latents']['shape']}")
        self._at = {name: found.start + entry["data_offsets"][0] for name, entry in found.head.items() if name != "__metadata__"}

    @contextlib.contextmanager
    def open(self) -> Iterator[_Reader]:
        with open(self.path, "rb", buffering=0) as file:
            yield _Reader(self, file.fileno())

    def place(self, name: str) -> int:
        return self._at[name]


class _Reader:
    """Bytes of an open part, at offsets, so that nobody shares a position."""

    def __init__(self, part: _Part, descriptor: int):
        self.part, self.descriptor, self.count = part, descriptor, part.count

    def read(self, name: str, offset: int, length: int) -> bytes:
        found = os.pread(self.descriptor, length, self.part.place(name) + offset)
        if len(found) != length:
            raise ValueError(f"{self.part.path} ends before it should")
        return found

    def string(self, name: str, row: int) -> bytes:
        first = struct.unpack("<q", self.read(f"{name}_ends", 8 * (row - 1), 8))[0] if row else 0
        last = struct.unpack("<q", self.read(f"{name}_ends", 8 * row, 8))[0]
        return self.read(f"{name}s", first, last - first)

    def key(self, row: int) -> str:
        return self.string("key", row).decode("utf-8", "surrogateescape")


def _name(part: int) -> str:
    return f"part-{part:06d}.safetensors"


def _mark_name(part: int) -> str:
    return f"part-{part:06d}.json"


def _mark(folder: Path, part: int) -> dict[str, Any] | None:
    """What says that a part is complete, where there is one."""
    path = folder / _mark_name(part)
    return _read_json(path) if path.is_file() else None


def _check_size(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {AGAIN.replace('damaged', 'missing')}") from error
    if size != entry["bytes"]:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, and had {entry['bytes']:,} when it was written; {AGAIN}")


def _same(path: Path, entry: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object")
    return value


def _replace(path: Path, data: bytes, first_wins: bool = False) -> None:
    """Whole or not at all, under any kill; a name of its own, for on a shared disk two may write the same part."""
    making = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        with open(making, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not (first_wins and _link(making, path)):
            os.replace(making, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # of a full or unwritable disk, which is told of already
            making.unlink(missing_ok=True)


def _link(making: Path, path: Path) -> bool:
    """Give the file its name if nobody else has one of that name by now; False where the disk knows no links."""
    try:
        os.link(making, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
